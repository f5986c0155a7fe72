"""Stored responses: what was asked and answered, each as a place in the tree of `nodes.py`, with a row of its own.

Everything is the account's that made it; for any other account it is not there. Knows no dialect: items are ids and
bytes, and what a response repeats of its request (`echo`) and says of its answer (`body`) are bytes too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from sqlalchemy import BigInteger, Integer, Text, bindparam, delete, or_, select, update

from nimbos.blobs import Blobs
from nimbos.db import Database, Row, Statement, Transaction, insert
from nimbos.db.tables.responses import conversations, response_events, responses
from nimbos.errors import Conflict, InvalidRequest, NotFound, StorageUnavailable
from nimbos.responses import nodes
from nimbos.responses.nodes import Placed
from nimbos.responses.room import PROJECT_BYTES, Room
from nimbos.responses.segments import GRACE_MS, Segments, Swept, freed, named

KEEP_S = 30 * 86_400
_ATTEMPTS = 5
_SHAPE = re.compile(r"[a-z]{1,8}_[0-9a-f]{32}")
_RUNNING = ("queued", "in_progress")
_NO_ANSWER = ("failed", "cancelled")
SAID = ("completed", "incomplete")

T = TypeVar("T")
Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """An item: its bytes without its id."""

    id: str
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What was said before. `head`: the node it ends in; None when nothing was."""

    head: str | None = None
    placed: tuple[Placed, ...] = ()
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A stored response. `output_items`: so many of the last items at `output_node` are the answer."""

    id: str
    account: str
    status: Status
    background: bool
    conversation: str | None
    input_node: str | None
    output_node: str | None
    output_items: int
    echo: bytes
    body: bytes
    created_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What is to be kept of a response. `asked`: its own items, those of the past not among them.
    `store`: False keeps nothing but the conversation's items."""

    id: str
    account: str
    status: Status
    past: Past
    asked: tuple[Piece, ...]
    output: tuple[Piece, ...]
    echo: bytes
    body: bytes
    conversation: str | None = None
    background: bool = False
    store: bool = True


class Store:
    def __init__(
        self,
        database: Database,
        blobs: Blobs,
        *,
        keep_s: float = KEEP_S,
        grace_ms: int = GRACE_MS,
        project_bytes: int = PROJECT_BYTES,
    ) -> None:
        self.database = database
        self.segments = Segments(database, blobs, grace_ms=grace_ms)
        self.room = Room(database, project_bytes=project_bytes)
        self._keep_ms = int(keep_s * 1000)

    async def past_of(self, account: str, response_id: str) -> Past:
        """Of the next turn: what the response was asked and what it answered.

        Raises: NotFound; Conflict while it is being answered; InvalidRequest when it has no answer.
        """
        row = await self._row(account, response_id)
        if row["status"] in _RUNNING:
            raise Conflict(
                f"The response {response_id} is still {row['status']}; wait for its end.", param="previous_response_id"
            )
        if row["status"] in _NO_ANSWER:
            raise InvalidRequest(
                f"The response {response_id} is {row['status']}: it has no answer to go on from.",
                param="previous_response_id",
            )
        return await self.past_at(account, row["output_node"])

    async def past_at(self, account: str, node: str | None) -> Past:
        placed = await self.placed_at(node)
        return Past(head=node, placed=tuple(placed), pieces=tuple(await self.pieces(account, placed)))

    async def placed_at(self, node: str | None) -> list[Placed]:
        return nodes.placed(await self.database.read(nodes.path(node))) if node is not None else []

    async def pieces(self, account: str, placed: Sequence[Placed]) -> list[Piece]:
        contents = await self.segments.load(account, [one.hash for one in placed])
        return [Piece(id=one.id, content=content) for one, content in zip(placed, contents, strict=True)]

    async def named(self, account: str, item_id: str) -> Piece:
        """The account's item of this id, in whatever context. Raises: NotFound."""
        rows = await self.database.read(nodes.newest(account, item_id))
        if not rows:
            raise NotFound(f"There is no item {item_id!r}.", param="input")
        (content,) = await self.segments.load(account, [rows[0]["hash"]])
        return Piece(id=item_id, content=content)

    async def check(self, account: str, past: Past, asked: Sequence[Piece]) -> None:
        """Whether a response can be kept, before it is computed and paid for: whatever it answers is kept then.

        Raises: InvalidRequest when its context would hold too much, TooMuchKept when its project does;
        StorageUnavailable.
        """
        size_bytes = sum(len(piece.content) for piece in asked)
        past_bytes = sum(one.size_bytes for one in past.placed)
        nodes.check_size(len(past.placed) + len(asked), past_bytes + size_bytes)
        await self.room.check(account, size_bytes)

    async def place(self, account: str, pieces: Sequence[Piece]) -> list[Placed]:
        """Keeps their bytes, for a transaction of `run` to name."""
        self.room.add(account, sum(len(piece.content) for piece in pieces), rows=len(pieces))
        hashes = await self.segments.keep(account, [piece.content for piece in pieces])
        return [
            Placed(id=piece.id, hash=hash, size_bytes=len(piece.content))
            for piece, hash in zip(pieces, hashes, strict=True)
        ]

    async def keep(self, answered: Answered) -> None:
        """A response that is over, or one that begins in the background."""
        await self.run(lambda: self.writing(answered))

    async def run(self, prepare: Callable[[], Awaitable[Callable[[], Transaction[T]]]]) -> T:
        """Runs the transaction that `prepare` makes once it has placed what the transaction names; again if some of
        that was swept between."""
        for _ in range(_ATTEMPTS):
            try:
                return await self.database.run(await prepare(), durable=True)
            except Swept:
                continue
        raise StorageUnavailable("blobs", reason="what is to be kept is removed again and again. Try again.")

    async def writing(self, answered: Answered) -> Callable[[], Transaction[None]]:
        """The transaction that keeps it, for `run`, also beyond a bound that `check` was not asked about. A past that
        was deleted meanwhile is written anew."""
        account = answered.account
        asked = await self.place(account, answered.asked)
        output = await self.place(account, answered.output)
        (echo,) = await self.place(account, [Piece(id=nodes.UNNAMED, content=answered.echo)])
        head = answered.past.head
        if head is not None and not await self.database.read(nodes.there(head)):
            await self.place(account, answered.past.pieces)

        def write() -> Transaction[None]:
            past, before = head, asked
            if not (yield from nodes.lock(past)):
                past, before = None, [*answered.past.placed, *asked]
            input_node = yield from nodes.append(account, past, before, bounded=False)
            output_node = yield from nodes.append(account, input_node, output, bounded=False)
            if answered.store:
                yield from self._add_row(answered, input_node, output_node, len(output), echo)
            else:
                yield from nodes.doubt(output_node)
            if answered.conversation is not None and answered.status in SAID:
                said = [*asked, *output]
                yield from say(account, answered.conversation, answered.past.head, output_node, said)

        return write

    async def fetch(self, account: str, response_id: str) -> Kept:
        """Raises: NotFound."""
        row = await self._row(account, response_id)
        (echo,) = await self.segments.load(account, [row["echo"]])
        return Kept(
            id=row["id"],
            account=account,
            status=row["status"],
            background=bool(row["background"]),
            conversation=row["conversation"],
            input_node=row["input_node"],
            output_node=row["output_node"],
            output_items=row["output_items"],
            echo=echo,
            body=row["body"].encode(),
            created_ms=row["created_ms"],
        )

    async def output_of(self, kept: Kept) -> list[Piece]:
        if not kept.output_items:
            return []
        placed = await self.placed_at(kept.output_node)
        return await self.pieces(kept.account, placed[-kept.output_items :])

    def remove(self, account: str, response_id: str) -> Transaction[None]:
        """Raises: NotFound."""
        rows = (yield _REMOVE(id=response_id, account=account)) if is_id(response_id) else []
        if not rows:
            raise _missing(response_id)
        yield from _forget(rows[0])

    async def expire(self, *, most: int = 100) -> int:
        """Removes responses whose time is over, and old events; how many responses."""
        now_ms = time.time_ns() // 1_000_000

        def remove() -> Transaction[int]:
            rows = yield _EXPIRED(now_ms=now_ms, most=most)
            for row in rows:
                yield _REMOVE(id=row["id"], account=row["account"])
                yield from _forget(row)
            return len(rows)

        return await self.database.run(remove)

    async def sweep(self, *, most: int = 100) -> int:
        """Takes away nodes and segments that nothing needs any more; how much was looked at."""
        looked_at = await self.database.run(lambda: nodes.sweep(most=most))
        return looked_at + await self.segments.sweep(most=most)

    def _add_row(
        self, answered: Answered, input_node: str | None, output_node: str | None, output_items: int, echo: Placed
    ) -> Transaction[None]:
        """The echo is an item of the response itself, where its bytes are counted."""
        now_ms = time.time_ns() // 1_000_000
        yield from named([echo.hash])
        yield from nodes.hold(answered.account, answered.id, [echo])
        yield _ADD(
            id=answered.id,
            account=answered.account,
            status=answered.status,
            background=int(answered.background),
            conversation=answered.conversation,
            input_node=input_node,
            output_node=output_node,
            output_items=output_items,
            echo=echo.hash,
            body=answered.body.decode(),
            created_ms=now_ms,
            expires_ms=now_ms + self._keep_ms,
        )

    async def _row(self, account: str, response_id: str) -> Row:
        rows = await self.database.read(_ROW(id=response_id, account=account)) if is_id(response_id) else []
        if not rows:
            raise _missing(response_id)
        return rows[0]


def is_id(given: str) -> bool:
    """Whether it can be one of ours; what clients name may hold what a database does not take."""
    return _SHAPE.fullmatch(given) is not None


def say(
    account: str, conversation: str, expected: str | None, after: str | None, said: Sequence[Placed]
) -> Transaction[None]:
    """The conversation goes on to `after`; if others spoke meanwhile, the same items come behind theirs, but for those
    that it has by now, as no id may be there twice. A conversation that was deleted meanwhile stays deleted."""
    rows = yield _HEAD(id=conversation, account=account)
    if not rows:
        return
    head = rows[0]["head"]
    if head == expected:
        head = after
    else:
        yield from nodes.lock(head)
        new = yield from nodes.unsaid(head, said)
        head = yield from nodes.append(account, head, new, bounded=False)
    yield _MOVE(id=conversation, head=head)


def finished(response_id: str, status: Status, body: bytes, node: str | None, output_items: int) -> Transaction[bool]:
    """The one final state of a response that was running; False when it has one already, or is gone."""
    rows = yield _FINISH(id=response_id, status=status, body=body.decode(), node=node, output_items=output_items)
    return bool(rows)


def begun(response_id: str) -> Transaction[None]:
    yield _BEGIN(id=response_id)


def cancelled(account: str, response_id: str) -> Transaction[bool]:
    """True when it was running and now is cancelled. Raises: NotFound."""
    rows = (yield _LOCKED(id=response_id, account=account)) if is_id(response_id) else []
    if not rows:
        raise _missing(response_id)
    if rows[0]["status"] not in _RUNNING:
        return False
    yield _CANCEL(id=response_id)
    return True


def _forget(row: Row) -> Transaction[None]:
    """What a removed row pointed to."""
    yield _REMOVE_EVENTS(id=row["id"])
    yield from nodes.let_go(row["id"])
    yield from nodes.doubt(row["input_node"], row["output_node"])
    yield from freed([row["echo"]])


def _missing(response_id: str) -> NotFound:
    return NotFound(f"There is no response {response_id[:80]!r}.", param="response_id")


_ID = bindparam("id", type_=Text)
_OWN = (responses.c.id == _ID, responses.c.account == bindparam("account", type_=Text))
_STILL_RUNNING = (responses.c.id == _ID, or_(responses.c.status == "queued", responses.c.status == "in_progress"))
_ADD = insert(responses)
_ROW = Statement(select(*responses.c).where(*_OWN))
_LOCKED = Statement(select(responses.c.status).where(*_OWN).with_for_update())
_CANCEL = Statement(update(responses).where(responses.c.id == _ID).values(status="cancelled"))
_BEGIN = Statement(update(responses).where(*_STILL_RUNNING).values(status="in_progress"))
_FINISH = Statement(
    update(responses)
    .where(*_STILL_RUNNING)
    .values(
        status=bindparam("status", type_=Text),
        body=bindparam("body", type_=Text),
        output_node=bindparam("node", type_=Text),
        output_items=bindparam("output_items", type_=Integer),
    )
    .returning(responses.c.id)
)
_REMOVE = Statement(delete(responses).where(*_OWN).returning(*responses.c))
_EXPIRED = Statement(
    select(*responses.c)
    .where(
        responses.c.expires_ms < bindparam("now_ms", type_=BigInteger),
        responses.c.status != "queued",
        responses.c.status != "in_progress",
    )
    .order_by(responses.c.id)
    .limit(bindparam("most", type_=Integer))
    .with_for_update(skip_locked=True)
)
_REMOVE_EVENTS = Statement(delete(response_events).where(response_events.c.response == _ID))
_HEAD = Statement(
    select(conversations.c.head)
    .where(conversations.c.id == _ID, conversations.c.account == bindparam("account", type_=Text))
    .with_for_update()
)
_MOVE = Statement(update(conversations).where(conversations.c.id == _ID).values(head=bindparam("head", type_=Text)))
