"""Events of a process in words: a line for each, as `nimbos logs` shows them. Pure.

What a process, a model or a tool wrote is shown without control characters: it must not steer the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from nimbos.cli.quantities import money_of

LINE_CHARACTERS = 160
_UNITS = {"tokens": "tokens", "calls": "calls", "seconds_ms": "s of work", "cost_micros": "of money"}


def safe(text: str) -> str:
    """Keeps line breaks and tabs."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())


def short(value: Any, characters: int = LINE_CHARACTERS) -> str:
    """On one line: words as they are, anything else as JSON."""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    line = " ".join(safe(text).split())
    return line if len(line) <= characters else f"{line[: characters - 1]}…"


def text_of(event: Mapping[str, Any], name: str) -> Any:
    """What the segment that the body names so holds; None where it is too large to be told, or there is none."""
    return event["texts"].get(event["body"].get(name))


def quantity(meter: str, amount: int) -> str:
    """In the unit that people use for it: money and seconds have decimals."""
    if meter == "cost_micros":
        return money_of(amount)
    return f"{amount / 1000:,.1f}" if meter == "seconds_ms" else f"{amount:,}"


def amounts(used: Mapping[str, int]) -> str:
    """By meter, in words."""
    known = sorted(used, key=lambda meter: [*_UNITS, meter].index(meter))
    words = [f"{quantity(meter, used[meter])} {_UNITS.get(meter, meter)}" for meter in known if used[meter]]
    return " · ".join(words) or "nothing used"


def moment(at_ms: int) -> str:
    """In UTC, to the millisecond."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00")


def state_of(body: Mapping[str, Any]) -> str:
    """`waiting (child)`; a plain state where there is no more to it."""
    return f"{body['state']} ({body['reason']})" if body.get("reason") else str(body["state"])


def message_of(event: Mapping[str, Any]) -> str:
    """What a finished answer says."""
    message = text_of(event, "message")
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, str) else ""


def printed_of(event: Mapping[str, Any]) -> list[str]:
    """The lines that a tool's program printed while the call was under way."""
    printed = text_of(event, "printed") if event["kind"] == "call.done" else None
    return safe(printed).splitlines() if isinstance(printed, str) else []


def line_of(event: Mapping[str, Any]) -> str:
    """What the event says, without its number, time and kind."""
    told = _LINES.get(event["kind"])
    return short(told(event, event["body"]) if told is not None else event["body"])


Body = Mapping[str, Any]


def _created(event: Body, body: Body) -> str:
    whose = f", child of {body['parent']}" if body.get("parent") else ""
    return f"{body['name']} with {body['model']}{whose}: {short(text_of(event, 'input') or '')}"


def _state(event: Body, body: Body) -> str:
    due = f" until {moment(body['due_ms'])}" if body.get("due_ms") else ""
    about = f", about {', '.join(body['about'])}" if body.get("about") else ""
    return f"{state_of({'state': body['to'], 'reason': body.get('reason', '')})}{due}{about}"


def _exited(event: Body, body: Body) -> str:
    result = text_of(event, "result")
    words = [body["reason"], body.get("error", ""), "" if result is None else short(result)]
    return ": ".join(filter(None, words))


def _received(event: Body, body: Body) -> str:
    content = text_of(event, "body")
    about = f" about {body['about']}" if body.get("about") else ""
    return f"{body['signal']}{about} from {body['source']}{'' if content is None else f': {short(content)}'}"


def _intended(event: Body, body: Body) -> str:
    on = ", goes on" if body.get("continues") else ""
    limit = f", at most {body['limit_tokens']:,} tokens" if body.get("limit_tokens") else ""
    return f"{body.get('purpose', 'turn')}: asks {body['model']}{on}{limit}"


def _answered(event: Body, body: Body) -> str:
    calls = ", ".join(f"{call['name']}({call['arguments']})" for call in body.get("calls", ()))
    return " ".join(filter(None, (message_of(event), f"calls {calls}" if calls else "", f"[{body['finish']}]")))


def _called(event: Body, body: Body) -> str:
    arguments = text_of(event, "arguments")
    shown = short(arguments) if arguments not in (None, {}) else ""
    return f"{body['verb']} {body['resource']} {shown} ({body['effect']})".replace("  ", " ")


def _done(event: Body, body: Body) -> str:
    how = "withheld, as this is a fork" if body.get("withheld") else body.get("error", "")
    result = text_of(event, "result")
    shown = f"{body['size_bytes']:,} bytes" if result is None else short(result)
    return f"{how}: {shown}" if how else shown


def _context(event: Body, body: Body) -> str:
    added = [f"+{one['kind']}" for one in body.get("add", ())]
    changed = [f"{name} {len(body[name])}" for name in ("evict", "pin", "unpin") if body.get(name)]
    return " ".join([*added, *changed])


_LINES: Mapping[str, Callable[[Body, Body], str]] = {
    "proc.created": _created,
    "proc.forked": lambda event, body: f"of {body['of']} at {body['at_seq']}",
    "proc.state": _state,
    "proc.exited": _exited,
    "signal.received": _received,
    "signal.consumed": lambda event, body: f"{body['received']} by {body.get('call_id') or 'the kernel'}",
    "model.intent": _intended,
    "model.partial": lambda event, body: f"{len(body['ids'])} tokens: {body.get('text') or body.get('thinking', '')}",
    "model.done": _answered,
    "model.failed": lambda event, body: f"{body['code']}: {body['message']}",
    "call.intent": _called,
    "call.approved": lambda event, body: f"by {body['by']}",
    "call.denied": lambda event, body: f"by {body['by']}: {body['why']}",
    "call.started": lambda event, body: f"attempt {body['attempt']}",
    "call.done": _done,
    "call.unknown": lambda event, body: "nobody knows whether it happened",
    "call.resolved": lambda event, body: f"{body['verdict']}, says {body['by']}",
    "ctx.changed": _context,
    "budget.reserved": lambda event, body: f"{body['amount']:,} {body['meter']}",
    "budget.settled": lambda event, body: amounts(body["used"]),
    "budget.exhausted": lambda event, body: (
        f"{body['used']:,} of {body['limit']:,} {body['meter']} of the {body['owner']}"
    ),
    "note": lambda event, body: f"{body['about']}: {body['text']}",
}
