"""What a batch goes through, below HTTP and on both databases: limits, budgets, expiry, crashes, memory."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import bindparam, select, update

from nimbos.batches import Batch, Batches, Endpoint, Reply, State
from nimbos.batches.running import CONCURRENT
from nimbos.batches.words import OVER
from nimbos.blobs import open_blobs
from nimbos.config import BatchSettings, Settings
from nimbos.db import Database, Statement, Transaction
from nimbos.db.tables.batches import batch_lines
from nimbos.db.tables.batches import batches as batch_table
from nimbos.db.tables.work import work as work_table
from nimbos.errors import BudgetExhausted, EngineFailed, InvalidRequest, NimbosError, Overloaded
from nimbos.types import Account, Origin
from nimbos.work import LEASE_S, Work

PATIENCE_S = 60
ENDPOINT = "/v1/echo"
ALICE = Account(id="proj_alice", name="Alice", key="key_alice")
BOB = Account(id="proj_bob", name="Bob", key="key_bob")
_WINDOW_OVER = Statement(update(batch_table).where(batch_table.c.id == bindparam("of")).values(expires_ms=1))
_LINES = Statement(select(batch_lines.c.number).where(batch_lines.c.batch == bindparam("of")))
_WORK = Statement(select(work_table.c.ref))

Answer = Callable[[dict[str, Any]], Reply]


class Echo:
    """An endpoint that answers with what it got, and does first what a test wants."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.accounts: list[Account] = []
        self.failures: list[NimbosError] = []
        self.gate: asyncio.Event | None = None

    async def __call__(self, account: Account, body: bytes, *, origin: Origin, journal: Any = None) -> Reply:
        self.accounts.append(account)
        if self.failures:
            raise self.failures.pop()
        if self.gate is not None:
            await self.gate.wait()
        self.asked.append(json.loads(body))
        return Reply(200, body, f"ask_{origin.batch}")

    def endpoint(self) -> Endpoint:
        return Endpoint(path=ENDPOINT, perform=self, refuse=lambda error: json.dumps({"no": error.code}).encode())


class Shop:
    """One server's batches. `lease_s`: short for a server that is to lose its lines; a machine that stands still for so
    long takes them from any other, too."""

    def __init__(self, database: Database, home: Path, *, lease_s: float = LEASE_S, **limits: int) -> None:
        self.database = database
        self.echo = Echo()
        settings = Settings(home=str(home))
        self.blobs = open_blobs(settings, database)
        self.batches = Batches(
            database,
            self.blobs,
            BatchSettings(**limits),
            server_id=f"srv_{id(self)}",
            work=Work(database, lease_s=lease_s),
        )

    def hurry(self) -> None:
        """What is tried again is looked for at once, and not each second."""
        for crew in (self.batches._jobs, self.batches._lines):
            crew._poll_s = 0.02

    async def open(self) -> None:
        self.batches.serve([self.echo.endpoint()])
        await self.batches.start()

    async def submit(self, lines: list[bytes], *, account: Account = ALICE) -> Batch:
        async def pieces() -> AsyncIterator[bytes]:
            for line in lines:
                yield line + b"\n"

        files = self.batches.files
        file = await files.keep(account, await files.receive(pieces()), filename="a.jsonl", purpose="batch")
        batch = await self.batches.desk.create(
            account, dialect="openai", endpoint=ENDPOINT, input_file=file.id, completion_window="24h", window_s=86_400
        )
        self.batches.wake()
        return batch

    async def until(self, batch: Batch, wanted: Callable[[Batch], bool]) -> Batch:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = await self.batches.desk.get(batch.project, batch.id, dialect="openai")
                if wanted(found):
                    return found
                await asyncio.sleep(0.01)

    async def over(self, batch: Batch) -> Batch:
        return await self.until(batch, lambda found: found.state in OVER)

    async def rows(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        file = await self.batches.files.get(ALICE.id, file_id)
        content = b"".join([piece async for piece in self.batches.files.read(file)])
        return [json.loads(line) for line in content.splitlines()]

    async def set(self, statement: Statement, batch: Batch) -> None:
        def begin() -> Transaction[None]:
            yield statement(of=batch.id)

        await self.database.run(begin)


@pytest.fixture
async def shop(database: Database, tmp_path: Path) -> AsyncIterator[Shop]:
    made = Shop(database, tmp_path, lines_at_once=8)
    await made.open()
    yield made
    await made.batches.close()


def line(custom_id: str, **body: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body}).encode()


async def test_answers_are_kept_in_order_and_nothing_of_the_work_is_left(shop: Shop) -> None:
    batch = await shop.over(await shop.submit([line(f"{n}", n=n) for n in range(30)]))
    assert batch.state is State.COMPLETED
    rows = await shop.rows(batch.output_file)
    assert [(row["custom_id"], row["response"]["body"]) for row in rows] == [(f"{n}", {"n": n}) for n in range(30)]
    assert {account.scopes for account in shop.echo.accounts} == {frozenset({"class:batch"})}
    async with asyncio.timeout(PATIENCE_S):
        while await shop.database.read(_WORK()) or await shop.database.read(_LINES(of=batch.id)):
            await asyncio.sleep(0.01)


async def test_a_limit_makes_the_batch_wait_and_no_line_fail(shop: Shop) -> None:
    limit = Overloaded(limit="requests", value=1, used=1, retry_after_s=0.2)
    shop.echo.failures = [limit] * 20
    batch = await shop.over(await shop.submit([line(f"{n}") for n in range(10)]))
    assert (batch.completed, batch.failed, batch.waiting_for) == (10, 0, None)


async def test_a_limit_on_requests_is_met_about_once_a_line_not_once_a_place(shop: Shop) -> None:
    refused, allowed = 0, 0

    async def limited(account: Account, body: bytes, *, origin: Origin, journal: Any = None) -> Reply:
        nonlocal refused, allowed
        if allowed <= 0:
            refused += 1
            allowed = 1
            raise Overloaded(limit="requests", value=1, used=1, retry_after_s=0.01)
        allowed -= 1
        return Reply(200, body, "ask")

    shop.batches.serve([Endpoint(path=ENDPOINT, perform=limited, refuse=lambda error: b"{}")])
    batch = await shop.over(await shop.submit([line(f"{n}") for n in range(30)]))
    assert (batch.completed, batch.failed) == (30, 0)
    assert refused <= 60


async def test_a_limit_on_concurrent_asks_is_kept_to_without_a_pause(shop: Shop) -> None:
    busy, most = 0, 0
    full = asyncio.Event()

    async def limited(account: Account, body: bytes, *, origin: Origin, journal: Any = None) -> Reply:
        nonlocal busy, most
        if busy >= 2:
            raise Overloaded(limit=CONCURRENT, value=2, used=2, retry_after_s=0.1)
        busy += 1
        most = max(most, busy)
        if busy == 2:
            full.set()
        await full.wait()  # the first until there is a second
        await asyncio.sleep(0)
        busy -= 1
        return Reply(200, body, "ask")

    shop.batches.serve([Endpoint(path=ENDPOINT, perform=limited, refuse=lambda error: b"{}")])
    batch = await shop.over(await shop.submit([line(f"{n}") for n in range(40)]))
    assert (batch.completed, batch.failed, most) == (40, 0, 2)


async def test_a_spent_budget_pauses_the_batch_says_so_and_a_raised_one_lets_it_go_on(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nimbos.batches.running.WAIT_MOST_S", 0.3)
    spent = BudgetExhausted(owner="key a", meter="tokens", period="total", limit=5, used=5, retry_after_s=None)
    shop.echo.failures = [spent] * 1000
    made = await shop.submit([line(f"{n}") for n in range(10)])
    waiting = await shop.until(made, lambda found: found.waiting_for is not None)
    assert waiting.state is State.IN_PROGRESS
    assert waiting.waiting_for == spent.message
    assert waiting.failed == 0
    shop.echo.failures = []  # somebody has raised it
    batch = await shop.over(made)
    assert (batch.completed, batch.failed, batch.waiting_for) == (10, 0, None)


async def test_a_line_that_no_budget_can_ever_pay_holds_up_no_other(shop: Shop) -> None:
    never = BudgetExhausted(
        owner="key a", meter="tokens", period="day", limit=5, used=0, retry_after_s=None, too_small=True
    )
    shop.echo.failures = [never]
    batch = await shop.over(await shop.submit([line(f"{n}") for n in range(3)]))
    assert (batch.state, batch.completed, batch.failed) == (State.COMPLETED, 2, 1)
    (row,) = await shop.rows(batch.error_file)
    assert row["response"]["status_code"] == 429 and row["response"]["body"] == {"no": "insufficient_quota"}


async def test_a_window_that_ends_keeps_what_is_done_and_says_what_is_not(shop: Shop) -> None:
    spent = BudgetExhausted(owner="key a", meter="tokens", period="total", limit=5, used=5, retry_after_s=None)
    shop.echo.failures = [spent] * 1000
    made = await shop.submit([line(f"{n}") for n in range(10)])
    await shop.until(made, lambda found: found.waiting_for is not None)
    await shop.set(_WINDOW_OVER, made)
    await shop.batches.expire()
    batch = await shop.over(made)
    assert batch.state is State.EXPIRED
    assert (batch.total, batch.completed, batch.failed) == (10, 0, 10)
    rows = await shop.rows(batch.error_file)
    assert [(row["custom_id"], row["error"]["code"]) for row in rows] == [(f"{n}", "batch_expired") for n in range(10)]


async def test_a_line_that_the_route_refuses_is_answered_with_its_error(shop: Shop) -> None:
    shop.echo.failures = [InvalidRequest("Not like this.")]
    batch = await shop.over(await shop.submit([line("a")]))
    assert batch.state is State.COMPLETED
    (row,) = await shop.rows(batch.error_file)
    assert row["response"]["status_code"] == 400
    assert row["response"]["body"] == {"no": "invalid_request"}


@pytest.mark.parametrize(
    "now", [{"routes": frozenset({"/v1/other"})}, {"scopes": frozenset({"class:interactive"})}], ids=["route", "class"]
)
async def test_what_a_key_may_not_use_any_more_is_refused_in_each_line(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, now: dict[str, Any]
) -> None:
    """As it would be refused to submit the batch."""

    async def narrowed(account: Account) -> Account:
        return msgspec.structs.replace(account, **now)

    monkeypatch.setattr(shop.batches._running, "_resolve", narrowed)
    batch = await shop.over(await shop.submit([line("a"), line("b")]))
    rows = await shop.rows(batch.error_file)
    assert [(row["response"]["status_code"], row["response"]["body"]) for row in rows] == [
        (403, {"no": "forbidden"})
    ] * 2
    assert shop.echo.asked == []


async def test_an_engine_that_fails_is_tried_again(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nimbos.batches.running._RETRY_S", 0.01)
    shop.hurry()
    shop.echo.failures = [EngineFailed("It died.")] * 4
    batch = await shop.over(await shop.submit([line("a")]))
    assert (batch.completed, batch.failed) == (1, 0)
    shop.echo.failures = [EngineFailed("It died.")] * 5
    batch = await shop.over(await shop.submit([line("a")]))
    assert (batch.completed, batch.failed) == (0, 1)


async def test_a_line_that_met_limits_may_see_as_many_engines_fail_as_any_other(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nimbos.batches.running._RETRY_S", 0.01)
    shop.hurry()
    met = Overloaded(limit="requests", value=1, used=1, retry_after_s=0.01)
    shop.echo.failures = [EngineFailed("It died.")] * 4 + [met] * 5  # from the end
    batch = await shop.over(await shop.submit([line("a")]))
    assert (batch.completed, batch.failed) == (1, 0)


async def test_two_servers_share_a_batch_and_none_of_its_lines(database: Database, tmp_path: Path) -> None:
    one, two = Shop(database, tmp_path, lines_at_once=3), Shop(database, tmp_path, lines_at_once=3)
    await one.open()
    await two.open()
    one.echo.gate, two.echo.gate = asyncio.Event(), asyncio.Event()
    made = await one.submit([line(f"{n}", n=n) for n in range(50)])
    async with asyncio.timeout(PATIENCE_S):
        while not (one.echo.accounts and two.echo.accounts):
            await asyncio.sleep(0.01)
    one.echo.gate.set()
    two.echo.gate.set()
    batch = await one.over(made)
    await one.batches.close()
    await two.batches.close()
    assert batch.completed == 50
    assert sorted(body["n"] for body in (*one.echo.asked, *two.echo.asked)) == list(range(50))
    assert one.echo.asked and two.echo.asked


async def test_a_server_that_falls_silent_loses_its_lines_to_another(database: Database, tmp_path: Path) -> None:
    silent, other = (Shop(database, tmp_path, lease_s=0.5, lines_at_once=4) for _ in range(2))
    silent.echo.gate = asyncio.Event()
    await silent.open()
    made = await silent.submit([line(f"{n}", n=n) for n in range(12)])
    async with asyncio.timeout(PATIENCE_S):
        while len(silent.echo.accounts) < 4:
            await asyncio.sleep(0.01)
    silent.batches._lines._tops[1].cancel()  # it renews no lease any more, and its lines hang
    await other.open()
    batch = await other.over(made)
    assert batch.completed == 12
    silent.echo.gate.set()  # it wakes, too late: what it has is refused
    rows = await other.rows(batch.output_file)
    assert [row["custom_id"] for row in rows] == [f"{n}" for n in range(12)]
    await silent.batches.close()
    await other.batches.close()
    found = await other.batches.desk.get(ALICE.id, made.id, dialect="openai")
    assert (found.completed, found.failed) == (12, 0)


async def test_more_lines_than_allowed_fail_before_any_is_asked(database: Database, tmp_path: Path) -> None:
    shop = Shop(database, tmp_path, lines=20)
    await shop.open()
    batch = await shop.over(await shop.submit([line(f"{n}") for n in range(21)]))
    await shop.batches.close()
    assert batch.state is State.FAILED
    assert [fault.code for fault in batch.errors] == ["too_many_lines"]
    assert shop.echo.asked == []


async def test_a_line_that_is_too_long_is_an_error_row(database: Database, tmp_path: Path) -> None:
    shop = Shop(database, tmp_path, line_bytes=200)
    await shop.open()
    batch = await shop.over(await shop.submit([line("a"), line("b", text="x" * 1000), line("c")]))
    rows, errors = await shop.rows(batch.output_file), await shop.rows(batch.error_file)
    await shop.batches.close()
    assert [row["custom_id"] for row in rows] == ["a", "c"]
    assert [row["error"]["code"] for row in errors] == ["line_too_long"]


@pytest.mark.long
async def test_fifty_thousand_lines_are_read_in_bounded_memory(database: Database, tmp_path: Path) -> None:
    """100 MB of lines; a reader that held them would show."""
    shop = Shop(database, tmp_path)
    padding = "x" * 1900
    made = await shop.submit([line(f"{n:05}", text=padding) for n in range(50_000)])
    tracemalloc.start()
    try:
        await shop.batches.start()  # without an endpoint: nothing is asked yet
        batch = await shop.until(made, lambda found: found.state is not State.VALIDATING)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    await shop.batches.close()
    assert (batch.state, batch.total, batch.failed) == (State.IN_PROGRESS, 50_000, 0)
    assert peak_bytes < 32 * 2**20


async def test_validation_goes_on_after_a_crash_without_a_line_lost_or_twice(
    database: Database, tmp_path: Path
) -> None:
    first = Shop(database, tmp_path)
    lines = [line(f"{n:05}") for n in range(1_200)]
    lines[1_100:1_100] = [line("00010"), b"{"]
    made = await first.submit(lines)
    await first.batches.start()
    await first.until(made, lambda found: found.validated_lines > 0)
    await first.batches.close()  # in the middle of reading
    second = Shop(database, tmp_path)
    await second.open()
    batch = await second.over(made)
    rows, errors = await second.rows(batch.output_file), await second.rows(batch.error_file)
    await second.batches.close()
    assert [row["custom_id"] for row in rows] == [f"{n:05}" for n in range(1_200)]
    assert [row["error"]["code"] for row in errors] == ["duplicate_custom_id", "invalid_json_line"]


@pytest.fixture
async def shops(database: Database, tmp_path: Path) -> AsyncIterator[Callable[..., Shop]]:
    """Servers that are closed also where a test fails: what hangs in them would hang the whole run."""
    made: list[Shop] = []

    def make(**limits: int) -> Shop:
        made.append(Shop(database, tmp_path, **limits))
        return made[-1]

    yield make
    for shop in made:
        await shop.batches.close()


async def test_many_batches_of_one_project_leave_room_for_another_projects(
    shops: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than are looked at at once, each with more lines than there are places."""
    monkeypatch.setattr("nimbos.batches.jobs._OPEN_MAX", 3)
    shop = shops(lines_at_once=4)
    busy, go = 0, asyncio.Semaphore(0)

    async def slow_for_alice(account: Account, body: bytes, *, origin: Origin, journal: Any = None) -> Reply:
        nonlocal busy
        if account.id == ALICE.id:
            busy += 1
            await go.acquire()
        return Reply(200, body, "ask")

    shop.batches.serve([Endpoint(path=ENDPOINT, perform=slow_for_alice, refuse=lambda error: b"{}")])
    await shop.batches.start()
    many = [await shop.submit([line(f"{n}") for n in range(8)]) for _ in range(5)]
    for made in many:
        await shop.until(made, lambda found: found.state is State.IN_PROGRESS)
    async with asyncio.timeout(PATIENCE_S):
        while busy < 4:
            await asyncio.sleep(0.01)
    single = await shop.submit([line(f"{n}") for n in range(3)], account=BOB)
    await shop.until(single, lambda found: found.state is State.IN_PROGRESS)
    go.release()  # one place becomes free: three lines go through it, one after the other
    assert (await shop.over(single)).completed == 3
    assert busy <= 5


async def test_files_of_one_project_that_are_to_be_read_hold_up_no_other_projects(
    shops: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = shops()
    shop.hurry()
    read, go = [], asyncio.Semaphore(0)
    run = shop.batches._validating.run

    async def slow_for_alice(batch: Batch, *arguments: Any, **named: Any) -> bool:
        read.append(batch.project)
        if batch.project == ALICE.id:
            await go.acquire()
        return await run(batch, *arguments, **named)

    monkeypatch.setattr(shop.batches._validating, "run", slow_for_alice)
    many = [await shop.submit([line("a")]) for _ in range(4)]
    await shop.open()
    async with asyncio.timeout(PATIENCE_S):
        while len(read) < 2:
            await asyncio.sleep(0.01)
    single = await shop.submit([line("a")], account=BOB)
    go.release()  # of two that are being read one goes on
    async with asyncio.timeout(PATIENCE_S):
        while len(read) < 3:
            await asyncio.sleep(0.01)
    assert read[:3] == [ALICE.id, ALICE.id, BOB.id]
    for _ in many:
        go.release()
    for made in (*many, single):
        assert (await shop.over(made)).completed == 1


async def test_a_project_has_no_more_open_batches_than_it_may(shops: Callable[..., Shop]) -> None:
    shop = shops(open_batches=2)
    made = [await shop.submit([line("a")]) for _ in range(2)]
    with pytest.raises(Overloaded, match="'open batches' of 2 of the project 'Alice'"):
        await shop.submit([line("a")])
    await shop.submit([line("a")], account=BOB)
    await shop.open()
    for batch in made:
        await shop.over(batch)
    await shop.over(await shop.submit([line("a")]))


async def test_batches_that_are_made_at_once_are_no_more_than_there_may_be(
    database: Database, shops: Callable[..., Shop]
) -> None:
    """Each sees the others, whichever server they come to."""
    made = [shops(open_batches=2) for _ in range(2)]

    async def content() -> AsyncIterator[bytes]:
        yield line("a")

    files = [
        await made[0].batches.files.keep(
            ALICE, await made[0].batches.files.receive(content()), filename="a.jsonl", purpose="batch"
        )
        for _ in range(8)
    ]
    told = await asyncio.gather(
        *(
            made[number % 2].batches.desk.create(
                ALICE, dialect="openai", endpoint=ENDPOINT, input_file=file.id, completion_window="24h", window_s=86_400
            )
            for number, file in enumerate(files)
        ),
        return_exceptions=True,
    )
    assert sorted(type(one).__name__ for one in told) == ["Batch"] * 2 + ["Overloaded"] * 6


async def test_a_line_that_was_only_claimed_when_its_batch_was_cancelled_is_not_begun(
    shops: Callable[..., Shop],
) -> None:
    shop = shops()
    batches = shop.batches
    batches.serve([shop.echo.endpoint()])
    batches._jobs.start()
    batch = await shop.submit([line("a"), line("b")])
    await shop.until(batch, lambda found: found.state is State.IN_PROGRESS)
    claims = await shop.database.run(lambda: batches._claim_lines(2))
    assert len(claims) == 2
    await batches.desk.cancel(batch.project, batch.id, dialect="openai")
    batches.wake()
    for claim in claims:
        await batches._running.run(claim)
    over = await shop.over(batch)
    assert (over.state, over.completed, over.failed) == (State.CANCELLED, 0, 2)
    assert shop.echo.asked == []
    assert [row["error"]["code"] for row in await shop.rows(over.error_file)] == ["batch_cancelled"] * 2


async def test_windows_end_while_what_lapsed_is_being_removed(
    shops: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred uploads of ten thousand parts take a while."""
    monkeypatch.setattr("nimbos.batches.jobs.SWEEP_S", 0.01)
    shop = shops()
    sweeping, never = asyncio.Event(), asyncio.Event()

    async def sweep() -> int:
        sweeping.set()
        await never.wait()
        return 0

    monkeypatch.setattr(shop.batches.uploads, "sweep", sweep)
    made = await shop.submit([line("a")])
    await shop.batches.start()  # without an endpoint: nothing is answered
    await shop.until(made, lambda found: found.state is State.IN_PROGRESS)
    async with asyncio.timeout(PATIENCE_S):
        await sweeping.wait()
    await shop.set(_WINDOW_OVER, made)
    assert (await shop.over(made)).state is State.EXPIRED


async def test_a_batch_that_is_deleted_before_it_was_tidied_leaves_nothing(
    shops: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its server ends in between, and piece by piece: its answers may be many."""
    monkeypatch.setattr("nimbos.batches.finishing._REMOVED_AT_ONCE", 100)
    shop = shops(lines=510)
    kept = asyncio.Event()

    async def untidy(*_: Any) -> None:
        kept.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patched:
        patched.setattr(shop.batches._finishing, "clean", untidy)
        await shop.open()
        done = await shop.over(await shop.submit([line(f"{n}") for n in range(5)]))
        failed = await shop.over(await shop.submit([line(f"{n}") for n in range(600)]))
        async with asyncio.timeout(PATIENCE_S):
            await kept.wait()
        await shop.batches.close()
    assert (done.state, failed.state) == (State.COMPLETED, State.FAILED)
    for batch in (done, failed):
        await shop.batches.desk.delete(ALICE.id, batch.id, dialect="openai")
    assert await shop.database.read(_LINES(of=done.id)) != []
    other = shops()
    await other.open()
    async with asyncio.timeout(PATIENCE_S):
        while await shop.database.read(_WORK()) or await shop.database.read(_LINES(of=done.id)):
            await asyncio.sleep(0.01)
