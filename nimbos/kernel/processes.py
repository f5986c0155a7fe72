"""Heads: what the fold of a process's log says, as a row, so that lists and whoever stands outside need no log.

A head changes only in the transaction that appends to its log (`log.py`): `after` is the one function that says how an
event changes it. Whoever will append, wake or signal locks the head first (`locked_head`), children after parents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace
from sqlalchemy import Text, bindparam, select, update

from nimbos.db import Row, Statement, Transaction, Value, insert
from nimbos.db.tables.processes import processes
from nimbos.errors import NotFound
from nimbos.kernel.events import Body, BudgetSettled, Note, ProcExited, ProcState
from nimbos.kernel.words import Reason, State
from nimbos.types import Account, AskClass

_KEPT = frozenset({State.READY, State.RUNNING, State.PAUSED})  # in which the last question is still known


@dataclass(frozen=True, slots=True, kw_only=True)
class NewHead:
    """What a head has from its birth. `account`: who pays, and with which key. `key`: the same one spawns no second
    process in the account. `forked_hash`: of the event `forked_seq` of `forked_from`, to which its log is chained."""

    account: Account
    program: str
    name: str
    model: str
    ask_class: AskClass
    parent: str | None = None
    depth: int = 0
    detached: bool = False
    withheld: bool = False
    key: str = ""
    forked_from: str | None = None
    forked_seq: int = 0
    forked_hash: str = ""


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """`about`: what it waits for, or asked last, with the event `asked_seq`. `used`: what its asks and calls used, by
    meter. `mail` signals were ever put into its mailbox, the first `taken` of which it has received."""

    pid: str
    account: str
    spawner: Account
    key: str
    program: str
    name: str
    model: str
    ask_class: AskClass
    parent: str | None
    depth: int
    detached: bool
    withheld: bool
    forked_from: str | None
    forked_seq: int
    state: State
    reason: Reason
    due_ms: int | None
    about: tuple[str, ...]
    asked_seq: int
    epoch: int
    seq: int
    hash: str
    result: str | None
    error: str
    used: Mapping[str, int]
    mail: int
    taken: int
    created_ms: int
    changed_ms: int

    @property
    def parked(self) -> bool:
        """Nothing runs it, and a signal may make it ready."""
        return self.state in (State.WAITING, State.ASKING, State.PAUSED)

    @property
    def asked(self) -> str:
        """What an answer is for that does not say so: the one thing that it asked last; "" where that is not one."""
        return self.about[0] if self.asked_seq and len(self.about) == 1 else ""


def first_head(pid: str, new: NewHead, now_ms: int) -> Head:
    """Before its first event; `after` makes the rest."""
    return Head(
        pid=pid,
        account=new.account.id,
        spawner=new.account,
        key=new.key,
        program=new.program,
        name=new.name,
        model=new.model,
        ask_class=new.ask_class,
        parent=new.parent,
        depth=new.depth,
        detached=new.detached,
        withheld=new.withheld,
        forked_from=new.forked_from,
        forked_seq=new.forked_seq,
        state=State.READY,
        reason=Reason.NONE,
        due_ms=None,
        about=(),
        asked_seq=0,
        epoch=0,
        seq=new.forked_seq,
        hash=new.forked_hash,
        result=None,
        error="",
        used={},
        mail=0,
        taken=0,
        created_ms=now_ms,
        changed_ms=now_ms,
    )


def after(head: Head, body: Body, *, seq: int, hash: str, ts_ms: int) -> Head:
    """The head once this event stands in its log. Pure; whether the event may stand there is the fold's to say."""
    head = replace(head, seq=seq, hash=hash, changed_ms=ts_ms)
    if isinstance(body, ProcState):
        asks = body.to is State.ASKING
        return replace(
            head,
            state=body.to,
            reason=body.reason,
            due_ms=body.due_ms,
            about=head.about if body.to in _KEPT else body.about,
            asked_seq=seq if asks else 0 if body.to is State.WAITING else head.asked_seq,
        )
    if isinstance(body, ProcExited):
        return replace(
            head, state=State.DONE, reason=body.reason, due_ms=None, result=body.result, error=body.error, asked_seq=0
        )
    if isinstance(body, BudgetSettled):
        return replace(head, used=added(head.used, body.used))
    if isinstance(body, Note) and body.about == "adopted":
        return replace(head, withheld=False)
    return head


def added(used: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    return {meter: used.get(meter, 0) + more.get(meter, 0) for meter in sorted(used.keys() | more.keys())}


def locked_head(pid: str) -> Transaction[Head]:
    """The head, which stays as it is until the transaction ends. Raises: NotFound."""
    rows = yield _LOCK(id=pid)
    if not rows:
        raise missing(pid)
    return head_of(rows[0])


def insert_head(head: Head) -> Transaction[None]:
    """Raises: Conflict when the account has spawned with this key before."""
    yield _INSERT(**_columns(head))


def store_head(head: Head) -> Transaction[None]:
    """What an event may change, and the mailbox's counters."""
    columns = _columns(head)
    yield _STORE(of=head.pid, **{f"new_{name}": columns[name] for name in _CHANGING})


def raise_epoch(pid: str) -> Transaction[int]:
    """A new holder has it: whatever an earlier one was about to append is refused from now on."""
    rows = yield _RAISE_EPOCH(of=pid)
    if not rows:
        raise missing(pid)
    return int(rows[0]["epoch"])


def head_of(row: Row) -> Head:
    return Head(
        pid=row["id"],
        account=row["account"],
        spawner=msgspec.json.decode(row["spawner"], type=Account),
        key=row["spawn_key"] or "",
        program=row["program"],
        name=row["name"],
        model=row["model"],
        ask_class=AskClass(row["ask_class"]),
        parent=row["parent"],
        depth=row["depth"],
        detached=bool(row["detached"]),
        withheld=bool(row["withheld"]),
        forked_from=row["forked_from"],
        forked_seq=row["forked_seq"],
        state=State(row["state"]),
        reason=Reason(row["reason"]),
        due_ms=row["due_ms"],
        about=tuple(msgspec.json.decode(row["about"], type=list[str])),
        asked_seq=row["asked_seq"],
        epoch=row["epoch"],
        seq=row["seq"],
        hash=row["hash"],
        result=row["result"],
        error=row["error"],
        used=msgspec.json.decode(row["used"], type=dict[str, int]),
        mail=row["mail"],
        taken=row["taken"],
        created_ms=row["created_ms"],
        changed_ms=row["changed_ms"],
    )


def missing(pid: str) -> NotFound:
    return NotFound(f"There is no process {pid[:80]!r}.", param="pid")


def _columns(head: Head) -> dict[str, Value]:
    return {
        "id": head.pid,
        "account": head.account,
        "spawner": msgspec.json.encode(head.spawner, order="deterministic").decode(),
        "spawn_key": head.key or None,
        "program": head.program,
        "name": head.name,
        "model": head.model,
        "ask_class": head.ask_class.value,
        "parent": head.parent,
        "depth": head.depth,
        "detached": int(head.detached),
        "withheld": int(head.withheld),
        "forked_from": head.forked_from,
        "forked_seq": head.forked_seq,
        "state": head.state.value,
        "reason": head.reason.value,
        "due_ms": head.due_ms,
        "about": msgspec.json.encode(head.about).decode(),
        "asked_seq": head.asked_seq,
        "epoch": head.epoch,
        "seq": head.seq,
        "hash": head.hash,
        "result": head.result,
        "error": head.error,
        "used": msgspec.json.encode(head.used, order="deterministic").decode(),
        "mail": head.mail,
        "taken": head.taken,
        "created_ms": head.created_ms,
        "changed_ms": head.changed_ms,
    }


_CHANGING = (
    "withheld",
    "state",
    "reason",
    "due_ms",
    "about",
    "asked_seq",
    "seq",
    "hash",
    "result",
    "error",
    "used",
    "mail",
    "taken",
    "changed_ms",
)
_INSERT = insert(processes)
_LOCK = Statement(select(processes).where(processes.c.id == bindparam("id", type_=Text)).with_for_update())
_STORE = Statement(
    update(processes)
    .where(processes.c.id == bindparam("of", type_=Text))
    .values({processes.c[name]: bindparam(f"new_{name}", type_=processes.c[name].type) for name in _CHANGING})
)
_RAISE_EPOCH = Statement(
    update(processes)
    .where(processes.c.id == bindparam("of", type_=Text))
    .values(epoch=processes.c.epoch + 1)
    .returning(processes.c.epoch)
)
