"""One choice of `/v1/completions`: its text and, in the older shape of parallel lists, its log-probabilities."""

from __future__ import annotations

import codecs
import math
from dataclasses import dataclass, field

from nimbos.api import openai_wire as wire
from nimbos.types import ChosenLogprob, Final, FinishReason, TokenChunk

_Utf8 = codecs.getincrementaldecoder("utf-8")


@dataclass(slots=True, eq=False, kw_only=True)
class TextBranch:
    """`logprobs`: None when the client asked for none; they may have been computed all the same, to pick the best.
    A token's offset is where its first character stands in the text, also when the character began in a token before.
    """

    index: int
    echo: str
    logprobs: int | None
    reason: FinishReason = FinishReason.STOP
    text: list[str] = field(default_factory=list)
    chosen: list[ChosenLogprob] = field(default_factory=list)
    _offset: int = field(init=False)
    _decoder: codecs.IncrementalDecoder = field(init=False)

    def __post_init__(self) -> None:
        self._offset = len(self.echo)
        self._decoder = _Utf8("replace")

    def add(self, chunk: TokenChunk) -> None:
        self.text.append(chunk.text)
        self.chosen.extend(chunk.logprobs or ())

    def piece(self, chunk: TokenChunk) -> wire.TextChoice | None:
        """None when there is nothing to show yet."""
        if not chunk.text and not chunk.logprobs:
            return None
        return wire.TextChoice(index=self.index, text=chunk.text, logprobs=self._written(list(chunk.logprobs or ())))

    def ending(self, final: Final) -> wire.TextChoice:
        return wire.TextChoice(index=self.index, text="", finish_reason=final.reason.value)

    def whole(self, index: int) -> wire.TextChoice:
        return wire.TextChoice(
            index=index,
            text=self.echo + "".join(self.text),
            finish_reason=self.reason.value,
            logprobs=self._written(self.chosen),
        )

    def mean_logprob(self) -> float:
        if not self.chosen:
            return -math.inf
        return sum(one.chosen.logprob for one in self.chosen) / len(self.chosen)

    def _written(self, chosen: list[ChosenLogprob]) -> wire.TextLogprobs | None:
        if self.logprobs is None or not chosen:
            return None
        tokens = [one.chosen.piece.decode(errors="replace") for one in chosen]
        offsets = []
        for one in chosen:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(one.chosen.piece))
        return wire.TextLogprobs(
            tokens=tokens,
            token_logprobs=[one.chosen.logprob for one in chosen],
            top_logprobs=[_top(one) for one in chosen] if self.logprobs else None,
            text_offset=offsets,
        )


def best(branches: list[TextBranch], keep: int) -> list[TextBranch]:
    """The `keep` likeliest by mean log-probability of a token; in their own order when nothing is left out."""
    if keep == len(branches):
        return branches
    return sorted(branches, key=lambda branch: branch.mean_logprob(), reverse=True)[:keep]


def _top(one: ChosenLogprob) -> dict[str, float]:
    return {other.piece.decode(errors="replace"): other.logprob for other in one.top}
