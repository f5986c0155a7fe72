"""An answer in Ollama's lines, one by one or folded into one; both are made of the same pieces."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET

from nimbos.api import ollama_wire as told
from nimbos.api import openai_wire as wire
from nimbos.api.dialogue import Ended, Event, Opened, Question, Said, Told
from nimbos.chat import ContentDelta, ReasoningDelta, ToolCallDelta
from nimbos.types import ChosenLogprob


@dataclass(slots=True, eq=False)
class _Call:
    """A call whose arguments are still being written; clients want them whole, as an object."""

    id: str
    name: str
    written: str = ""

    def arguments(self) -> dict[str, Any] | None:
        """None for what is no object: the answer was cut off within it."""
        try:
            return msgspec.json.decode(self.written or "{}", type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            return None


@dataclass(slots=True, eq=False, kw_only=True)
class Telling:
    """`chat`: as `/api/chat` writes it, else `/api/generate`. `model`: as the client wrote it."""

    question: Question
    model: str
    chat: bool
    clock: told.Clock
    _open: _Call | None = None
    _calls: int = 0
    _last: Ended | None = field(default=None)

    async def lines(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[told.Line, None]:
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Opened):
                    self.clock.open()
                elif isinstance(event, Said):
                    for line in self._said(event):
                        yield line
                elif isinstance(event, Ended):
                    self._last = event
                    for line in self._close():
                        yield line
                else:
                    yield self._ending(event)

    async def whole(self, events: AsyncGenerator[Event, None]) -> told.Line:
        content: list[str] = []
        thinking: list[str] = []
        calls: list[told.ToolCall] = []
        logprobs: list[told.TokenLogprob] = []
        last: told.Line | None = None
        async with aclosing(self.lines(events)) as lines:
            async for line in lines:
                said = line.message or None
                content.append((said.content if said else line.response) or "")
                thinking.append((said.thinking if said else line.thinking) or "")
                calls += (said.tool_calls if said else UNSET) or []
                logprobs += line.logprobs or []
                last = line
        assert last is not None
        whole = self._line("".join(content), thinking="".join(thinking), calls=calls)
        return msgspec.structs.replace(
            last,
            message=whole.message,
            response=whole.response,
            thinking=whole.thinking,
            logprobs=logprobs or UNSET,
        )

    def _said(self, said: Said) -> list[told.Line]:
        delta = said.delta
        if isinstance(delta, ToolCallDelta):
            return self._called(delta)
        if isinstance(delta, ReasoningDelta):
            return [self._line("", thinking=delta.text)]
        assert isinstance(delta, ContentDelta)
        return [*self._close(), self._line(delta.text, logprobs=said.logprobs)]

    def _called(self, delta: ToolCallDelta) -> list[told.Line]:
        closed = self._close() if delta.id is not None else []
        if delta.id is not None:
            self._open = _Call(delta.id, delta.name or "")
        assert self._open is not None
        self._open.written += delta.arguments
        return closed

    def _close(self) -> list[told.Line]:
        """The call that was open; as text where it was cut off, so that nobody acts on half of it."""
        call, self._open = self._open, None
        if call is None:
            return []
        arguments = call.arguments()
        if arguments is None:
            return [self._line(f"{call.name}({call.written}")]
        function = told.Function(index=self._calls, name=call.name, arguments=arguments)
        self._calls += 1
        return [self._line("", calls=[told.ToolCall(id=call.id, function=function)])]

    def _line(
        self,
        content: str,
        *,
        thinking: str = "",
        calls: list[told.ToolCall] | None = None,
        logprobs: Sequence[ChosenLogprob] = (),
    ) -> told.Line:
        line = told.Line(model=self.model, created_at=told.now())
        if logprobs:
            line.logprobs = [told.TokenLogprob.of(one) for one in logprobs]
        if self.chat:
            line.message = told.Message(content=content, thinking=thinking or UNSET, tool_calls=calls or UNSET)
        else:
            line.response, line.thinking = content, thinking or UNSET
        return line

    def _ending(self, event: Told) -> told.Line:
        assert self._last is not None
        ended, clock = time.perf_counter_ns(), self.clock
        return msgspec.structs.replace(
            self._line("", logprobs=self._last.logprobs),
            done=True,
            done_reason=self._last.final.reason.value,
            total_duration=ended - clock.came,
            load_duration=clock.loaded - clock.came,
            prompt_eval_count=event.usage.input,
            prompt_eval_duration=clock.opened - clock.loaded,
            eval_count=event.usage.output,
            eval_duration=ended - clock.opened,
            x_nimbos=wire.receipt([self.question.ask], list(event.finals), self.question.card),
        )
