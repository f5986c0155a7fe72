"""An answer in Anthropic's events, and the same events folded into one message: the two cannot disagree."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET

from nimbos.api import anthropic_wire as wire
from nimbos.api import openai_wire
from nimbos.api.cut_json import whole_object
from nimbos.api.dialogue import Ended, Opened, Question, Said, Told, answer
from nimbos.batches import Reply
from nimbos.chat import ContentDelta, Delta, ReasoningDelta
from nimbos.service import Service
from nimbos.types import AskClass, Final, FinishReason, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """What the request wants of the answer's form. `model`: the name it asked for. `hidden`: thinking is not shown.
    `silent`: nothing is. `edits`: it spoke of context management. `stops`: its own stop sequences."""

    model: str
    stops: tuple[str, ...] = ()
    hidden: bool = False
    silent: bool = False
    edits: bool = False


async def events_of(service: Service, question: Question, manner: Manner) -> AsyncGenerator[wire.Event, None]:
    """Closing it cancels the ask."""
    blocks = _Blocks(question.card.model_hash, hidden=manner.hidden)
    ended: Ended | None = None
    async with aclosing(answer(service, question)) as events:
        async for event in events:
            if isinstance(event, Opened):
                yield wire.MessageStart(_begun(question, manner, service.used(question.ask.id)))
                yield wire.Ping()
            elif isinstance(event, Said):
                for one in [] if manner.silent else blocks.add(event.delta):
                    yield one
            elif isinstance(event, Ended):
                ended = event
                for one in blocks.close():
                    yield one
            else:
                assert ended is not None
                yield _closing(question, manner, ended, event)
    yield wire.MessageStop()


async def fold(question: Question, events: AsyncGenerator[wire.Event, None]) -> wire.Message:
    """A stream's events as one reply; with a journal it is told before its ask is settled."""
    folded: _Folded | None = None
    async with aclosing(events):
        async for event in events:
            if isinstance(event, wire.MessageStart):
                folded = _Folded(event.message)
            elif folded is not None:
                folded.add(event)
                if isinstance(event, wire.MessageDelta) and question.journal is not None:
                    question.journal.answered(reply_of(question, folded.message))
    assert folded is not None
    return folded.message


def reply_of(question: Question, message: wire.Message) -> Reply:
    return Reply(200, wire.encode(message), question.ask.id)


def _begun(question: Question, manner: Manner, used: Usage) -> wire.Message:
    """The prompt is computed by now, so what of it was in memory is known."""
    prompt = Usage(input=question.admission.prompt_tokens, cached=used.cached)
    usage = wire.UsageBody.of(prompt, pin_tokens=question.ask.pin_tokens)
    usage.service_tier = "batch" if question.ask.ask_class is AskClass.BATCH else "standard"
    return wire.Message(
        id=openai_wire.completion_id(question.ask, "msg").replace("-", "_"), model=manner.model, usage=usage
    )


def _closing(question: Question, manner: Manner, ended: Ended, told: Told) -> wire.MessageDelta:
    reason, sequence = stop_of(ended.final, called=ended.called, limit=question.ask.limit_tokens, stops=manner.stops)
    return wire.MessageDelta(
        delta=wire.Stopped(stop_reason=reason, stop_sequence=sequence),
        usage=wire.UsageBody.of(told.usage, pin_tokens=question.ask.pin_tokens),
        context_management=wire.ContextManagement() if manner.edits else UNSET,
        x_nimbos=openai_wire.receipt([question.ask], list(told.finals), question.card),
    )


def stop_of(final: Final, *, called: bool, limit: int | None, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """`stop_reason` and `stop_sequence`. An answer that ended before its limit, for want of room, says so."""
    if final.stopped_by is not None and final.stopped_by in stops:
        return "stop_sequence", final.stopped_by
    if final.reason is not FinishReason.LENGTH:
        return ("tool_use" if called else "end_turn"), None
    if final.budget_ended or (limit is not None and final.usage.output >= limit):
        return "max_tokens", None
    return "model_context_window_exceeded", None


class _Blocks:
    """Deltas as blocks that open and close one after the other."""

    def __init__(self, model_hash: str, *, hidden: bool) -> None:
        self._hidden = hidden
        self._index = -1
        self._open: type[wire.Block] | None = None
        self._call = -1
        self._seal = hashlib.sha256(model_hash.encode())

    def add(self, delta: Delta) -> list[wire.Event]:
        if isinstance(delta, ContentDelta):
            return [*self._begin(wire.TextBlock()), self._piece(wire.TextDelta(delta.text))]
        if isinstance(delta, ReasoningDelta):
            self._seal.update(delta.text.encode())
            began = self._begin(wire.ThinkingBlock())
            return began if self._hidden else [*began, self._piece(wire.ThinkingDelta(delta.text))]
        began = []
        if delta.index != self._call:
            began = self.close()
            self._call = delta.index
        if delta.id is not None and delta.name is not None:
            began += self._begin(wire.ToolUseBlock(id=f"toolu_{delta.id.removeprefix('call_')}", name=delta.name))
        return [*began, self._piece(wire.InputJsonDelta(delta.arguments))] if delta.arguments else began

    def close(self) -> list[wire.Event]:
        if self._open is None:
            return []
        kind, self._open = self._open, None
        closed: list[wire.Event] = [wire.BlockStop(self._index)]
        if kind is wire.ThinkingBlock:
            closed.insert(0, self._piece(wire.SignatureDelta(base64.b64encode(self._seal.digest()).decode())))
        return closed

    def _begin(self, block: wire.Block) -> list[wire.Event]:
        """Nothing when such a block is open already."""
        if self._open is type(block):
            return []
        closed = self.close()
        self._index += 1
        self._open = type(block)
        return [*closed, wire.BlockStart(self._index, block)]

    def _piece(self, delta: wire.Delta) -> wire.BlockDelta:
        return wire.BlockDelta(self._index, delta)


@dataclass(slots=True, eq=False)
class _Folded:
    message: wire.Message
    _pieces: list[str] = field(default_factory=list)

    def add(self, event: wire.Event) -> None:
        match event:
            case wire.BlockStart(content_block=block):
                self.message.content.append(msgspec.structs.replace(block))
                self._pieces.clear()
            case wire.BlockDelta(delta=delta):
                self._add_delta(delta)
            case wire.BlockStop():
                self._finish(self.message.content[-1])
            case wire.MessageDelta():
                tier = self.message.usage.service_tier
                self.message.usage = msgspec.structs.replace(event.usage, service_tier=tier)
                self.message.stop_reason = event.delta.stop_reason
                self.message.stop_sequence = event.delta.stop_sequence
                self.message.context_management = event.context_management
                self.message.x_nimbos = event.x_nimbos

    def _add_delta(self, delta: wire.Delta) -> None:
        match delta:
            case (
                wire.TextDelta(text=piece)
                | wire.ThinkingDelta(thinking=piece)
                | wire.InputJsonDelta(partial_json=piece)
            ):
                self._pieces.append(piece)
            case wire.SignatureDelta(signature=signature):
                block = self.message.content[-1]
                assert isinstance(block, wire.ThinkingBlock)
                block.signature = signature

    def _finish(self, block: wire.Block) -> None:
        text = "".join(self._pieces)
        match block:
            case wire.TextBlock():
                block.text = text
            case wire.ThinkingBlock():
                block.thinking = text
            case wire.ToolUseBlock():
                block.input = msgspec.Raw(whole_object(text).encode())
