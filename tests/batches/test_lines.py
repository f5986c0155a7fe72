"""The pure parts: how a file becomes lines, and how many of them run where a limit is met."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nimbos.batches.fairness import Caps
from nimbos.batches.lines import Piece, Splitter
from nimbos.batches.words import LEGAL, OVER, State

LINE_BYTES = 8


def split(content: bytes, cuts: list[int], *, next_byte: int = 0, next_number: int = 1) -> tuple[list[Piece], Splitter]:
    splitter = Splitter(line_bytes=LINE_BYTES, next_byte=next_byte, next_number=next_number)
    pieces: list[Piece] = []
    at = 0
    for cut in [*sorted(cuts), len(content)]:
        pieces += splitter.feed(content[at:cut])
        at = max(at, cut)
    return [*pieces, *splitter.finish()], splitter


@given(st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line), max_size=12), st.booleans(), st.data())
def test_lines_are_found_wherever_the_pieces_are_cut(lines: list[bytes], ends: bool, data: st.DataObject) -> None:
    content = b"\n".join(lines) + (b"\n" if ends else b"")
    pieces, _ = split(content, data.draw(st.lists(st.integers(0, len(content)), max_size=6)))
    expected = []
    at = 0
    for number, line in enumerate(content.split(b"\n"), start=1):
        if len(line) > LINE_BYTES:
            expected.append(Piece(number, at, len(line), None))
        elif line.strip(b" \t\r\n"):
            expected.append(Piece(number, at, len(line), line))
        at += len(line) + 1
    assert pieces == expected
    assert all(piece.content in (None, content[piece.start_byte :][: piece.size_bytes]) for piece in pieces)


@given(
    st.lists(st.binary(min_size=1, max_size=6).filter(lambda line: b"\n" not in line), min_size=1, max_size=9),
    st.data(),
)
def test_reading_goes_on_where_it_stopped(lines: list[bytes], data: st.DataObject) -> None:
    content = b"\n".join(lines)
    whole, _ = split(content, [])
    splitter = Splitter(line_bytes=LINE_BYTES)
    seen = []
    stop = data.draw(st.integers(0, max(0, len(whole) - 1)))
    for piece in splitter.feed(content):
        if len(seen) == stop:
            break
        seen.append(piece)
        at, number = splitter.next_byte, splitter.next_number
    if not seen:
        at, number = 0, 1
    rest, _ = split(content[at:], [], next_byte=at, next_number=number)
    assert [*seen, *rest] == whole


def test_a_long_line_is_never_held() -> None:
    splitter = Splitter(line_bytes=LINE_BYTES)
    for _ in range(1000):
        assert list(splitter.feed(b"x" * 100)) == []
        assert sum(map(len, splitter._held)) <= LINE_BYTES
    (piece,) = splitter.finish()
    assert (piece.size_bytes, piece.content) == (100_000, None)


def test_a_cap_is_forgotten_after_a_minute() -> None:
    caps = Caps()
    caps.put("a", 0, now_s=100.0)
    assert caps.among({"a": 5, "b": 5}, now_s=159.0) == {"a": 1}
    assert caps.among({"a": 5, "b": 5}, now_s=160.0) == {}


def test_every_state_is_reached_and_every_end_is_an_end() -> None:
    assert LEGAL.keys() == set(State)
    assert {State.VALIDATING}.union(*LEGAL.values()) == set(State)
    assert {State.COMPLETED, State.FAILED, State.EXPIRED, State.CANCELLED} == OVER
