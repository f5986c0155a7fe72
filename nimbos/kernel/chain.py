"""The log's bytes: bodies as canonical JSON, the hash that chains each event to the one before, versions. Pure.

What is hashed is what is stored: the row's columns and the body's very bytes, so a later program that knows more fields
still finds the same hash. Whoever can write to the database can also make a whole new chain: what is found is a row
that was changed, removed or put in, as long as somebody remembers a later hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias, get_args

import msgspec

from nimbos.db import Value
from nimbos.errors import PayloadTooLarge
from nimbos.kernel.events import Body, Event
from nimbos.kernel.faults import FromNewerVersion, Unreadable
from nimbos.kernel.words import Label
from nimbos.types import Usage

BODY_BYTES = 1 << 20  # what is larger belongs into a segment

Lift: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]

VERSIONS: dict[str, int] = {}  # of kinds whose body has changed since the first
LIFTS: dict[tuple[str, int], Lift] = {}  # (kind, version): makes a body of the next version of it


class Columns(Protocol):
    """A row of the log, from a database or still to be written."""

    def __getitem__(self, name: str, /) -> Any: ...


_HASHED = (
    "prev_hash",
    "pid",
    "seq",
    "epoch",
    "ts_ms",
    "kind",
    "cause",
    "call_id",
    "actor",
    "label",
    "blob",
    "usage",
    "version",
)
_CANONICAL = msgspec.json.Encoder(order="sorted")
_BODIES: msgspec.json.Decoder[Body] = msgspec.json.Decoder(Body)
KINDS = frozenset(body.__struct_config__.tag for body in get_args(Body))


def kind_of(body: Body) -> str:
    return str(body.__struct_config__.tag)


def version_of(kind: str) -> int:
    return VERSIONS.get(kind, 1)


def encoded(body: Body) -> bytes:
    """Raises: PayloadTooLarge."""
    try:
        content = _CANONICAL.encode(body)
    except UnicodeEncodeError:  # half a character, from a file's name or an error's message
        content = _CANONICAL.encode(_whole_characters(msgspec.to_builtins(body)))
    if len(content) > BODY_BYTES:
        raise PayloadTooLarge(have=len(content), limit=BODY_BYTES, what=f"event {kind_of(body)}")
    return content


def decoded(
    event: Event, *, versions: Mapping[str, int] = VERSIONS, lifts: Mapping[tuple[str, int], Lift] = LIFTS
) -> Body:
    """The body in its present form; that of an older version is lifted, one version at a time.

    Raises: FromNewerVersion, Unreadable.
    """
    newest = versions.get(event.kind, 1)
    if event.kind not in KINDS or event.version > newest:
        raise FromNewerVersion(event)
    try:
        if event.version == newest:
            body = _BODIES.decode(event.body)
        else:
            raw = msgspec.json.decode(event.body, type=dict[str, Any])
            for version in range(event.version, newest):
                raw = lifts[event.kind, version](raw)
            body = msgspec.convert(raw, type=Body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Unreadable(event, why=str(error)) from error
    if kind_of(body) != event.kind:
        raise Unreadable(event, why=f"its body is a {kind_of(body)}")
    return body


def link(columns: Columns) -> str:
    """The hash of a row. JSON has no line feeds of its own, so the body begins behind the first."""
    front = msgspec.json.encode([columns[name] for name in _HASHED])
    return hashlib.sha256(front + b"\n" + columns["body"]).hexdigest()


def columns_of(event: Event) -> dict[str, Value]:
    """As they are stored, and hashed."""
    return {
        "pid": event.pid,
        "seq": event.seq,
        "epoch": event.epoch,
        "ts_ms": event.ts_ms,
        "kind": event.kind,
        "cause": event.cause,
        "call_id": event.call_id,
        "actor": event.actor,
        "label": msgspec.json.encode(event.label).decode(),
        "body": event.body,
        "blob": event.blob,
        "usage": None if event.usage is None else msgspec.json.encode(event.usage).decode(),
        "version": event.version,
        "prev_hash": event.prev_hash,
        "hash": event.hash,
    }


def sealed(event: Event) -> Event:
    """The event with its hash."""
    return msgspec.structs.replace(event, hash=link(columns_of(event)))


def event_of(columns: Columns) -> Event:
    usage = columns["usage"]
    return Event(
        pid=columns["pid"],
        seq=columns["seq"],
        epoch=columns["epoch"],
        ts_ms=columns["ts_ms"],
        kind=columns["kind"],
        cause=columns["cause"],
        call_id=columns["call_id"],
        actor=columns["actor"],
        label=msgspec.json.decode(columns["label"], type=Label),
        body=bytes(columns["body"]),
        blob=columns["blob"],
        usage=None if usage is None else msgspec.json.decode(usage, type=Usage),
        version=columns["version"],
        prev_hash=columns["prev_hash"],
        hash=columns["hash"],
    )


def _whole_characters(value: Any) -> Any:
    """Half characters become question marks. Bodies are as deep as their structs."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {name: _whole_characters(child) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [_whole_characters(child) for child in value]
    return value
