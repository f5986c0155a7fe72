"""Children: a family is one tree. What a child came to reaches its parent, and nobody outlives whoever made them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from nimbos.config import Settings
from nimbos.db import Database, Transaction
from nimbos.errors import BudgetExhausted, Conflict, InvalidRequest, Overloaded
from nimbos.kernel import Reason, SignalKind, State, budgets, heads
from nimbos.kernel.children import Birth, create
from nimbos.kernel.holding import Holding
from nimbos.types import new_id
from tests.kernel.running import ACCOUNT, Body, Place, running


async def bear(
    holding: Holding, name: str, *, detached: bool = False, depth_most: int = 9, children_most: int = 99
) -> str:
    """As the gate does: the child is a row of the transaction that says so."""
    shared, view = holding._shared, holding.view
    birth = Birth(
        pid=new_id("proc"),
        account=holding.account,
        program=view.program,
        name=name,
        input=view.input,
        model=view.model,
        parent=holding.pid,
        detached=detached,
        key=f"{holding.pid}/{name}",
        depth_most=depth_most,
        children_most=children_most,
    )

    def begin() -> Transaction[list[object]]:
        yield from budgets.make(birth.pid, None, holding.pid)
        yield from create(shared.log, shared.work, birth)
        return []

    await shared.database.run(begin, durable=True)
    shared.bells.work()
    return birth.pid


async def answer(holding: Holding) -> None:
    await holding.exit(Reason.OK, result=await holding.put(f"the answer of {holding.view.name}"))


async def wait_for_ever(holding: Holding) -> None:
    await holding.take_mail()
    await holding.park(State.WAITING, Reason.SIGNAL)


def parent_of(*names: str, then: Callable[[Holding], bool]) -> Body:
    """Bears children with these names, and exits once `then` says so of the exits it was told of."""

    async def drive(holding: Holding) -> None:
        if not await family_of(holding):
            for name in names:
                await bear(holding, name)
        await holding.take_mail()
        if then(holding):
            await holding.exit(Reason.OK)
        await holding.park(State.WAITING, Reason.CHILD)

    return drive


async def family_of(holding: Holding) -> list[str]:
    rows = await holding._shared.database.read(heads.family(holding.pid))
    return [row["id"] for row in rows if row["id"] != holding.pid]


def exits(holding: Holding) -> dict[str, Reason]:
    return {one.about: one.reason for one in holding.view.signals if one.signal is SignalKind.CHILD_EXIT}


async def names_of(place: Place, pid: str) -> dict[str, str]:
    return {head.name: head.pid for head in await place.kernel.tree(ACCOUNT, pid)}


async def test_a_childs_exit_is_a_signal_with_its_result(database: Database, database_settings: Settings) -> None:
    heard: dict[str, object] = {}

    async def listen(holding: Holding) -> None:
        if not await family_of(holding):
            await bear(holding, "child")
        await holding.take_mail()
        for one in holding.view.signals:
            assert one.body is not None
            heard["reason"] = one.reason
            heard["result"] = await holding._shared.segments.get(holding.account.id, one.body)
            await holding.exit(Reason.OK)
        await holding.park(State.WAITING, Reason.CHILD)

    async with running(database, database_settings, {"plain": listen, "child": answer}) as place:
        pid = await place.spawn()
        await place.over(pid)
        assert heard == {"reason": Reason.OK, "result": "the answer of child"}


async def test_many_children_that_end_at_once_are_all_heard(database: Database, database_settings: Settings) -> None:
    names = [f"child {number}" for number in range(12)]
    parent = parent_of(*names, then=lambda holding: len(exits(holding)) == len(names))
    bodies = {"plain": parent, **dict.fromkeys(names, answer)}
    async with running(database, database_settings, bodies) as place:
        pid = await place.spawn()
        assert (await place.over(pid)).reason is Reason.OK
        family = await place.kernel.tree(ACCOUNT, pid)
        assert [head.depth for head in family] == [0, *[1] * 12]
        assert {head.state for head in family} == {State.DONE}


async def test_a_parents_exit_cancels_the_whole_family_but_not_who_is_detached(
    database: Database, database_settings: Settings
) -> None:
    born = asyncio.Event()
    go = asyncio.Event()

    async def grandparent(holding: Holding) -> None:
        await bear(holding, "child")
        await bear(holding, "free", detached=True)
        await go.wait()
        await holding.exit(Reason.OK)

    async def child(holding: Holding) -> None:
        if not await family_of(holding):
            await bear(holding, "grandchild")
        born.set()
        await wait_for_ever(holding)

    bodies = {"plain": grandparent, "child": child, "grandchild": wait_for_ever, "free": wait_for_ever}
    async with running(database, database_settings, bodies) as place:
        pid = await place.spawn()
        await born.wait()
        named = await names_of(place, pid)
        for name in ("child", "grandchild", "free"):
            await place.until(named[name], State.WAITING)
        go.set()
        await place.over(pid)
        for name in ("child", "grandchild"):
            assert (await place.over(named[name])).reason is Reason.CANCELLED
        assert (await place.head(named["free"])).state is State.WAITING
        await place.send(named["free"], SignalKind.KILL)
        await place.over(named["free"])


async def test_more_for_a_parent_reaches_a_child_that_is_about_to_ask_for_it(
    database: Database, database_settings: Settings
) -> None:
    """The child was refused before, and parks behind: nothing would wake it."""
    refused: list[BudgetExhausted] = []

    async with running(
        database, database_settings, {"plain": parent_of("child", then=lambda at: bool(exits(at)))}
    ) as place:

        async def child(holding: Holding) -> None:
            await holding.take_mail()
            if refused:
                await holding.exit(Reason.OK)
            assert holding.view.parent is not None
            try:
                await database.run(lambda: budgets.reserve_call(holding.pid, "c1", deadline_ms=1_000))
            except BudgetExhausted as error:
                refused.append(error)
                more = budgets.Allowance(calls=5)
                await place.kernel.top_up(ACCOUNT, holding.view.parent, more, source="user:test", external_id="more")
                await budgets.exhausted(holding, error)

        place.bodies["child"] = child
        pid = await place.spawn(budget=budgets.Allowance(calls=0))
        assert (await place.over(pid)).reason is Reason.OK
        assert len(refused) == 1


async def test_more_for_a_parent_reaches_a_child_that_was_sent_something_with_the_same_id(
    database: Database, database_settings: Settings
) -> None:
    async def child(holding: Holding) -> None:
        await holding.take_mail()
        try:
            await database.run(lambda: budgets.reserve_call(holding.pid, "c1", deadline_ms=1_000))
        except BudgetExhausted as error:
            await budgets.exhausted(holding, error)
        await holding.exit(Reason.OK)

    bodies = {"plain": parent_of("child", then=lambda holding: bool(exits(holding))), "child": child}
    async with running(database, database_settings, bodies) as place:
        pid = await place.spawn(budget=budgets.Allowance(calls=0))
        await place.until(pid, State.WAITING)
        one = (await names_of(place, pid))["child"]
        asked = await place.until(one, State.ASKING)
        await place.send(one, SignalKind.MESSAGE, body="the first for you", id="1")
        await place.until(one, State.ASKING, after=asked.seq)
        more = budgets.Allowance(calls=5)
        assert await place.kernel.top_up(ACCOUNT, pid, more, source="user:test", external_id="1")
        assert (await place.over(pid)).reason is Reason.OK
        assert (await place.over(one)).reason is Reason.OK


@pytest.mark.parametrize("kind", [SignalKind.KILL, SignalKind.CANCEL])
async def test_a_child_that_is_ended_from_outside_is_told_of(
    database: Database, database_settings: Settings, kind: SignalKind
) -> None:
    parent = parent_of("child", then=lambda holding: bool(exits(holding)))
    bodies = {"plain": parent, "child": wait_for_ever}
    async with running(database, database_settings, bodies) as place:
        pid = await place.spawn()
        await place.until(pid, State.WAITING)
        child = (await names_of(place, pid))["child"]
        await place.until(child, State.WAITING)
        await place.send(child, kind)
        ended = await place.over(child)
        assert ended.reason is (Reason.KILLED if kind is SignalKind.KILL else Reason.CANCELLED)
        await place.over(pid)


async def test_children_that_nobody_claimed_yet_are_cancelled_too(
    database: Database, database_settings: Settings
) -> None:
    async def bear_and_leave(holding: Holding) -> None:
        await bear(holding, "child")
        await holding.exit(Reason.OK)

    async def never(holding: Holding) -> None:
        raise AssertionError("a cancelled child was driven")

    async with running(database, database_settings, {"plain": bear_and_leave, "child": never}) as place:
        place.kernel._crew._places = 1  # type: ignore[union-attr]
        pid = await place.spawn()
        await place.over(pid)
        child = (await names_of(place, pid))["child"]
        assert (await place.over(child)).reason is Reason.CANCELLED


async def test_a_process_that_is_over_has_no_more_children(database: Database, database_settings: Settings) -> None:
    held: list[Holding] = []

    async def keep(holding: Holding) -> None:
        held.append(holding)
        await answer(holding)

    async with running(database, database_settings, {"plain": keep}) as place:
        pid = await place.spawn()
        await place.over(pid)
        with pytest.raises(Conflict, match="is over"):
            await bear(held[0], "orphan")
        assert len(await place.kernel.tree(ACCOUNT, pid)) == 1


async def test_there_are_so_many_children_and_generations_and_no_more(
    database: Database, database_settings: Settings
) -> None:
    refused: list[Exception] = []

    async def crowd(holding: Holding) -> None:
        for number in range(3):
            try:
                await bear(holding, f"child {number}", children_most=2)
            except Overloaded as error:
                refused.append(error)
        try:
            await bear(holding, "too deep", depth_most=0)
        except InvalidRequest as error:
            refused.append(error)
        await holding.exit(Reason.OK)

    bodies = {"plain": crowd, "child 0": wait_for_ever, "child 1": wait_for_ever}
    async with running(database, database_settings, bodies) as place:
        pid = await place.spawn()
        await place.over(pid)
        assert [type(error) for error in refused] == [Overloaded, InvalidRequest]
        family = await place.kernel.tree(ACCOUNT, pid)
        assert len(family) == 3
        for head in family[1:]:
            assert (await place.over(head.pid)).reason is Reason.CANCELLED
