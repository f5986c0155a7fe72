"""Conversations: named places in the tree of `nodes.py` that move on as things are said.

A turn of a conversation shares its past like a chain of responses does. Taking an item away makes the rest anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from sqlalchemy import Text, bindparam, delete, select, update

from nimbos.db import Row, Statement, Transaction, insert
from nimbos.db.tables.responses import conversations
from nimbos.errors import Conflict, NotFound
from nimbos.responses import nodes
from nimbos.responses.nodes import Placed
from nimbos.responses.store import Past, Piece, Store, is_id
from nimbos.types import new_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    id: str
    metadata: dict[str, str]
    created_ms: int
    head: str | None


class Conversations:
    """Everywhere: NotFound for a conversation that is not the account's."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._database = store.database

    async def create(self, account: str, *, metadata: dict[str, str], pieces: Sequence[Piece]) -> Conversation:
        """Raises: InvalidRequest when it would hold too much, TooMuchKept when its project does."""
        made = new_id("conv")
        created_ms = time.time_ns() // 1_000_000
        text = msgspec.json.encode(metadata).decode()
        await self._store.check(account, Past(), pieces)
        self._store.room.add(account, len(text), rows=1)

        async def adding() -> Callable[[], Transaction[str | None]]:
            placed = await self._store.place(account, pieces)

            def add() -> Transaction[str | None]:
                head = yield from nodes.append(account, None, placed)
                counted = Placed(id=nodes.UNNAMED, hash=made, size_bytes=len(text))
                yield from nodes.hold(account, made, [counted])  # the metadata, which has no bytes elsewhere
                yield _ADD(id=made, account=account, metadata=text, head=head, created_ms=created_ms)
                return head

            return add

        head = await self._store.run(adding)
        return Conversation(id=made, metadata=metadata, created_ms=created_ms, head=head)

    async def get(self, account: str, conversation_id: str) -> Conversation:
        rows = await self._database.read(_ROW(id=_checked(conversation_id), account=account))
        return _conversation(_only(rows, conversation_id))

    async def describe(self, account: str, conversation_id: str, metadata: dict[str, str]) -> Conversation:
        def change() -> Transaction[Row]:
            text = msgspec.json.encode(metadata).decode()
            rows = yield _DESCRIBE(id=_checked(conversation_id), account=account, metadata=text)
            return _only(rows, conversation_id)

        return _conversation(await self._database.run(change, durable=True))

    async def delete(self, account: str, conversation_id: str) -> None:
        """What was said stays with the responses that said it."""

        def remove() -> Transaction[None]:
            rows = yield _REMOVE(id=_checked(conversation_id), account=account)
            yield from nodes.doubt(_only(rows, conversation_id)["head"])
            yield from nodes.let_go(conversation_id)

        await self._database.run(remove, durable=True)

    async def past(self, account: str, conversation_id: str) -> Past:
        return await self._store.past_at(account, (await self.get(account, conversation_id)).head)

    async def placed(self, account: str, conversation_id: str) -> list[Placed]:
        return await self._store.placed_at((await self.get(account, conversation_id)).head)

    async def add(self, account: str, conversation_id: str, past: Past, pieces: Sequence[Piece]) -> None:
        """`past`: what was in it when the pieces were looked at; none of them may be there already.

        Raises: InvalidRequest when it would hold too much, TooMuchKept when its project does; Conflict when one of the
        pieces was added meanwhile.
        """
        await self._store.check(account, past, pieces)

        async def appending() -> Callable[[], Transaction[None]]:
            placed = await self._store.place(account, pieces)

            def append() -> Transaction[None]:
                rows = yield _LOCKED(id=_checked(conversation_id), account=account)
                head = _only(rows, conversation_id)["head"]
                yield from nodes.lock(head)
                if head != past.head and len((yield from nodes.unsaid(head, placed))) < len(placed):
                    raise Conflict(f"Somebody added one of these items to {conversation_id} just now.", param="items")
                moved = yield from nodes.append(account, head, placed)
                yield _MOVE(id=conversation_id, head=moved)

            return append

        await self._store.run(appending)

    async def item(self, account: str, conversation_id: str, item_id: str) -> Piece:
        """Raises: NotFound."""
        found = [one for one in await self.placed(account, conversation_id) if one.id == item_id]
        if not found:
            raise _no_item(conversation_id, item_id)
        (piece,) = await self._store.pieces(account, found[:1])
        return piece

    async def take_away(self, account: str, conversation_id: str, item_id: str) -> Conversation:
        """Raises: NotFound."""

        def cut() -> Transaction[Row]:
            rows = yield _LOCKED(id=_checked(conversation_id), account=account)
            head = _only(rows, conversation_id)["head"]
            had = nodes.placed((yield nodes.path(head))) if head is not None else []
            left = [one for one in had if one.id != item_id]
            if len(left) == len(had):
                raise _no_item(conversation_id, item_id)
            moved = yield from nodes.append(account, None, left, bounded=False)
            yield _MOVE(id=conversation_id, head=moved)
            yield from nodes.doubt(head)
            return _only(rows, conversation_id)

        return _conversation(await self._database.run(cut, durable=True))


def _conversation(row: Row) -> Conversation:
    metadata = msgspec.json.decode(row["metadata"], type=dict[str, str])
    return Conversation(id=row["id"], metadata=metadata, created_ms=row["created_ms"], head=row["head"])


def _only(rows: list[Row], conversation_id: str) -> Row:
    if not rows:
        raise _missing(conversation_id)
    return rows[0]


def _checked(conversation_id: str) -> str:
    if not is_id(conversation_id):
        raise _missing(conversation_id)
    return conversation_id


def _missing(conversation_id: str) -> NotFound:
    return NotFound(f"There is no conversation {conversation_id[:80]!r}.", param="conversation")


def _no_item(conversation_id: str, item_id: str) -> NotFound:
    return NotFound(f"There is no item {item_id[:80]!r} in {conversation_id}.", param="item_id")


_ID = bindparam("id", type_=Text)
_OWN = (conversations.c.id == _ID, conversations.c.account == bindparam("account", type_=Text))
_ADD = insert(conversations)
_ROW = Statement(select(*conversations.c).where(*_OWN))
_LOCKED = Statement(select(*conversations.c).where(*_OWN).with_for_update())
_DESCRIBE = Statement(
    update(conversations).where(*_OWN).values(metadata=bindparam("metadata", type_=Text)).returning(*conversations.c)
)
_MOVE = Statement(update(conversations).where(conversations.c.id == _ID).values(head=bindparam("head", type_=Text)))
_REMOVE = Statement(delete(conversations).where(*_OWN).returning(*conversations.c))
