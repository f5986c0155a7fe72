"""What of one branch waits to be sent: ids at once, text when it is whole and certain.

Knows nothing of thinking marks (`text.py` has taken them out) or of what a token means. Text outside of thinking goes
through the stop strings.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field

from nimbos.engine.text import StopMatcher
from nimbos.types import Channel, ChosenLogprob, TokenChunk

_Utf8 = codecs.getincrementaldecoder("utf-8")


@dataclass(slots=True, eq=False)
class _Run:
    """Consecutive tokens and text of one channel."""

    channel: Channel
    ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[ChosenLogprob] = field(default_factory=list)


class Outbox:
    """`hit`: the stop string that was met; from then on no text comes out."""

    __slots__ = ("_channel", "_decoder", "_runs", "_stop")

    def __init__(self, stops: Sequence[str]) -> None:
        self._channel = Channel.TEXT  # of what the decoder holds
        self._decoder = _Utf8("replace")
        self._stop = StopMatcher(stops)
        self._runs: list[_Run] = []

    @property
    def hit(self) -> str | None:
        return self._stop.hit

    def note(self, channel: Channel, token: int, logprob: ChosenLogprob | None) -> None:
        """The id goes out with the next chunk, whether its text is certain or not."""
        run = self._run(channel)
        run.ids.append(token)
        if logprob is not None:
            run.logprobs.append(logprob)

    def write(self, channel: Channel, raw: bytes, *, stops: bool) -> None:
        """`stops`: whether a stop string counts in this text (not below `min_tokens`)."""
        if channel is not self._channel:
            self.flush(stops=stops)
            self._channel = channel
        self._put(self._decoder.decode(raw), stops=stops)

    def flush(self, *, stops: bool) -> None:
        """Nothing follows in this channel: half a character becomes U+FFFD, half a stop string is text."""
        self._put(self._decoder.decode(b"", True), stops=stops)
        held = self._stop.flush()
        if held:
            self._run(Channel.TEXT).text.append(held)

    def take(self, branch: int, *, logprobs: bool) -> list[TokenChunk]:
        """Everything since the last call, in order."""
        runs, self._runs = self._runs, []
        return [
            TokenChunk(
                branch=branch,
                ids=tuple(run.ids),
                text="".join(run.text),
                channel=run.channel,
                logprobs=tuple(run.logprobs) if logprobs else None,
            )
            for run in runs
        ]

    def _put(self, text: str, *, stops: bool) -> None:
        if self._stop.hit is not None:
            return
        if stops and self._channel is Channel.TEXT:
            text = self._stop.feed(text)
        if text:
            self._run(self._channel).text.append(text)

    def _run(self, channel: Channel) -> _Run:
        if not self._runs or self._runs[-1].channel is not channel:
            self._runs.append(_Run(channel))
        return self._runs[-1]
