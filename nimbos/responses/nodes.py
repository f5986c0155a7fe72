"""The tree of what was said: adding to it, reading a path of it, and taking away what nothing needs.

Nodes never change and stand behind a parent that was there before them, so there are no cycles. Whoever makes something
point to a node locks it in the same transaction; whoever takes one away locks it first and looks again. So nothing ever
points to a node that is gone. Source of the bytes: `segments.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from sqlalchemy import Executable, Integer, Text, bindparam, delete, literal_column, select
from sqlalchemy import text as sql

from nimbos.db import Bound, Dialect, Row, Statement, Transaction, insert, insert_ignored
from nimbos.db.tables.responses import conversations, response_garbage, responses
from nimbos.db.tables.responses import response_items as items
from nimbos.db.tables.responses import response_nodes as nodes
from nimbos.errors import InvalidRequest
from nimbos.responses.segments import freed, named
from nimbos.types import new_id

ITEMS_MAX = 10_000
BYTES_MAX = 64 << 20
UNNAMED = ""  # the id of what a response or a conversation holds besides: no client can ask for it
_ITEMS_AT_ONCE = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """An item whose bytes are kept."""

    id: str
    hash: str
    size_bytes: int


def append(
    account: str, parent: str | None, added: Sequence[Placed], *, bounded: bool = True
) -> Transaction[str | None]:
    """A new node behind `parent`, which the caller has locked; with nothing to add it is the parent itself. Not
    `bounded` is what a model has answered, as it is paid for, and what is left when something is taken away.

    Raises: InvalidRequest when the path would hold too much; Swept.
    """
    if not added:
        return parent
    items_total, bytes_total = len(added), sum(one.size_bytes for one in added)
    if parent is not None:
        rows = yield _NODE(id=parent)
        items_total += rows[0]["items_total"]
        bytes_total += rows[0]["bytes_total"]
    if bounded:
        check_size(items_total, bytes_total)
    yield from named(one.hash for one in added)
    node = new_id("node")
    yield _ADD_NODE(id=node, account=account, parent=parent, items_total=items_total, bytes_total=bytes_total)
    yield from hold(account, node, added)
    return node


def check_size(items_total: int, bytes_total: int) -> None:
    """Of a whole path. Raises: InvalidRequest."""
    if items_total > ITEMS_MAX or bytes_total > BYTES_MAX:
        raise InvalidRequest(
            f"A conversation may have {ITEMS_MAX} items and {BYTES_MAX} bytes; this one would have {items_total} and "
            f"{bytes_total}. Start another one."
        )


def hold(account: str, owner: str, held: Sequence[Placed]) -> Transaction[None]:
    """Items of a node, or what a response or a conversation holds besides; the caller has named them."""
    listed = msgspec.json.encode([(one.id, one.hash, one.size_bytes) for one in held]).decode()
    yield _ADD_ITEMS(node=owner, account=account, items=listed)


def let_go(owner: str) -> Transaction[int]:
    """Of what `hold` was given; how many items."""
    gone = yield _REMOVE_ITEMS(node=owner)
    yield from freed(one["hash"] for one in gone)
    return len(gone)


def unsaid(node: str | None, added: Sequence[Placed]) -> Transaction[list[Placed]]:
    """Those whose ids the path to the node does not have."""
    said = {one.id for one in placed((yield _PATH(id=node)))} if node is not None else set()
    return [one for one in added if one.id not in said]


def lock(node: str | None) -> Transaction[bool]:
    """Whether it is (still) there; then it stays until the transaction ends."""
    if node is None:
        return True
    rows = yield _LOCK(id=node)
    return bool(rows)


def there(node: str) -> Bound:
    """A row if it is."""
    return _NODE(id=node)


def path(node: str) -> Bound:
    """The items from the root to the node, for `placed`."""
    return _PATH(id=node)


def own(node: str) -> Transaction[tuple[str | None, list[Placed]]]:
    """A node's parent and its own items; the caller has locked it."""
    (found,) = yield _PARENT(id=node)
    return found["parent"], placed((yield _OWN_ITEMS(node=node)))


def placed(rows: list[Row]) -> list[Placed]:
    return [Placed(id=row["item"], hash=row["hash"], size_bytes=row["size_bytes"]) for row in rows]


def newest(account: str, item: str) -> Bound:
    """The hash that the item's id had last."""
    return _NEWEST(account=account, item=item)


def doubt(*candidates: str | None) -> Transaction[None]:
    """Nodes that something no longer points to: the next sweep looks at them."""
    for node in candidates:
        if node is not None:
            yield _DOUBT(node=node)


def sweep(*, most: int = 100) -> Transaction[int]:
    """Takes away nodes that nothing needs; how many were looked at. What is behind them is looked at next. Others wait
    for the writer meanwhile, so large ones end a sweep early."""
    doubtful = yield _DOUBTFUL(most=most)
    gone = 0
    for number, row in enumerate(doubtful):
        if gone > _ITEMS_AT_ONCE:
            return number
        node = row["node"]
        yield _CERTAIN(node=node)
        found = yield _LOCK(id=node)
        if not found:
            continue
        needed = False
        for query in _NEEDS:
            needed = needed or bool((yield query(node=node)))
        if not needed:
            gone += yield from let_go(node)
            yield _REMOVE_NODE(node=node)
            yield from doubt(found[0]["parent"])
    return len(doubtful)


def _adding_items(dialect: Dialect) -> Executable:
    """One JSON list becomes rows."""
    if dialect == "sqlite":
        columns = "item.key, " + ", ".join(f"json_extract(item.value, '$[{field}]')" for field in range(3))
        source = "json_each(:items)"
    else:
        columns = "item.place - 1, item.value->>0, item.value->>1, CAST(item.value->>2 AS INTEGER)"
        source = "json_array_elements(CAST(:items AS json)) WITH ORDINALITY"
    named = "item" if dialect == "sqlite" else "item(value, place)"
    statement = sql(
        "INSERT INTO response_items (node, account, position, item, hash, size_bytes) "  # noqa: S608 constants
        f"SELECT CAST(:node AS TEXT), CAST(:account AS TEXT), {columns} FROM {source} AS {named}"
    )
    return statement.bindparams(*(bindparam(name, type_=Text) for name in ("node", "account", "items")))


def _path_query() -> Executable:
    start = select(nodes.c.id, nodes.c.parent, literal_column("0", Integer).label("depth")).where(
        nodes.c.id == bindparam("id", type_=Text)
    )
    chain = start.cte("chain", recursive=True)
    behind = select(nodes.c.id, nodes.c.parent, (chain.c.depth + literal_column("1", Integer)).label("depth")).join(
        chain, nodes.c.id == chain.c.parent
    )
    chain = chain.union_all(behind)
    return (
        select(items.c.item, items.c.hash, items.c.size_bytes)
        .join(chain, items.c.node == chain.c.id)
        .order_by(chain.c.depth.desc(), items.c.position)
    )


_ID = bindparam("id", type_=Text)
_OF_NODE = bindparam("node", type_=Text)
_NODE = Statement(select(nodes.c.items_total, nodes.c.bytes_total).where(nodes.c.id == _ID))
_LOCK = Statement(select(nodes.c.parent).where(nodes.c.id == _ID).with_for_update())
_PARENT = Statement(select(nodes.c.parent).where(nodes.c.id == _ID))
_OWN_ITEMS = Statement(
    select(items.c.item, items.c.hash, items.c.size_bytes).where(items.c.node == _OF_NODE).order_by(items.c.position)
)
_ADD_NODE = insert(nodes)
_ADD_ITEMS = Statement(_adding_items)
_PATH = Statement(lambda _: _path_query())
_NEWEST = Statement(
    select(items.c.hash)
    .where(items.c.account == bindparam("account", type_=Text), items.c.item == bindparam("item", type_=Text))
    .order_by(items.c.node.desc())
    .limit(1)
)
_DOUBT = insert_ignored(response_garbage, key=("node",))
_DOUBTFUL = Statement(
    select(response_garbage.c.node)
    .order_by(response_garbage.c.node.desc())
    .limit(bindparam("most", type_=Integer))
    .with_for_update(skip_locked=True)
)
_CERTAIN = Statement(delete(response_garbage).where(response_garbage.c.node == _OF_NODE))
_NEEDS = (
    Statement(select(nodes.c.id).where(nodes.c.parent == _OF_NODE).limit(1)),
    Statement(select(responses.c.id).where(responses.c.output_node == _OF_NODE).limit(1)),
    Statement(select(responses.c.id).where(responses.c.input_node == _OF_NODE).limit(1)),
    Statement(select(conversations.c.id).where(conversations.c.head == _OF_NODE).limit(1)),
)
_REMOVE_ITEMS = Statement(delete(items).where(items.c.node == _OF_NODE).returning(items.c.hash))
_REMOVE_NODE = Statement(delete(nodes).where(nodes.c.id == _OF_NODE))
