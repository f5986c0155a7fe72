"""An answer's events in the words of the Responses API; the response itself is what they add up to.

    created ─ (queued) ─ in_progress ─┬─ output_item.added ─ … ─ output_item.done ─┬─ completed, incomplete or failed
                                      └────────── for each item, in turn ──────────┘

The same answer gives the same events, numbers and ids: an answer that is computed again can be read on where a reader
had come to. Knows nothing of storage or of HTTP.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET

from nimbos.api import openai_wire as wire
from nimbos.api.dialogue import Ended, Opened, Question, Said, Told
from nimbos.api.dialogue import Event as Happening
from nimbos.api.responses_items import Item, item_id, seal
from nimbos.api.responses_wire import ErrorBody, Event, Extension, IncompleteDetails, Response, UsageBody
from nimbos.chat import ContentDelta, ReasoningDelta, ToolCallDelta
from nimbos.errors import NimbosError
from nimbos.types import ChosenLogprob, FinishReason


@dataclass(slots=True, eq=False)
class _Open:
    """The item that is being said."""

    kind: str
    index: int
    item: Item
    call: int = -1  # which of the model's calls
    text: list[str] = field(default_factory=list)
    logprobs: list[wire.ChosenBody] = field(default_factory=list)


class Teller:
    """`summary`: thinking is given as the item's summary, because the client asked for one. `sealed`: and once more in
    `encrypted_content`. `logprobs`: parts of text have them."""

    def __init__(self, response: Response, *, summary: bool = False, sealed: bool = False) -> None:
        self.response = response
        self.begun = False
        self._summary = summary
        self._sealed = sealed
        self._number = 0
        self._open: _Open | None = None
        self._reason = FinishReason.STOP

    def begin(self) -> list[Event]:
        """Once. A background response was queued before."""
        if self.begun:
            return []
        self.begun = True
        events = [self._whole("response.created")]
        if self.response.background:
            events.append(self._whole("response.queued"))
        return events

    def add(self, happening: Happening, question: Question) -> list[Event]:
        match happening:
            case Opened():
                self.response.status = "in_progress"
                return [self._whole("response.in_progress")]
            case Said():
                return self._say(happening)
            case Ended():
                return self._end(happening)
            case Told():
                return [self._finish(happening, question)]

    def fail(self, error: NimbosError) -> Event:
        """The response as far as it came; an item that was open is left out."""
        self._open = None
        self.response.status = "failed"
        self.response.error = ErrorBody.of(error)
        return self._whole("response.failed")

    def _say(self, said: Said) -> list[Event]:
        delta = said.delta
        if isinstance(delta, ReasoningDelta):
            return [*self._switch("reasoning"), *self._piece(delta.text)]
        if isinstance(delta, ContentDelta):
            return [*self._switch("message"), *self._piece(delta.text, said.logprobs)]
        events = self._switch("function_call", delta)
        return [*events, *self._piece(delta.arguments)] if delta.arguments else events

    def _switch(self, kind: str, call: ToolCallDelta | None = None) -> list[Event]:
        """Goes on with the open item if it is of this kind, else closes it and opens another."""
        number = call.index if call is not None else -1
        if self._open is not None and (self._open.kind, self._open.call) == (kind, number):
            return []
        events = self._close()
        index = len(self.response.output)
        item: Item = {"id": item_id(self.response.id, index, kind), "type": kind, "status": "in_progress"}
        if call is not None:
            call_id = f"call_{self.response.id.removeprefix('resp_')}{index:04x}"
            item |= {"call_id": call_id, "name": call.name or "", "arguments": ""}
        elif kind == "message":
            item |= {"role": "assistant", "content": []}
        else:
            item |= {"summary": []}
        self._open = _Open(kind, index, item, call=number)
        events.append(self._event("response.output_item.added", output_index=index, item=dict(item)))
        part = _part(kind, summary=self._summary)
        if part is not None:
            events.append(self._of_part("part.added", part=part))
        return events

    def _piece(self, text: str, logprobs: tuple[ChosenLogprob, ...] = ()) -> list[Event]:
        assert self._open is not None
        self._open.text.append(text)
        if self._open.kind == "message":
            bodies = [wire.ChosenBody.of(one) for one in logprobs]
            self._open.logprobs += bodies
            return [self._of_part("delta", delta=text, logprobs=bodies)]
        return [self._of_part("delta", delta=text)]

    def _close(self, status: str = "completed") -> list[Event]:
        """The item's ends, inner to outer; then it belongs to the response."""
        done = self._open
        if done is None:
            return []
        text = "".join(done.text)
        item = self._said(done, text, status)
        if done.kind == "function_call":
            events = [self._of_part("done", arguments=text)]
        else:
            extra: dict[str, Any] = {"logprobs": done.logprobs} if done.kind == "message" else {}
            events = [self._of_part("done", text=text, **extra)]
            events.append(self._of_part("part.done", part=(item.get("content") or item["summary"])[0]))
        events.append(self._event("response.output_item.done", output_index=done.index, item=item))
        self.response.output = [*self.response.output, item]
        self._open = None
        return events

    def _said(self, done: _Open, text: str, status: str) -> Item:
        item = {**done.item, "status": status}
        if done.kind == "function_call":
            return {**item, "arguments": text}
        if done.kind == "message":
            part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": []}
            part["logprobs"] = msgspec.to_builtins(done.logprobs)
            return {**item, "content": [part]}
        if self._summary:
            item["summary"] = [{"type": "summary_text", "text": text}]
        else:
            item["content"] = [{"type": "reasoning_text", "text": text}]
        return {**item, "encrypted_content": seal(text)} if self._sealed else item

    def _end(self, ended: Ended) -> list[Event]:
        self._reason = ended.final.reason
        wordless = not self.response.output and self._open is None  # which is still an answer
        events = self._switch("message") if wordless else []
        if self._open is not None and self._open.kind == "message":
            self._open.logprobs += [wire.ChosenBody.of(one) for one in ended.logprobs]
        cut = self._reason is FinishReason.LENGTH
        return [*events, *self._close("incomplete" if cut else "completed")]

    def _finish(self, told: Told, question: Question) -> Event:
        response = self.response
        extension = response.x_nimbos if isinstance(response.x_nimbos, Extension) else Extension()
        response.x_nimbos = msgspec.structs.replace(
            extension,
            receipt=wire.receipt([question.ask], list(told.finals), question.card),
            stop="budget" if any(final.budget_ended for final in told.finals) else UNSET,
        )
        response.usage = UsageBody.of(told.usage)
        response.completed_at = int(time.time())
        if self._reason is FinishReason.LENGTH:
            response.status = "incomplete"
            response.incomplete_details = IncompleteDetails("max_output_tokens")
        else:
            response.status = "completed"
        return self._whole(f"response.{response.status}")

    def _of_part(self, what: str, **fields: Any) -> Event:
        """An event inside the open item; its name depends on what the item is."""
        assert self._open is not None
        place: dict[str, Any] = {"item_id": self._open.item["id"], "output_index": self._open.index}
        thoughts = "reasoning_summary_text" if self._summary else "reasoning_text"
        stem = {"message": "output_text", "function_call": "function_call_arguments"}.get(self._open.kind, thoughts)
        if what.startswith("part."):
            stem = "reasoning_summary" if stem == "reasoning_summary_text" else "content"
            what = f"_{what}"
        else:
            what = f".{what}"
        if self._open.kind != "function_call":
            place["summary_index" if stem.startswith("reasoning_summary") else "content_index"] = 0
        return self._event(f"response.{stem}{what}", **place, **fields)

    def _whole(self, kind: str) -> Event:
        return self._event(kind, response=msgspec.structs.replace(self.response))

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}


def _part(kind: str, *, summary: bool) -> dict[str, Any] | None:
    """A part before its first word."""
    if kind == "message":
        return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    if kind == "reasoning":
        return {"type": "summary_text" if summary else "reasoning_text", "text": ""}
    return None
