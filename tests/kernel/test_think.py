"""A generation survives whatever ends it: it goes on behind its last token, and its tokens are paid for once."""

from __future__ import annotations

import asyncio
import gc

import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.errors import EngineFailed
from nimbos.kernel import Delta, Event, Reason, SignalKind, State
from nimbos.kernel.answering import PARTIAL_TOKENS
from nimbos.kernel.events import BudgetExhausted, ModelDone, ModelFailed, ModelIntent, ModelPartial
from nimbos.kernel.think import _put_away
from nimbos.ledger import Allowance
from tests.kernel.minds import ACCOUNT, Minds, minds, words
from tests.kernel.running import told

PROMPT_TOKENS = 4  # "Be brief." and "go" as the scripted model counts
LONG = 300
SLOW = {"replies": [{"match": "^go$", **words(LONG, rate=200)}]}
TEXT = words(LONG)["text"]


async def emitted(place: Minds, pid: str) -> list[int]:
    return [id for body in await place.bodies_of(pid) if isinstance(body, ModelPartial) for id in body.ids]


async def holds(place: Minds, pid: str, *, output: int = LONG) -> None:
    """The ledger, the log's sums and one undisturbed answer say the same."""
    billed, view = await place.billed(pid), await place.view(pid)
    assert (billed.input, billed.output) == (PROMPT_TOKENS, output)
    assert view.used["tokens"] == PROMPT_TOKENS + output
    ids = await emitted(place, pid)
    assert ids == list(range(len(ids)))


async def test_partials_are_written_every_few_dozen_tokens(database: Database, database_settings: Settings) -> None:
    async with minds(database, database_settings, {"default": words(LONG)}) as place:
        pid = await place.run(await place.program())
        assert await place.result(pid) == TEXT
        sizes = [len(body.ids) for body in await place.bodies_of(pid) if isinstance(body, ModelPartial)]
        assert sizes == [PARTIAL_TOKENS] * (LONG // PARTIAL_TOKENS)
        await holds(place, pid)


async def test_a_pause_stops_a_generation_and_a_resume_goes_on_with_it(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, SLOW) as place:
        pid = await place.run(await place.program())
        for pause in range(3):
            await place.until_partial(pid, tokens=1 + pause * PARTIAL_TOKENS)
            await place.send(pid, SignalKind.PAUSE)
            parked = await place.until(pid, State.PAUSED)
            assert parked.reason is Reason.USER
            await place.send(pid, SignalKind.RESUME)
        assert await place.result(pid) == TEXT
        bodies = await place.bodies_of(pid)
        intents = [body for body in bodies if isinstance(body, ModelIntent)]
        assert [body.continues for body in intents] == ["", *(body.ask_id for body in intents[:-1])]
        assert all(body.again for body in bodies if isinstance(body, ModelFailed))
        await holds(place, pid)


@pytest.mark.parametrize(
    ("signal", "reason"), [(SignalKind.KILL, Reason.KILLED), (SignalKind.CANCEL, Reason.CANCELLED)]
)
async def test_an_end_takes_effect_in_the_middle_of_a_generation(
    database: Database, database_settings: Settings, signal: SignalKind, reason: Reason
) -> None:
    endless = {"default": words(5_000, rate=200)}
    async with minds(database, database_settings, endless) as place:
        pid = await place.run(await place.program())
        await place.until_partial(pid)
        await place.send(pid, signal)
        assert (await place.over(pid)).reason is reason
        billed, ids = await place.billed(pid), await emitted(place, pid)
        assert len(ids) <= billed.output < 5_000
        view = await place.view(pid)
        assert view.used["tokens"] == billed.input + billed.output


async def test_a_server_that_stops_hands_a_generation_to_the_next(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, SLOW, server="one") as place:
        pid = await place.run(await place.program())
        await place.until_partial(pid)
    async with minds(database, database_settings, SLOW, server="two") as place:
        assert await place.result(pid) == TEXT
        await holds(place, pid)


async def test_a_budget_that_ends_in_a_generation_keeps_it_and_a_top_up_goes_on(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, SLOW) as place:
        pid = await place.run(await place.program(), budget=Allowance(tokens=100))
        parked = await place.until(pid, State.ASKING)
        assert parked.reason is Reason.BUDGET
        assert len(await emitted(place, pid)) == 100 - PROMPT_TOKENS
        await holds(place, pid, output=100 - PROMPT_TOKENS)
        (told,) = [body for body in await place.bodies_of(pid) if isinstance(body, BudgetExhausted)]
        assert (told.meter, told.limit, told.used) == ("tokens", 100, 100)
        await place.kernel.top_up(ACCOUNT, pid, Allowance(tokens=1_000), source="user:test", external_id="more")
        assert await place.result(pid) == TEXT
        await holds(place, pid)


async def test_a_changed_question_begins_a_new_answer(database: Database, database_settings: Settings) -> None:
    """Another model under the same name: its token ids mean something else."""
    async with minds(database, database_settings, SLOW, server="one") as place:
        pid = await place.run(await place.program())
        await place.until_partial(pid)
    other = {"default": {"text": "something else"}}
    async with minds(database, database_settings, other, server="two", model_hash="1" * 64) as place:
        assert await place.result(pid) == "something else"
        bodies = await place.bodies_of(pid)
        assert [body.continues for body in bodies if isinstance(body, ModelIntent)] == ["", ""]
        assert [body.model_hash for body in bodies if isinstance(body, ModelDone)] == ["1" * 64]


async def test_whoever_follows_reads_the_words_as_they_come(database: Database, database_settings: Settings) -> None:
    async with minds(database, database_settings, {"default": words(100)}, start=False) as place:
        pid = await place.run(await place.program())
        following = asyncio.create_task(told(place, pid))
        while not place.kernel.bells.followed(pid):
            await asyncio.sleep(0)
        await place.kernel.start()
        heard = await following
        assert "".join(one.text for one in heard if isinstance(one, Delta)) == words(100)["text"]
        assert [one.kind for one in heard if isinstance(one, Event)] == await place.kinds(pid)


async def test_a_person_who_watches_does_not_wait_behind_agents(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, {"default": words(3)}, start=False) as place:
        program = await place.program()
        watched, alone = await place.run(program), await place.run(program)
        with place.kernel.watching(watched):
            await place.kernel.start()
            await place.result(watched)
        await place.result(alone)
        assert place.shop is not None
        rows = {row["process"]: row["class"] for row in (await place.shop.rows()).values()}
        assert rows == {watched: "interactive", alone: "agent"}


async def test_a_fork_in_the_middle_of_an_answer_goes_on_apart_and_pays_for_itself(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, SLOW) as place:
        pid = await place.run(await place.program())
        await place.until_partial(pid)
        await place.send(pid, SignalKind.PAUSE)
        await place.until(pid, State.PAUSED)
        kept = len(await emitted(place, pid))
        (fork,) = await place.kernel.fork(ACCOUNT, pid)
        assert await place.result(fork) == TEXT
        billed = await place.billed(fork)
        assert (billed.input, billed.output) == (PROMPT_TOKENS, LONG - kept)
        await place.send(pid, SignalKind.RESUME)
        assert await place.result(pid) == TEXT
        await holds(place, pid)


async def test_a_generation_that_fails_while_it_is_stopped_is_nobodys_surprise() -> None:
    """Whoever is stopped does not tell any more what it failed of."""
    told: list[dict[str, object]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context))

    async def fail() -> None:
        raise EngineFailed("It broke.")

    async def fail_at_the_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise EngineFailed("It broke while it was stopped.")

    failed, failing = asyncio.create_task(fail()), asyncio.create_task(fail_at_the_end())
    await asyncio.wait({failed})
    await _put_away(None, failed, failing)
    assert failing.done()
    del failed, failing
    gc.collect()
    await asyncio.sleep(0)
    gc.collect()
    assert told == []
