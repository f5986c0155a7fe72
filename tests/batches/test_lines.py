"""The pure parts: how a file becomes lines, and how many of them run where a limit is met."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nimbos.batches.fairness import Caps, Queue, Turns, places
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


LINES = st.one_of(
    st.binary(max_size=12).filter(lambda line: b"\n" not in line), st.text(" \t\rx", max_size=12).map(str.encode)
)


@given(st.lists(LINES, max_size=12), st.booleans(), st.data())
def test_lines_are_found_wherever_the_pieces_are_cut(lines: list[bytes], ends: bool, data: st.DataObject) -> None:
    content = b"\n".join(lines) + (b"\n" if ends else b"")
    pieces, _ = split(content, data.draw(st.lists(st.integers(0, len(content)), max_size=6)))
    expected = []
    at = 0
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip(b" \t\r\n"):
            expected.append(Piece(number, at, len(line), line if len(line) <= LINE_BYTES else None))
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


def test_a_file_of_line_ends_costs_less_than_a_step_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 MB of them would keep a server busy for minutes."""
    splitter = Splitter(line_bytes=LINE_BYTES)
    lines = 0
    held = splitter._hold

    def counted(content: bytes) -> None:
        nonlocal lines
        lines += 1
        held(content)

    monkeypatch.setattr(splitter, "_hold", counted)
    for _ in range(10):
        assert list(splitter.feed(b"\n" * 10_000 + b" \r\n" * 10_000)) == []
    assert lines <= 20
    (piece,) = splitter.feed(b"\n{}\n")
    assert (piece.number, piece.start_byte) == (200_002, 400_001)


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


QUEUES = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.builds(Queue, project=st.sampled_from("xyz"), held=st.integers(0, 9), weight=st.sampled_from([0.5, 1.0, 2.0])),
    min_size=1,
)


@given(st.integers(0, 40), QUEUES, st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9)))
def test_places_go_to_the_project_and_in_it_to_the_batch_that_have_fewest(
    free: int, queues: dict[str, Queue], caps: dict[str, int]
) -> None:
    """As if each place was given by itself."""
    given_one_by_one: dict[str, int] = {}
    held = {name: queue.held for name, queue in queues.items()}
    for _ in range(free):
        of_project = {
            project: sum(held[name] for name, queue in queues.items() if queue.project == project) for project in "xyz"
        }
        may = [name for name in queues if held[name] < caps.get(name, 10**9)]
        if not may:
            break
        lightest = min(of_project[queues[name].project] / queues[name].weight for name in may)
        few = [name for name in may if of_project[queues[name].project] / queues[name].weight == lightest]
        chosen = min(few, key=lambda name: held[name])
        held[chosen] += 1
        given_one_by_one[chosen] = given_one_by_one.get(chosen, 0) + 1
    assert places(free, queues, caps) == given_one_by_one


def test_a_project_with_many_batches_leaves_half_of_the_places_to_one_with_a_single() -> None:
    many = {f"batch_{n:03}": Queue(project="many", held=0) for n in range(100)}
    shares = places(32, {**many, "batch_z": Queue(project="one", held=0)}, {})
    assert shares["batch_z"] == 16


def test_where_there_are_more_names_than_places_each_has_its_turn() -> None:
    turns = Turns()
    served = []
    for _ in range(9):
        first = turns.ordered("abc")[0]
        turns.given(first)
        served.append(first)
    assert served == ["a", "b", "c"] * 3
    assert turns.ordered("abcd")[0] == "d"
    assert turns.ordered(["b"]) == ["b"] and turns.ordered("ab")[0] == "a"  # who was away is as new


def test_every_state_is_reached_and_every_end_is_an_end() -> None:
    assert LEGAL.keys() == set(State)
    assert {State.VALIDATING}.union(*LEGAL.values()) == set(State)
    assert {State.COMPLETED, State.FAILED, State.EXPIRED, State.CANCELLED} == OVER
