"""A process while it runs, for people: its words as they come, its calls and what came of them, how it ended.

On a terminal all of it goes to standard output. Where that is a pipe or a file, it gets the result alone, when there is
one, and the rest goes to standard error: `answer=$(nimbos run …)` works.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from nimbos.cli.process_lines import amounts, message_of, safe, short, state_of, text_of
from nimbos.cli.remote import Told

_DIM, _THOUGHT, _BAD, _GOOD, _CALL = "dim", "dim italic", "red", "green", "cyan"
_CHARACTERS = 120
_CALL_MARK = "<tool_call>"


class Screen:
    """`show` each message of a stream in turn."""

    def __init__(self) -> None:
        self._own = sys.stdout.isatty()
        self.console = Console(stderr=not self._own, highlight=False)
        self._line_open = False  # something stands on the line that is being written
        self._speaking = ("", "")
        self._said: dict[str, str] = {}  # by ask: the text that stands on the screen
        self._logged: dict[str, str] = {}  # by ask: the text that its partial events held
        self._last_words = ""

    def show(self, told: Told) -> None:
        body = told.body
        if told.kind == "delta":
            self._words(body["ask_id"], body["channel"], body["text"])
        elif told.kind == "end":
            self._ended(body)
        elif told.kind in _SHOWN:
            _SHOWN[told.kind](self, body, body["body"])

    def line(self, text: str, style: str = "") -> None:
        self._close_line()
        self.console.print(Text(safe(text), style=style), soft_wrap=True)

    def _words(self, ask: str, channel: str, text: str) -> None:
        if not text:
            return
        if (ask, channel) != self._speaking:
            self._close_line()
        self._speaking = (ask, channel)
        if channel == "text":
            self._said[ask] = self._said.get(ask, "") + text
        style = _THOUGHT if channel == "thinking" else ""
        self.console.print(Text(safe(text), style=style), end="", soft_wrap=True)
        self._line_open = not text.endswith("\n")

    def _close_line(self) -> None:
        if self._line_open:
            self.console.print()
            self._line_open = False

    def _catch_up(self, ask: str, whole: str) -> None:
        """What an ask has said and was not seen, because somebody looks only now, or the server was another. White
        space around an answer is not part of it."""
        said, whole = self._said.get(ask, "").strip(), whole.strip()
        if whole.startswith(said):
            self._words(ask, "text", whole[len(said) :])
        elif not said.startswith(whole):
            self._close_line()
            self._said[ask] = ""
            self._words(ask, "text", whole)

    def _intended(self, event: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        """An answer that goes on where another ask was cut off."""
        before = body.get("continues")
        if before:
            for known in (self._said, self._logged):
                known[body["ask_id"]] = known.get(before, "")

    def _partial(self, event: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        ask = body["ask_id"]
        self._logged[ask] = self._logged.get(ask, "") + body.get("text", "")
        if _CALL_MARK not in self._logged[ask]:  # how a call is written is nobody's to read
            self._catch_up(ask, self._logged[ask])

    def _answered(self, event: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        self._last_words = message_of(event)
        if not body.get("calls"):  # where there are calls, what was streamed held them as well
            self._catch_up(body["ask_id"], self._last_words)
        self._close_line()

    def _called(self, event: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        if body["verb"] in ("ask", "generate"):
            return
        what = body["resource"] if body["verb"] == "tool" else f"{body['verb']} {body['resource']}".strip()
        arguments = text_of(event, "arguments")
        self.line(f"→ {what} {'' if arguments in (None, {}) else short(arguments, _CHARACTERS)}", _CALL)

    def _done(self, event: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        if body.get("withheld"):
            self.line("← withheld: this is a fork", _DIM)
            return
        result = text_of(event, "result")
        shown = f"{body['size_bytes']:,} bytes" if result is None else short(result, _CHARACTERS)
        self.line(f"← {shown}", _BAD if body.get("error") else _DIM)

    def _state(self, event: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        if body["to"] in ("waiting", "paused"):
            self.line(f"… {state_of({'state': body['to'], 'reason': body.get('reason', '')})}", _DIM)

    def _note(self, event: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        self.line(f"· {body['text']}", _DIM)

    def _failed(self, event: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        self.line(f"! {body['message']}", _BAD)

    def _denied(self, event: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        self.line(f"← {short(body['why'], _CHARACTERS)}", _BAD)

    def _spent(self, event: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        self.line(f"! {body['used']:,} of {body['limit']:,} {body['meter']} of the {body['owner']} are used", _BAD)

    def _ended(self, process: Mapping[str, Any]) -> None:
        self._close_line()
        result = process["result"]
        if result is not None:
            text = result if isinstance(result, str) else short(result, sys.maxsize)
            if not self._own:
                sys.stdout.write(safe(text) + "\n")
                sys.stdout.flush()
            elif text.strip() != self._last_words.strip():
                self.line(text)
        good = process["reason"] == "ok"
        words = "done" if good else f"{process['reason']}{': ' if process['error'] else ''}{process['error']}"
        self.line(f"{'✓' if good else '✗'} {words}  ·  {amounts(process['usage'])}", _GOOD if good else _BAD)


_SHOWN = {
    "model.intent": Screen._intended,
    "model.partial": Screen._partial,
    "model.done": Screen._answered,
    "model.failed": Screen._failed,
    "call.intent": Screen._called,
    "call.done": Screen._done,
    "call.denied": Screen._denied,
    "proc.state": Screen._state,
    "budget.exhausted": Screen._spent,
    "note": Screen._note,
}
