"""A choice of the older route: where its tokens stand in its text."""

from __future__ import annotations

import pytest

from nimbos.api.text_choice import TextBranch
from nimbos.types import ChosenLogprob, TokenChunk, TokenLogprob

PIECES = [b"a ", "é".encode()[:1], "é".encode()[1:], b"b", "😀".encode()[:3], "😀".encode()[3:] + b"c", b"d"]
TEXT = b"".join(PIECES).decode()
OFFSETS = [0, 2, 2, 3, 4, 4, 6]  # of the first character that a token has a part of


def chunk(pieces: list[bytes], text: str) -> TokenChunk:
    logprobs = tuple(ChosenLogprob(chosen=TokenLogprob(id=1, piece=piece, logprob=-1.0)) for piece in pieces)
    return TokenChunk(branch=0, ids=(1,) * len(pieces), text=text, logprobs=logprobs)


@pytest.mark.parametrize("echo", ["", "said before: "])
def test_offsets_count_the_texts_characters_and_not_those_of_its_tokens(echo: str) -> None:
    branch = TextBranch(index=0, echo=echo, logprobs=0)
    branch.add(chunk(PIECES, TEXT))
    choice = branch.whole(0)
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == [len(echo) + offset for offset in OFFSETS]
    assert choice.text[choice.logprobs.text_offset[-1] :] == "d"


def test_a_stream_has_the_same_offsets_wherever_it_is_cut() -> None:
    branch = TextBranch(index=0, echo="", logprobs=0)
    offsets: list[int] = []
    for piece in PIECES:
        choice = branch.piece(chunk([piece], ""))
        assert choice is not None and choice.logprobs is not None
        offsets += choice.logprobs.text_offset
    assert offsets == OFFSETS
