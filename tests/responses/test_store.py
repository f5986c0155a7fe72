"""Stored responses on both databases: shared pasts, deletes that race, sweeps that take only what nothing needs."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from nimbos.blobs.folder import FolderBlobs
from nimbos.db import Bound, Database, Row, Statement
from nimbos.db.tables.responses import response_items, response_nodes, response_segments, responses
from nimbos.errors import Conflict, InvalidRequest, NotFound, PayloadTooLarge, StorageUnavailable
from nimbos.responses import Answered, Background, Conversations, Past, Piece, Status, Store, nodes, room
from nimbos.responses.room import ROW_BYTES, TooMuchKept
from nimbos.types import new_id
from tests.databases import sqlite_template

ME, OTHER = "proj_me", "proj_other"


class CountedBlobs(FolderBlobs):
    """Remembers what was stored."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def hashes(self) -> set[str]:
        return {file.name for file in self.folder.rglob("*") if file.is_file()}


@pytest.fixture
def blobs(tmp_path: Path) -> CountedBlobs:
    return CountedBlobs(tmp_path / "blobs")


@pytest.fixture
def store(database: Database, blobs: CountedBlobs) -> Store:
    return Store(database, blobs, grace_ms=-1)


def piece(text: str) -> Piece:
    return Piece(id=new_id("msg"), content=text.encode())


def answered(past: Past, asked: str, said: str, *, account: str = ME, **fields: Any) -> Answered:
    return Answered(
        **{
            "id": new_id("resp"),
            "account": account,
            "status": "completed",
            "past": past,
            "asked": (piece(asked),),
            "output": (piece(said),),
            "echo": b'{"model":"demo"}',
            "body": b"{}",
            **fields,
        }
    )


async def turn(store: Store, previous: str | None, asked: str, said: str, **fields: Any) -> str:
    past = await store.past_of(ME, previous) if previous is not None else Past()
    one = answered(past, asked, said, **fields)
    await store.keep(one)
    return one.id


def words(past: Past) -> list[str]:
    return [one.content.decode() for one in past.pieces]


async def count(database: Database, table: Any) -> int:
    (row,) = await database.read(Statement(select(func.count().label("n")).select_from(table))())
    return int(row["n"])


async def swept(store: Store) -> None:
    while await store.sweep():
        pass


async def test_a_chain_is_read_whole_and_its_past_is_written_once(store: Store, database: Database) -> None:
    last = None
    for number in range(50):
        last = await turn(store, last, f"asked {number}", f"said {number}")
    assert last is not None
    expected = [text for number in range(50) for text in (f"asked {number}", f"said {number}")]
    assert words(await store.past_of(ME, last)) == expected
    assert await count(database, response_items) == 150  # three a turn, not two for each turn before it
    assert await count(database, response_segments) == 101  # and one for what all requests repeat


async def test_the_same_words_are_kept_once_for_an_account_and_apart_for_others(
    store: Store, blobs: CountedBlobs
) -> None:
    for account in (ME, ME, OTHER):
        await store.keep(answered(Past(), "hi", "hello", account=account))
    assert len(blobs.hashes()) == 2 * 3


async def test_two_turns_may_go_on_from_the_same_one(store: Store) -> None:
    first = await turn(store, None, "a", "b")
    left, right = await turn(store, first, "c", "d"), await turn(store, first, "e", "f")
    assert words(await store.past_of(ME, left)) == ["a", "b", "c", "d"]
    assert words(await store.past_of(ME, right)) == ["a", "b", "e", "f"]


async def test_another_account_finds_nothing(store: Store) -> None:
    mine = await turn(store, None, "a", "b")
    kept = await store.fetch(ME, mine)
    (item,) = await store.output_of(kept)
    for found in (
        store.fetch(OTHER, mine),
        store.past_of(OTHER, mine),
        store.named(OTHER, item.id),
        store.segments.load(OTHER, [placed.hash for placed in await store.placed_at(kept.output_node)]),
    ):
        with pytest.raises(NotFound):
            await found
    background = Background(store, owner="srv_test")
    for end in (background.delete, background.cancel):
        with pytest.raises(NotFound):
            await end(OTHER, mine)
    assert (await store.named(ME, item.id)).content == b"b"


@pytest.mark.parametrize(("status", "error"), [("in_progress", Conflict), ("failed", InvalidRequest)])
async def test_a_response_without_an_answer_is_no_past(store: Store, status: Status, error: type[Exception]) -> None:
    one = answered(Past(), "a", "b", status=status, output=())
    await store.keep(one)
    with pytest.raises(error):
        await store.past_of(ME, one.id)


async def test_deleting_the_middle_of_a_chain_leaves_the_rest(store: Store, database: Database) -> None:
    background = Background(store, owner="srv_test")
    first = await turn(store, None, "a", "b")
    second = await turn(store, first, "c", "d")
    third = await turn(store, second, "e", "f")
    await background.delete(ME, second)
    await swept(store)
    assert words(await store.past_of(ME, third)) == ["a", "b", "c", "d", "e", "f"]
    with pytest.raises(NotFound):
        await store.fetch(ME, second)
    with pytest.raises(NotFound):
        await background.delete(ME, second)
    for one in (first, third):
        await background.delete(ME, one)
    await swept(store)
    for table in (responses, response_nodes, response_items, response_segments):
        assert await count(database, table) == 0


async def test_what_is_removed_is_gone_from_the_disk_and_nothing_else(store: Store, blobs: CountedBlobs) -> None:
    background = Background(store, owner="srv_test")
    kept = await turn(store, None, "shared", "mine")
    before = blobs.hashes()
    gone = await turn(store, None, "shared", "secret")
    assert len(blobs.hashes() - before) == 1
    await background.delete(ME, gone)
    await swept(store)
    assert blobs.hashes() == before
    assert words(await store.past_of(ME, kept)) == ["shared", "mine"]


async def test_a_past_that_is_deleted_while_its_next_turn_is_computed_is_written_anew(store: Store) -> None:
    first = await turn(store, None, "a", "b")
    past = await store.past_of(ME, first)
    await Background(store, owner="srv_test").delete(ME, first)
    await swept(store)
    second = answered(past, "c", "d")
    await store.keep(second)
    await swept(store)
    assert words(await store.past_of(ME, second.id)) == ["a", "b", "c", "d"]


async def test_responses_expire(database: Database, blobs: CountedBlobs) -> None:
    store = Store(database, blobs, keep_s=-1, grace_ms=-1)
    running = answered(Past(), "a", "b", status="in_progress", output=())
    await store.keep(running)
    await turn(store, None, "c", "d")
    assert await store.expire() == 1
    assert await store.expire() == 0
    await swept(store)
    assert (await store.fetch(ME, running.id)).status == "in_progress"
    assert len(blobs.hashes()) == 2


async def test_conversations_grow_in_order_also_when_two_speak_at_once(store: Store) -> None:
    conversations = Conversations(store)
    made = await conversations.create(ME, metadata={"a": "b"}, pieces=[piece("start")])
    past = await conversations.past(ME, made.id)
    turns = [answered(past, f"asked {n}", f"said {n}", conversation=made.id) for n in range(8)]
    await asyncio.gather(*(store.keep(one) for one in turns))
    said = words(await conversations.past(ME, made.id))
    assert said[0] == "start"
    assert len(said) == 17
    for asked, answer in zip(said[1::2], said[2::2], strict=True):
        assert asked.replace("asked", "said") == answer
    with pytest.raises(NotFound):
        await conversations.past(OTHER, made.id)


async def test_an_item_is_taken_out_of_a_conversation_and_stays_in_the_response(store: Store) -> None:
    conversations = Conversations(store)
    made = await conversations.create(ME, metadata={}, pieces=[piece("one"), piece("two"), piece("three")])
    one = answered(await conversations.past(ME, made.id), "four", "five", conversation=made.id)
    await store.keep(one)
    second = (await conversations.placed(ME, made.id))[1]
    await conversations.take_away(ME, made.id, second.id)
    await swept(store)
    assert words(await conversations.past(ME, made.id)) == ["one", "three", "four", "five"]
    assert words(await store.past_of(ME, one.id)) == ["one", "two", "three", "four", "five"]
    with pytest.raises(NotFound):
        await conversations.take_away(ME, made.id, second.id)
    await conversations.delete(ME, made.id)
    await swept(store)
    assert words(await store.past_of(ME, one.id)) == ["one", "two", "three", "four", "five"]


async def test_a_response_that_is_not_stored_leaves_nothing_but_what_its_conversation_holds(
    store: Store, database: Database
) -> None:
    conversations = Conversations(store)
    made = await conversations.create(ME, metadata={}, pieces=[])
    await store.keep(answered(Past(), "a", "b", conversation=made.id, store=False))
    await swept(store)
    assert await count(database, responses) == 0
    assert words(await conversations.past(ME, made.id)) == ["a", "b"]


async def test_a_context_cannot_grow_without_bound(store: Store) -> None:
    many = tuple(piece("x") for _ in range(9_999))
    one = replace(answered(Past(), "a", "b"), asked=many)
    await store.check(ME, one.past, one.asked)
    await store.keep(one)
    with pytest.raises(InvalidRequest, match="10000 items"):
        await store.check(ME, await store.past_of(ME, one.id), [piece("c")])


async def test_no_item_is_twice_in_a_conversation_that_two_speak_in_at_once(store: Store) -> None:
    conversations = Conversations(store)
    made = await conversations.create(ME, metadata={}, pieces=[piece("start")])
    past = await conversations.past(ME, made.id)
    same = piece("asked")
    for said in ("one", "two"):
        await store.keep(replace(answered(past, "", said, conversation=made.id), asked=(same,)))
    with pytest.raises(Conflict):
        await conversations.add(ME, made.id, past, [piece("more"), same])
    await conversations.add(ME, made.id, past, [piece("more")])
    assert words(await conversations.past(ME, made.id)) == ["start", "asked", "one", "two", "more"]


async def bound(store: Store, kept_bytes: int) -> None:
    """The project may keep as much more as is left, and not one byte beyond."""
    left = LIMIT_BYTES - kept_bytes
    await store.check(ME, Past(), [piece("z" * left)])
    with pytest.raises(PayloadTooLarge, match=r"Delete some of them.*`store: false`"):
        await store.check(ME, Past(), [piece("z" * (left + 1))])


LIMIT_BYTES = 40_000


async def test_what_a_project_keeps_is_bounded_and_free_again_when_it_is_deleted(
    database: Database, blobs: CountedBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_REST_S", 0.0)
    monkeypatch.setattr(room, "_REST_SHARE", 0)
    store = Store(database, blobs, grace_ms=-1, project_bytes=LIMIT_BYTES)
    background, conversations = Background(store, owner="srv_test"), Conversations(store)
    await bound(store, 0)
    first = await turn(store, None, "x" * 8_000, "y" * 8_000)
    said = 16_000 + len(b'{"model":"demo"}') + 3 * ROW_BYTES
    await bound(store, said)
    await store.room.sum_up()
    await bound(store, said)
    second = await turn(store, None, "x" * 8_000, "y", echo=b"e" * 2_000)
    await store.room.sum_up()
    said += 1 + 2_000 + 3 * ROW_BYTES  # the same words once
    await bound(store, said)
    made = await conversations.create(ME, metadata={"a": "b"}, pieces=[])
    said += len('{"a":"b"}') + ROW_BYTES
    await bound(store, said)
    await store.room.sum_up()
    await bound(store, said)
    await store.check(OTHER, Past(), [piece("z" * LIMIT_BYTES)])
    for one in (first, second):
        await background.delete(ME, one)
    await conversations.delete(ME, made.id)
    await swept(store)
    await store.room.sum_up()
    await bound(store, 0)
    assert await count(database, response_items) == await count(database, response_segments) == 0


async def test_what_a_project_keeps_is_known_from_the_first_request_after_a_start(
    database: Database, blobs: CountedBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    await turn(Store(database, blobs), None, "x" * 8_000, "y" * 8_000)
    said = 16_000 + len(b'{"model":"demo"}') + 3 * ROW_BYTES
    sums, began, may_go_on, read = 0, asyncio.Event(), asyncio.Event(), database.read

    async def slow(query: Bound) -> list[Row]:
        nonlocal sums
        sums += 1
        began.set()
        await may_go_on.wait()
        return await read(query)

    monkeypatch.setattr(database, "read", slow)
    store = Store(database, blobs, project_bytes=LIMIT_BYTES)
    some = [asyncio.create_task(store.check(ME, Past(), [piece("z" * size)])) for size in (1, LIMIT_BYTES - said, 40)]
    other = asyncio.create_task(store.check(OTHER, Past(), []))
    await began.wait()
    some[0].cancel()  # who leaves takes the sum from nobody
    store.room.add(ME, 40, rows=0)  # what is kept meanwhile counts on top
    may_go_on.set()
    first, *others = await asyncio.gather(*some, other, return_exceptions=True)
    assert isinstance(first, asyncio.CancelledError)
    assert [type(one) for one in others] == [TooMuchKept, type(None), type(None)]
    await bound(store, said + 40)
    assert sums == 2


async def test_a_sum_that_fails_is_taken_again(
    store: Store, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(query: Bound) -> list[Row]:
        raise StorageUnavailable("nimbos.db", reason="it is gone.")

    with monkeypatch.context() as patched:
        patched.setattr(database, "read", gone)
        with pytest.raises(StorageUnavailable):
            await store.check(ME, Past(), [])
    await store.check(ME, Past(), [])


def test_the_first_sum_reads_nothing_of_other_projects() -> None:
    text, values = room._SUM(account=ME).prepared("sqlite")
    with closing(sqlite3.connect(sqlite_template())) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {text}", values)]
    assert "SEARCH response_items USING INDEX ix_response_items_account_item (account=?)" in plan


async def test_sums_are_not_taken_again_at_once(store: Store) -> None:
    await turn(store, None, "a", "b")
    await store.room.sum_up()
    await turn(store, None, "c", "d")
    await store.room.sum_up()
    assert store.room._projects[ME].added


async def test_a_sweep_ends_when_it_has_taken_much_away(
    store: Store, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_ITEMS_AT_ONCE", 3)
    conversations = Conversations(store)
    for _ in range(3):
        made = await conversations.create(ME, metadata={}, pieces=[piece(word) for word in "abcd"])
        await conversations.delete(ME, made.id)
    assert [await database.run(nodes.sweep) for _ in range(4)] == [1, 1, 1, 0]
    assert await count(database, response_items) == 0


async def test_sweeps_and_turns_and_deletes_at_once_lose_nothing(store: Store, database: Database) -> None:
    """What a response said is always found whole, whatever was deleted and swept beside it."""
    background = Background(store, owner="srv_test")
    dice = random.Random(7)
    expected: dict[str, list[str]] = {}

    async def speak(number: int) -> None:
        previous = dice.choice([None, *expected])
        try:
            past = await store.past_of(ME, previous) if previous is not None else Past()
        except NotFound:
            return
        one = answered(past, dice.choice("abc"), f"said {number}")
        await store.keep(one)
        expected[one.id] = [*words(past), one.asked[0].content.decode(), f"said {number}"]

    async def delete() -> None:
        if expected:
            one = dice.choice(list(expected))
            del expected[one]
            await background.delete(ME, one)

    def act(number: int) -> Callable[[], Any]:
        return dice.choice([lambda: speak(number), lambda: speak(number), delete, store.sweep])

    for round_ in range(15):
        await asyncio.gather(*(act(round_ * 8 + number)() for number in range(8)))
    await swept(store)
    assert expected
    for one, said in expected.items():
        assert words(await store.past_of(ME, one)) == said
    for one in list(expected):
        await background.delete(ME, one)
    await swept(store)
    assert await count(database, response_items) == 0
    assert await count(database, response_segments) == 0
