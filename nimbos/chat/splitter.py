"""Splits one branch's answer into content, reasoning and tool calls while it streams.
Knows nothing of tokens or grammars; the borders between chunks never change what comes out.

    text ──"<tool_call>" or {"name"…──▶ head ──{"name": "x", "arguments": ──▶ arguments ──value ends──▶ tail
     ▲                                   │ no call after all                                             │
     └───────────────────────────────────┴──────────────────────"}", then "</tool_call>"─────────────────┘

Held back are only: the beginning of a tag, the head of a call, and white space that a call might follow (it is dropped
then). What turns out not to be a call is given out as content, so a broken call is text and never an error.
"""

from __future__ import annotations

from enum import StrEnum

from nimbos.chat.call_grammar import CLOSE_TAG, OPEN_TAG
from nimbos.chat.call_text import JsonValue, Open, read_head
from nimbos.chat.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from nimbos.chat.family import CallForm
from nimbos.chat.plan import Plan
from nimbos.types import Channel, TokenChunk, new_id

_HELD_SPACE = 16  # characters of white space that wait for what follows
_CLEARLY_A_TAG = len("<tool_")  # an answer cut here was not meant as text


class _State(StrEnum):
    TEXT = "text"
    HEAD = "head"
    ARGUMENTS = "arguments"
    TAIL = "tail"


class Splitter:
    """One for each branch. Call `finish` once after the last chunk."""

    def __init__(self, plan: Plan) -> None:
        self._use = plan.tools
        self._names = plan.tools.names if plan.tools else frozenset()
        self._tags = plan.tools is not None and plan.tools.form is CallForm.HERMES
        self._trim = plan.thinking is not None  # the line breaks after a closed block are not the answer's
        self._state = _State.TEXT
        self._held = ""
        self._fresh = True  # nothing but white space so far
        self._thought = False
        self._opening = ""  # white space and tag before the head: given back if it is no call
        self._tagged = False
        self._value = JsonValue()
        self._calls = 0

    def feed(self, chunk: TokenChunk) -> list[Delta]:
        if chunk.channel is Channel.THINKING:
            return self._think(chunk.text)
        out: list[Delta] = []
        if self._use is None:
            self._content(out, chunk.text)
            return out
        self._held += chunk.text
        while self._held and self._step(out):
            pass
        return out

    def finish(self) -> list[Delta]:
        """What was held back. A call cut inside its name is dropped with its tag; cut later, it stays a call."""
        out: list[Delta] = []
        held, self._held = self._held, ""
        if self._state is _State.HEAD:
            head = read_head(held)
            name = head.name if isinstance(head, Open) else None
            if name is not None and self._callable(name):
                self._begin_call(out, name)
            elif not self._tagged:
                self._content(out, self._opening + held)
        elif self._state is _State.TEXT:
            partial = self._partial_tag(held)
            words = held
            if partial >= _CLEARLY_A_TAG:
                words = held[: len(held) - partial]
                words = words[: len(words) - _space_at_end(words)]
            if words.strip() or not self._calls:
                self._content(out, words)
        self._state = _State.TEXT
        return out

    def _think(self, text: str) -> list[Delta]:
        text = text if self._thought else text.lstrip("\n")
        if not text:
            return []
        self._thought = True
        return [ReasoningDelta(text)]

    def _step(self, out: list[Delta]) -> bool:
        """Does one thing with what is held; False when more text is needed."""
        match self._state:
            case _State.TEXT:
                return self._read_text(out)
            case _State.HEAD:
                return self._read_head(out)
            case _State.ARGUMENTS:
                return self._read_arguments(out)
            case _State.TAIL:
                return self._read_tail()

    def _read_text(self, out: list[Delta]) -> bool:
        at, self._tagged = self._find_call()
        if at < 0:
            partial = self._partial_tag(self._held)
            keep = partial + _space_at_end(self._held[: len(self._held) - partial])
            ready = len(self._held) - keep
            self._content(out, self._held[:ready])
            self._held = self._held[ready:]
            return False
        start = at - _space_at_end(self._held[:at])
        end = at + (len(OPEN_TAG) if self._tagged else 0)
        self._content(out, self._held[:start])
        self._opening, self._held = self._held[start:end], self._held[end:]
        self._state = _State.HEAD
        return True

    def _find_call(self) -> tuple[int, bool]:
        """Where in the held text a call may begin, and whether with its tag; -1 for nowhere."""
        assert self._use is not None
        tag = self._held.find(OPEN_TAG) if self._tags else -1
        brace = self._held.find("{")
        if not (self._tags and self._use.hidden_tag):
            alone = self._use.bare and self._fresh and not self._held[: max(brace, 0)].strip()
            brace = brace if alone else -1
        if brace >= 0 and (tag < 0 or brace < tag):
            return brace, False
        return tag, tag >= 0

    def _read_head(self, out: list[Delta]) -> bool:
        head = read_head(self._held)
        if isinstance(head, Open) and (head.name is None or self._callable(head.name)):
            return False
        if head is None or isinstance(head, Open) or not self._callable(head.name):
            first = 0 if self._tagged else 1  # the brace itself, or it would be found again
            self._content(out, self._opening + self._held[:first])
            self._held = self._held[first:]
            self._state = _State.TEXT
            return True
        self._begin_call(out, head.name)
        self._held = self._held[head.length :]
        if head.empty:
            out.append(ToolCallDelta(index=self._calls - 1, arguments="{}"))
        self._state = _State.TAIL if head.empty else _State.ARGUMENTS
        return True

    def _read_arguments(self, out: list[Delta]) -> bool:
        end = self._value.feed(self._held)
        piece = self._held if end is None else self._held[:end]
        if piece:
            out.append(ToolCallDelta(index=self._calls - 1, arguments=piece))
        self._held = self._held[len(piece) :]
        if end is not None:
            self._state = _State.TAIL
        return True

    def _read_tail(self) -> bool:
        """Drops the closing brace and tag; anything else is text again."""
        self._held = self._held.lstrip()
        closing = CLOSE_TAG if self._tagged else ""
        if self._held.startswith("}") and self._opening != "}":
            self._opening = "}"  # seen
            self._held = self._held[1:]
            self._state = _State.TAIL if closing else _State.TEXT
        elif closing and self._held.startswith(closing):
            self._held = self._held[len(closing) :]
            self._state = _State.TEXT
        elif closing.startswith(self._held):
            return False
        else:
            self._state = _State.TEXT
        return True

    def _callable(self, name: str) -> bool:
        """Without a tag only a known name makes a call of what may be any JSON."""
        return self._tagged or name in self._names

    def _begin_call(self, out: list[Delta], name: str) -> None:
        out.append(ToolCallDelta(index=self._calls, id=new_id("call"), name=name))
        self._calls += 1
        self._fresh = False
        self._value = JsonValue()

    def _content(self, out: list[Delta], text: str) -> None:
        if self._trim:
            text = text.lstrip("\n")
        if text:
            self._trim = False
            self._fresh = self._fresh and text.isspace()
            out.append(ContentDelta(text))

    def _partial_tag(self, text: str) -> int:
        """How many characters at the end may be the beginning of a tag."""
        if not self._tags:
            return 0
        return next((n for n in range(min(len(OPEN_TAG) - 1, len(text)), 0, -1) if OPEN_TAG.startswith(text[-n:])), 0)


def _space_at_end(text: str) -> int:
    return min(len(text) - len(text.rstrip()), _HELD_SPACE)
