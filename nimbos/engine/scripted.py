"""The scripted model: answers that come from a file, for tests that run offline and in seconds.

It is a `TokenSource` like an engine: it counts, streams, paces, stops and is cancelled the same way. Which reply is
given depends only on the ask's own conversation, never on what was asked before, so a restart changes nothing.
It cannot give log-probabilities or vectors, and it does not bend its words to a grammar. Read `script.py` for the file.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from nimbos.engine.script import Message, Reply, Script, conversation_of
from nimbos.engine.tally import Tally
from nimbos.errors import PromptTooLong, UnsupportedField
from nimbos.meterfile import MeterFile, Row
from nimbos.types import (
    Ask,
    Channel,
    Chunk,
    Final,
    FinishReason,
    Kind,
    ModelCard,
    Prepared,
    Receipt,
    Text,
    TokenChunk,
    Tokens,
)

# The conversation as JSON. The remark tells `chat` what this model can: Hermes tool calls, thinking with a switch.
CHAT_TEMPLATE = '{{ messages | tojson }}{# tools: <tool_call> "arguments"; enable_thinking: <think> </think> #}'
TEMPLATE_SHA256 = hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()
CONTEXT_TOKENS = 32_768

_WORD = re.compile(r"\w+|[^\w\s]")
_PIECE = re.compile(r"\s*(?:\w+|[^\w\s])(?:\s+\Z)?|\s+\Z")  # a word with the white space before it; the last also after


def count_tokens(text: str) -> int:
    """One word or punctuation mark is a token."""
    return len(_WORD.findall(text))


def split_tokens(text: str) -> list[str]:
    """The pieces join to `text` again."""
    return _PIECE.findall(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What one branch will say: `pieces[i]` is the text of token `i`, with its channel."""

    pieces: tuple[tuple[str, Channel], ...]
    reason: FinishReason
    stopped_by: str | None


@dataclass(slots=True, eq=False)
class _Branch:
    number: int
    sent: int
    begun_at: int
    done: bool = False
    thinking: int = 0


@dataclass(slots=True, eq=False)
class _Allowance:
    """How many tokens of each branch are paid for; `more` is set when that changes."""

    tokens: int | None
    last: bool
    more: asyncio.Event = field(default_factory=asyncio.Event)

    def spent(self, branch: _Branch) -> bool:
        return self.tokens is not None and branch.sent >= self.tokens


class ScriptedSource:
    def __init__(self, script: Script, *, model_id: str, model_hash: str, created: int = 0) -> None:
        self._script = script
        self._card = ModelCard(
            id=model_id,
            model_hash=model_hash,
            architecture="scripted",
            context_tokens=CONTEXT_TOKENS,
            chat_template=CHAT_TEMPLATE,
            shares_prefixes=False,
            created=created,
        )
        self.active = 0
        self._allowances: dict[str, _Allowance] = {}
        self._meters: MeterFile | None = None

    def count_into(self, meters: MeterFile) -> None:
        """From now on asks that have a `meter_row` are counted there."""
        self._meters = meters

    @classmethod
    def load(cls, path: Path) -> ScriptedSource:
        """Raises: ModelUnusable naming the file and the key at fault."""
        script, content = Script.read(path)
        return cls(
            script,
            model_id=path.stem,
            model_hash=hashlib.sha256(content).hexdigest(),
            created=int(path.stat().st_mtime),
        )

    @property
    def card(self) -> ModelCard:
        return self._card

    async def describe(self) -> ModelCard:
        return self._card

    async def prepare(self, ask: Ask) -> Prepared:
        """Raises: PromptTooLong; UnsupportedField (vectors, log-probabilities); InvalidRequest when no reply fits."""
        if ask.kind is not Kind.GENERATE:
            raise UnsupportedField(
                "input", why=f"not for the scripted model {self._card.id!r}, which has no embeddings"
            )
        if ask.sampling.logprobs is not None:
            raise UnsupportedField("logprobs", why=f"not available from the scripted model {self._card.id!r}")
        if ask.stop_ids:
            raise UnsupportedField("stop_token_ids", why=f"not for the scripted model {self._card.id!r}: it has none")
        conversation = conversation_of(_prompt_text(ask))
        count = _count(conversation)
        if count >= self._card.context_tokens:
            raise PromptTooLong(have=count, limit=self._card.context_tokens - 1)
        self._script.reply_to(conversation, model_id=self._card.id)
        return Prepared(ask=ask, prompt_tokens=count)

    async def generate(self, ask: Ask) -> AsyncIterator[Chunk]:
        conversation = conversation_of(_prompt_text(ask))
        reply = self._script.reply_to(conversation, model_id=self._card.id)
        prompt_tokens = _count(conversation)
        line = write_line(reply, ask, room_tokens=self._card.context_tokens - prompt_tokens)
        branches = [_branch(number, ask) for number in range(ask.n) if number not in ask.finished]
        allowance = self._allowances[ask.id] = _Allowance(ask.allowance_tokens, ask.allowance_last)
        tally = Tally(
            prompt_tokens,
            self._row(ask),
            open_branches=len(branches),
            paid_prompt=ask.paid_prompt_tokens,
            paid_output=ask.paid_output_tokens,
        )
        tally.computed(0, prompt_tokens)
        tally.write()
        self.active += 1
        try:
            clock = asyncio.get_running_loop().time
            started, step = clock(), 0
            while left := [branch for branch in branches if not branch.done]:
                ready = [branch for branch in left if allowance.last or not allowance.spent(branch)]
                if not ready:
                    parked = clock()
                    allowance.more.clear()
                    await allowance.more.wait()
                    started += clock() - parked
                    continue
                for branch in ready:
                    if branch.sent < len(line.pieces) and not allowance.spent(branch):
                        yield _next_token(branch, line, tally)
                    budget_ended = branch.sent < len(line.pieces)
                    if not budget_ended or (allowance.last and allowance.spent(branch)):
                        branch.done = True
                        yield _final(branch, line, tally, steps=step + 1, budget_ended=budget_ended)
                step += 1
                await _pace(started, step, reply.tokens_per_second)
        finally:
            self.active -= 1
            self._allowances.pop(ask.id, None)

    def extend(self, ask_id: str, *, allowance_tokens: int | None, last: bool) -> None:
        allowance = self._allowances.get(ask_id)
        if allowance is not None:
            allowance.tokens, allowance.last = allowance_tokens, last
            allowance.more.set()

    def _row(self, ask: Ask) -> Row | None:
        if self._meters is None or ask.meter_row is None:
            return None
        return self._meters.row(ask.meter_row, ask.id)

    async def close(self) -> None:
        """Holds nothing."""


def write_line(reply: Reply, ask: Ask, *, room_tokens: int) -> Line:
    """The reply under the ask's limits: thinking and its budget, stop strings, tokens. Pure.

    The token that completes a stop string is counted, and neither it nor any part of the stop string is sent.
    """
    thinking = split_tokens(reply.thinking)[: ask.thinking.budget_tokens] if ask.thinking is not None else []
    text = reply.answer()
    pieces: list[tuple[str, Channel]] = [(piece, Channel.THINKING) for piece in thinking]
    start, end, stopped_by = _first_stop(text, ask.stop)
    at = 0
    for piece in split_tokens(text):
        if at >= end:
            break
        pieces.append((piece[: max(0, start - at)], Channel.TEXT))
        at += len(piece)
    limit = min(room_tokens, ask.limit_tokens if ask.limit_tokens is not None else room_tokens)
    if len(pieces) > limit:
        return Line(pieces=tuple(pieces[:limit]), reason=FinishReason.LENGTH, stopped_by=None)
    return Line(pieces=tuple(pieces), reason=FinishReason.STOP, stopped_by=stopped_by)


def _first_stop(text: str, stops: tuple[str, ...]) -> tuple[int, int, str | None]:
    """(start, end, stop) of the stop string that is complete first; both ends are the text's where there is none."""
    found = [(at + len(stop), at, stop) for stop in stops if stop and (at := text.find(stop)) >= 0]
    if not found:
        return len(text), len(text), None
    end, start, stop = min(found)
    return start, end, stop


def _branch(number: int, ask: Ask) -> _Branch:
    already = len(ask.emitted.get(number, ()))
    return _Branch(number=number, sent=already, begun_at=already)


def _next_token(branch: _Branch, line: Line, tally: Tally) -> TokenChunk:
    """Counted before it is told."""
    text, channel = line.pieces[branch.sent]
    chunk = TokenChunk(branch=branch.number, ids=(branch.sent,), text=text, channel=channel)
    branch.sent += 1
    branch.thinking += channel is Channel.THINKING
    tally.answered(1, int(channel is Channel.THINKING))
    tally.write()
    return chunk


def _final(branch: _Branch, line: Line, tally: Tally, *, steps: int, budget_ended: bool) -> Final:
    output = branch.sent - branch.begun_at
    return Final(
        branch=branch.number,
        reason=FinishReason.LENGTH if budget_ended else line.reason,
        usage=tally.usage(first=branch.number == 0, output=output, thinking=branch.thinking),
        receipt=Receipt(steps=steps, mean_batch=1.0),
        stopped_by=None if budget_ended else line.stopped_by,
        budget_ended=budget_ended,
    )


async def _pace(started: float, step: int, tokens_per_second: float | None) -> None:
    """Sleeps until token `step` is due; without a rate it only lets others run."""
    if tokens_per_second is None:
        await asyncio.sleep(0)
        return
    due = started + step / tokens_per_second
    await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))


def _prompt_text(ask: Ask) -> str:
    for part in ask.parts:
        if isinstance(part, Tokens):
            raise UnsupportedField("prompt", why="an array of token ids, and a scripted model has no vocabulary")
    return "".join(part.text for part in ask.parts if isinstance(part, Text))


def _count(conversation: tuple[Message, ...]) -> int:
    return sum(count_tokens(message.text) for message in conversation)
