"""What a process asks, put to whoever sits at the terminal; and words of a command line as the answer to it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from nimbos.cli.process_lines import safe, short
from nimbos.cli.quantities import micros_of
from nimbos.errors import InvalidRequest, NimbosError

VERDICTS = ("happened", "did_not", "retry", "abandon")
_YES, _NO = ("approve", "yes", "y"), ("refuse", "no", "n")
_ARGUMENTS_CHARACTERS = 2_000
_METERS = {"seconds_ms": "seconds"}


def hint(pid: str, asked: Mapping[str, Any]) -> str:
    """The command that answers it."""
    ways = {
        "permission": f"nimbos answer {pid} approve|refuse",
        "in_doubt": f"nimbos answer {pid} {'|'.join(VERDICTS)}",
        "budget": f"nimbos answer {pid} --tokens N",
        "auth": f"nimbos resume {pid}, once the key is good again",
    }
    words = " | ".join(shlex.quote(safe(choice)) for choice in _only(asked)) or "'YOUR ANSWER'"
    return ways.get(asked["reason"], f"nimbos answer {pid} {words}")


def signal_of(asked: Mapping[str, Any], words: str, *, why: str = "", result: str | None = None) -> dict[str, Any]:
    """The fields of the signal that gives this answer. Raises: InvalidRequest saying what can be answered."""
    about = {"about": asked["about"]} if asked["about"] else {}
    reason, word = asked["reason"], words.strip().lower().replace("-", "_")
    if why and (reason != "permission" or word in _YES):
        raise InvalidRequest("--why is told with a refusal, and this is none.")
    if result is not None and (reason != "in_doubt" or word != "happened"):
        raise InvalidRequest("--result is what came of a call that happened, and this says nothing of one.")
    if reason == "permission":
        if word not in (*_YES, *_NO):
            raise InvalidRequest(f"{words[:60]!r} answers nothing here: say approve or refuse.")
        return {"signal": "answer", **about, "body": {"approve": word in _YES, "why": why}}
    if reason == "in_doubt":
        if word not in VERDICTS:
            raise InvalidRequest(f"{words[:60]!r} answers nothing here: say one of {', '.join(VERDICTS)}.")
        body: dict[str, Any] = {"verdict": word}
        if result is not None:
            body["result"] = value_of(result)
        return {"signal": "answer", **about, "body": body}
    if reason == "budget":
        raise InvalidRequest("It asks for budget: say how much more, with --tokens, --money, --seconds or --calls.")
    if reason == "auth":
        raise InvalidRequest("The key that it runs with is good no more. Mend the key, then `nimbos resume` it.")
    return {"signal": "answer", **about, "body": _chosen(words, _only(asked))}


def _only(asked: Mapping[str, Any]) -> list[str]:
    """The answers to a question that takes no others."""
    return asked["what"].get("choices") or []


def _chosen(words: str, choices: list[str]) -> str:
    """As the choice is written. Raises: InvalidRequest."""
    if not choices or words in choices:
        return words
    alike = {choice for choice in choices if choice.strip().casefold() == words.strip().casefold()}
    if len(alike) != 1:
        listed = ", ".join(repr(short(choice, 60)) for choice in choices)
        raise InvalidRequest(f"{words[:60]!r} is none of the answers that it takes: {listed}.")
    return alike.pop()


def value_of(text: str) -> Any:
    """A JSON object or array as one, anything else as words."""
    if text.lstrip()[:1] not in ("{", "["):
        return text
    try:
        return msgspec.json.decode(text.encode())
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return text


def describe(asked: Mapping[str, Any], console: Console) -> None:
    console.print(Text(f"? {safe(asked['question'])}", style="bold yellow"), soft_wrap=True)
    what = asked["what"]
    if asked["reason"] in ("permission", "in_doubt"):
        shown = short(what["arguments"], _ARGUMENTS_CHARACTERS)
        console.print(Text(f"  {safe(what['resource'])} {shown}", style="dim"), soft_wrap=True)
    arguments = what.get("arguments")
    choices = _only(asked) or (arguments.get("choices") if isinstance(arguments, dict) else None)
    if asked["reason"] == "input" and isinstance(choices, list):
        console.print(Text(f"  {', '.join(short(choice, 60) for choice in choices)}", style="dim"), soft_wrap=True)


def ask(asked: Mapping[str, Any], console: Console) -> dict[str, Any] | None:
    """Until there is an answer to send; None: this person has none now. Raises: KeyboardInterrupt."""
    describe(asked, console)
    if asked["reason"] == "auth":
        return None
    while True:
        try:
            words = console.input(_prompt(asked))
        except EOFError:
            return None
        if not words.strip():
            return None
        try:
            return _top_up(asked, words) if asked["reason"] == "budget" else signal_of(asked, words)
        except NimbosError as error:
            console.print(Text(error.message, style="red"), soft_wrap=True)


def _prompt(asked: Mapping[str, Any]) -> str:
    reason = asked["reason"]
    if reason == "permission":
        return "[bold]approve or refuse?[/bold] "
    if reason == "in_doubt":
        return "[bold]happened, did_not, retry or abandon?[/bold] "
    if reason == "budget":
        meter = asked["what"].get("meter", "tokens")
        return f"[bold]how much more ({'money' if meter == 'cost_micros' else _METERS.get(meter, meter)})?[/bold] "
    return "[bold cyan]›[/bold cyan] "


def _top_up(asked: Mapping[str, Any], words: str) -> dict[str, Any]:
    """Raises: InvalidRequest."""
    meter = asked["what"].get("meter", "tokens")
    if meter == "cost_micros":
        return {"signal": "top_up", "body": {"cost_micros": micros_of(words)}}
    digits = words.strip().replace(",", "").replace("_", "")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 15):
        raise InvalidRequest(f"{words[:60]!r} is no whole number.")
    return {"signal": "top_up", "body": {_METERS.get(meter, meter): int(digits)}}
