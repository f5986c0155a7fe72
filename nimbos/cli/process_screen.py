"""A process while it runs, for people: its words as they come, its calls and what came of them, how it ended.

On a terminal all of it goes to standard output. Where that is a pipe or a file, it gets the result alone, when there is
one, and the rest goes to standard error: `answer=$(nimbos run …)` works.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from nimbos.cli.process_lines import amounts, message_of, printed_of, safe, short, state_of, text_of
from nimbos.cli.remote import Told

_DIM, _THOUGHT, _BAD, _GOOD, _CALL = "dim", "dim italic", "red", "green", "cyan"
_CHARACTERS = 120
_PRINTED_LINES = 12  # of a call; `nimbos logs` has all that is kept
_UNTOLD = ("ask", "generate", "receive", "wait", "sleep")  # what they wait for is told by the state
_CALL_MARK = "<tool_call>"


class Screen:
    """`show` each message of a stream in turn, and `ended` behind them."""

    def __init__(self) -> None:
        self._own = sys.stdout.isatty()
        self.console = Console(stderr=not self._own, highlight=False)
        self._line_open = False  # something stands on the line that is being written
        self._speaking = ("", "")
        self._said: dict[str, str] = {}  # by ask: the text that stands on the screen
        self._reached: dict[str, int] = {}  # by ask: how many characters of its text that is
        self._logged: dict[str, str] = {}  # by ask: the text that its partial events held
        self._over: set[str] = set()  # asks whose whole answer was told: what of it still comes was seen
        self._verbs: dict[str, str] = {}  # of calls that have no outcome
        self._last_words = ""

    def show(self, told: Told) -> None:
        body = told.body
        if told.kind == "delta":
            self._heard(body["ask_id"], body["channel"], body["text"], at=body["at"])
        elif told.kind in _SHOWN:
            _SHOWN[told.kind](self, body, body["body"])

    def line(self, text: str, style: str = "") -> None:
        self._close_line()
        self.console.print(Text(safe(text), style=style), soft_wrap=True)

    def _heard(self, ask: str, channel: str, text: str, *, at: int) -> None:
        """What is behind a gap, because the beginning was said to nobody, comes with the rest of it from the log. The
        log may be faster than the words, also with the end."""
        if ask in self._over:
            return
        if channel == "text":
            reached = self._reached.get(ask, 0)
            if at > reached:
                return
            text = text[reached - at :]
            self._reached[ask] = reached + len(text)
        self._words(ask, channel, text)

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
            self._reached[body["ask_id"]] = self._reached.get(before, 0)

    def _partial(self, event: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        ask = body["ask_id"]
        self._logged[ask] = self._logged.get(ask, "") + body.get("text", "")
        if _CALL_MARK not in self._logged[ask]:  # how a call is written is nobody's to read
            said, logged = self._said.get(ask, ""), self._logged[ask]
            if logged.startswith(said):
                self._words(ask, "text", logged[len(said) :])
            else:
                self._catch_up(ask, logged)
            self._reached[ask] = max(self._reached.get(ask, 0), len(self._logged[ask]))

    def _answered(self, event: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        self._last_words = message_of(event)
        self._over.add(body["ask_id"])
        if not body.get("calls"):  # where there are calls, what was streamed held them as well
            self._catch_up(body["ask_id"], self._last_words)
        self._close_line()

    def _called(self, event: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        verb, arguments = body["verb"], text_of(event, "arguments")
        self._verbs[body["call_id"]] = verb
        if verb in _UNTOLD:
            return
        if verb == "spawn" and isinstance(arguments, dict):
            arguments = arguments.get("input", "")
        name = body["resource"] if verb == "tool" else f"{verb} {body['resource']}".strip()
        self.line(f"→ {name} {'' if arguments in (None, {}) else short(arguments, _CHARACTERS)}", _CALL)

    def _done(self, event: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        verb, result = self._verbs.pop(body["call_id"], ""), text_of(event, "result")
        for line in printed_of(event)[-_PRINTED_LINES:]:
            self.line(f"│ {short(line, _CHARACTERS)}", _DIM)
        if body.get("withheld"):
            self.line("← withheld: this is a fork", _DIM)
        elif body.get("error"):
            self.line(f"← {short(result if result is not None else body['error'], _CHARACTERS)}", _BAD)
        elif verb == "wait" and isinstance(result, dict):
            for child in result.get("exited", {}).values():
                self.line(f"← {child['reason']}: {short(child['result'], _CHARACTERS)}", _DIM)
            for asked in result.get("asking", {}).values():
                self.line(f"← {short(asked, _CHARACTERS)}", _BAD)
        elif verb not in (*_UNTOLD, "spawn"):
            self.line(f"← {_size(body) if result is None else short(result, _CHARACTERS)}", _DIM)

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

    def ended(self, process: Mapping[str, Any], used: Mapping[str, int]) -> None:
        """`used`: with all its children."""
        self._close_line()
        result = process["result"]
        if result is not None and not self._own:
            sys.stdout.write(safe(_written(result, indent=0)) + "\n")
            sys.stdout.flush()
        elif result is not None and not (isinstance(result, str) and result.strip() == self._last_words.strip()):
            self.line(_written(result, indent=2))
        good = process["reason"] == "ok"
        words = "done" if good else f"{process['reason']}{': ' if process['error'] else ''}{process['error']}"
        self.line(f"{'✓' if good else '✗'} {words}  ·  {amounts(used)}", _GOOD if good else _BAD)


def _written(result: Any, *, indent: int) -> str:
    if isinstance(result, str):
        return result
    return msgspec.json.format(msgspec.json.encode(result), indent=indent).decode()


def _size(body: Mapping[str, Any]) -> str:
    return f"{body['size_bytes']:,} bytes"


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
