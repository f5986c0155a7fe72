"""The audit log: who changed what, before and after. Append-only, a chain of hashes, in the change's own transaction.

    hash(row) = SHA-256(hash(row before) + body)        body: canonical JSON, stored as the very bytes that were hashed

`audit_head` holds the end of the chain, so that missing last rows are found too. It is locked first by every change, so
changes of accounts happen one after another. Whoever can write the whole database can forge a whole chain; compare
`nimbos audit --verify`'s last hash with one that was noted elsewhere to be sure.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import msgspec
from sqlalchemy import bindparam, select, update

from nimbos.accounts.words import ORGANISATION_ID, Actor, Changed
from nimbos.db import Row, Statement, Transaction, insert, insert_ignored
from nimbos.db.tables.accounts import audit_head, audit_log
from nimbos.types import new_id

T = TypeVar("T")

_FIRST_HASH = bytes(32)

_BEGIN = insert_ignored(audit_head, key=("organisation",))
_LOCK = Statement(
    select(audit_head.c.seq, audit_head.c.hash)
    .where(audit_head.c.organisation == bindparam("organisation"))
    .with_for_update()
)
_MOVE = Statement(
    update(audit_head)
    .where(audit_head.c.organisation == bindparam("of"))
    .values(seq=bindparam("to_seq"), hash=bindparam("to_hash"))
)
_APPEND = insert(audit_log)
HEAD = Statement(
    select(audit_head.c.seq, audit_head.c.hash).where(audit_head.c.organisation == bindparam("organisation"))
)
ALL = Statement(select(audit_log).order_by(audit_log.c.seq))


class ActorBody(msgspec.Struct, frozen=True, kw_only=True):
    kind: str
    id: str
    user: str = ""
    email: str = ""
    service_account: str = ""
    address: str = ""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One change. `target`: the id of what was changed; `project`: the project it belongs to, or ""."""

    seq: int
    id: str
    at_ms: int
    action: str
    actor: ActorBody
    target: str
    project: str = ""
    before: Any = None
    after: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a walk along the chain found. `problem` None: every row is as it was written, and none is missing."""

    rows: int
    last_hash: str
    problem: str | None


def begin() -> Transaction[None]:
    """The chain's head, where there is none yet."""
    yield _BEGIN(organisation=ORGANISATION_ID, seq=0, hash=_FIRST_HASH)


def audited(actor: Actor, change: Transaction[Changed[T]], *, at_ms: int) -> Transaction[T]:
    """Runs a change and writes it down, both or neither."""
    (head,) = yield _LOCK(organisation=ORGANISATION_ID)
    changed = yield from change
    yield from _append(head, actor, changed, at_ms=at_ms)
    return changed.value


def _append(head: Row, actor: Actor, changed: Changed[T], *, at_ms: int) -> Transaction[None]:
    entry = Entry(
        seq=head["seq"] + 1,
        id=new_id("audit_log"),
        at_ms=at_ms,
        action=changed.action,
        actor=ActorBody(**dataclasses.asdict(actor)),
        target=changed.target,
        project=changed.project,
        before=_plain(changed.before),
        after=_plain(changed.after),
    )
    body = msgspec.json.encode(entry, order="sorted")
    digest = _hash(head["hash"], body)
    yield _APPEND(
        seq=entry.seq,
        id=entry.id,
        at_ms=entry.at_ms,
        action=entry.action,
        actor_id=entry.actor.id,
        actor_email=entry.actor.email,
        project_id=entry.project,
        target_id=entry.target,
        body=body,
        prev_hash=head["hash"],
        hash=digest,
    )
    yield _MOVE(of=ORGANISATION_ID, to_seq=entry.seq, to_hash=digest)


async def verify(rows: AsyncIterator[Row], head: Row | None) -> Checked:
    """`rows`: all of them in order; `head`: read before the rows, so that what is appended meanwhile is not missed."""
    count, last = 0, _FIRST_HASH
    at_head = _FIRST_HASH if head is None or head["seq"] == 0 else None
    async for row in rows:
        count += 1
        problem = _problem(row, count, last)
        if problem is not None:
            return Checked(rows=count, last_hash=last.hex(), problem=problem)
        last = bytes(row["hash"])
        if head is not None and row["seq"] == head["seq"]:
            at_head = last
    if head is None:
        problem = "The end of the chain is not there." if count else None
    elif at_head is None:
        problem = f"Rows {count + 1} to {head['seq']} are missing."
    else:
        problem = None if at_head == bytes(head["hash"]) else f"Row {head['seq']} is not the one that was written last."
    return Checked(rows=count, last_hash=last.hex(), problem=problem)


def entry_of(row: Row) -> Entry:
    return msgspec.json.decode(row["body"], type=Entry)


def _problem(row: Row, expected_seq: int, last: bytes) -> str | None:
    seq = row["seq"]
    if seq != expected_seq:
        return f"Row {expected_seq} is missing: row {seq} comes after row {expected_seq - 1}."
    body = bytes(row["body"])
    if bytes(row["prev_hash"]) != last or bytes(row["hash"]) != _hash(last, body):
        return f"Row {seq} was changed, or the one before it."
    try:
        entry = entry_of(row)
    except msgspec.DecodeError:
        return f"Row {seq} cannot be read."
    shown = (row["id"], row["at_ms"], row["action"], row["actor_id"], row["actor_email"])
    said = (entry.id, entry.at_ms, entry.action, entry.actor.id, entry.actor.email)
    targets = (row["project_id"], row["target_id"], seq)
    if shown != said or targets != (entry.project, entry.target, entry.seq):
        return f"Row {seq}: its columns do not say what was written."
    return None


def _hash(before: bytes, body: bytes) -> bytes:
    return hashlib.sha256(bytes(before) + body).digest()


def _plain(value: Any) -> Any:
    """A noun as JSON's own kinds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    return value
