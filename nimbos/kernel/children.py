"""Processes and their children: how one is born, and what becomes of a family when somebody exits.

A child that is not detached never outlives its parent: the parent's exit puts a `cancel` into its mailbox, in the same
transaction. A child's exit is a signal to its parent, with its result. Rows are locked from the parent down.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import BigInteger, ColumnClause, Text, bindparam, func, literal_column, select

from nimbos.db import Statement, Transaction
from nimbos.db.tables.processes import process_mailbox, processes
from nimbos.errors import Conflict, InvalidRequest, Overloaded
from nimbos.kernel.events import ProcCreated
from nimbos.kernel.log import Draft, Log
from nimbos.kernel.mailbox import Mail, Posted, post, queue_of
from nimbos.kernel.processes import NewHead, locked_head
from nimbos.kernel.words import Reason, SignalKind, State
from nimbos.types import Account, AskClass
from nimbos.work import Work

DEPTH_MAX = 16
CHILDREN_MAX = 1_000  # that live, of one parent
LIVING_MAX = 20_000  # that live, of one project
# Whether a fork is told that it is real, read or not.
ADOPTION = Statement(
    select(process_mailbox.c.position).where(
        process_mailbox.c.process == bindparam("pid", type_=Text),
        process_mailbox.c.signal == bindparam("signal", type_=Text),
    )
)
_RETRY_AFTER_S = 5.0

_LIVING: ColumnClause[bool] = literal_column("state != 'done'")
_OF_PARENT = processes.c.parent == bindparam("of", type_=Text)
_COUNT = Statement(select(func.count().label("living")).where(_OF_PARENT, _LIVING))
_COUNT_ALL = Statement(
    select(func.count().label("living")).where(processes.c.account == bindparam("of", type_=Text), _LIVING)
)
_ATTACHED = Statement(
    select(processes.c.id).where(_OF_PARENT, _LIVING, literal_column("detached = 0")).order_by(processes.c.id)
)
_FORKS = Statement(
    select(processes.c.id)
    .where(
        processes.c.forked_from == bindparam("of", type_=Text),
        processes.c.forked_seq >= bindparam("born_seq", type_=BigInteger),
    )
    .order_by(processes.c.id)
)
_BY_KEY = Statement(
    select(processes.c.id).where(
        processes.c.account == bindparam("of", type_=Text), processes.c.spawn_key == bindparam("key", type_=Text)
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """A process to be. `input`: a segment. `key`: the same one makes no second process. `depth_most` and
    `children_most`: what its program allows, within what the kernel does."""

    pid: str
    account: Account
    program: str
    name: str
    input: str
    model: str
    ask_class: AskClass = AskClass.AGENT
    parent: str | None = None
    detached: bool = False
    key: str = ""
    actor: str = "kernel"
    depth_most: int = DEPTH_MAX
    children_most: int = CHILDREN_MAX


def create(log: Log, work: Work, birth: Birth) -> Transaction[str]:
    """Log, head and work of a new process; its id, or that of the one with the same key. Its budget is the caller's
    to make. A parent that is a fork, and not adopted, has children whose effects are withheld like its own.

    Raises: InvalidRequest beyond the depth; Overloaded beyond the number; Conflict for a parent that is over.
    """
    depth, withheld, born_seq = 0, False, 0
    if birth.parent is not None:
        parent = yield from locked_head(birth.parent)
        if parent.state is State.DONE:
            raise Conflict(f"The process {parent.pid} is over ({parent.reason.value}) and has no more children.")
        adopted = (yield ADOPTION(pid=parent.pid, signal=SignalKind.ADOPT.value)) if parent.withheld else []
        depth, withheld = parent.depth + 1, parent.withheld and not adopted  # it may not have read that it is real
        born_seq = parent.seq  # the call that spawns it is written already
        yield from _check_family(birth, depth)
    if birth.key:
        rows = yield _BY_KEY(of=birth.account.id, key=birth.key)
        if rows:
            return str(rows[0]["id"])
    yield from check_project(birth.account)
    body = ProcCreated(
        program=birth.program,
        name=birth.name,
        account=birth.account.id,
        input=birth.input,
        model=birth.model,
        ask_class=birth.ask_class,
        parent=birth.parent,
        depth=depth,
        detached=birth.detached,
        withheld=withheld,
        key=birth.key,
        born_seq=born_seq,
    )
    head = NewHead(
        account=birth.account,
        program=birth.program,
        name=birth.name,
        model=birth.model,
        ask_class=birth.ask_class,
        parent=birth.parent,
        depth=depth,
        detached=birth.detached,
        withheld=withheld,
        key=birth.key,
    )
    yield from log.create(birth.pid, [Draft(body=body, actor=birth.actor)], head=head)
    yield from work.add(queue_of(birth.account.id), birth.pid)
    return birth.pid


def dismiss(log: Log, work: Work, pid: str) -> Transaction[list[tuple[str, bool]]]:
    """Cancels the children of a process that exits; which, and whether they were woken for it."""
    posted = []
    for row in (yield _ATTACHED(of=pid)):
        mail = Mail(signal=SignalKind.CANCEL, source=f"process:{pid}", external_id="exit")
        done = yield from post(log, work, row["id"], mail)
        posted.append((str(row["id"]), done.woken))
    return posted


def tell_parent(
    log: Log, work: Work, parent: str, pid: str, *, reason: Reason, told: str | None
) -> Transaction[Posted]:
    """`told`: segment of the result, or of what went wrong. A parent that is over is told nothing."""
    mail = Mail(
        signal=SignalKind.CHILD_EXIT,
        source=f"process:{pid}",
        external_id="exit",
        about=pid,
        body=told,
        reason=reason,
    )
    return (yield from post(log, work, parent, mail))


def tell_forks(
    log: Log, work: Work, parent: str, pid: str, *, reason: Reason, told: str | None, born_seq: int
) -> Transaction[list[tuple[str, bool]]]:
    """The forks of its parent, and theirs, that have the child in their past, and may wait for it: they go on from
    event `born_seq` or a later one. Each is locked before its own are looked for, the first by the caller, so that none
    is made unseen."""
    posted, left = [], [parent]
    while left:
        for row in (yield _FORKS(of=left.pop(), born_seq=born_seq)):
            done = yield from tell_parent(log, work, row["id"], pid, reason=reason, told=told)
            posted.append((str(row["id"]), done.woken))
            left.append(row["id"])
    return posted


def _check_family(birth: Birth, depth: int) -> Transaction[None]:
    deepest = min(DEPTH_MAX, birth.depth_most)
    if depth > deepest:
        raise InvalidRequest(f"Processes of this program may be nested {deepest} deep.", param="parent")
    (row,) = yield _COUNT(of=birth.parent)
    most = min(CHILDREN_MAX, birth.children_most)
    if row["living"] >= most:
        raise Overloaded(
            limit="children",
            value=most,
            used=row["living"],
            retry_after_s=_RETRY_AFTER_S,
            owner=f"process {birth.parent}",
        )


def check_project(account: Account, *, more: int = 1) -> Transaction[None]:
    """Raises: Overloaded when the project would have too many processes that live."""
    (row,) = yield _COUNT_ALL(of=account.id)
    if row["living"] + more > LIVING_MAX:
        raise Overloaded(
            limit="processes",
            value=LIVING_MAX,
            used=row["living"],
            retry_after_s=_RETRY_AFTER_S,
            owner=f"project {account.name!r}",
        )
