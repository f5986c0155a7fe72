"""Views that are kept between two runs: a wake reads what is new, and never believes a view that its log disowns."""

from __future__ import annotations

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import Reason, SignalKind, State
from nimbos.kernel.events import CtxChanged, Note, Segment
from nimbos.kernel.fold import View, fold
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.runner import Runner
from nimbos.kernel.views import Views, size_of
from tests.kernel.running import Place, running

NOTES = 40


async def listen(holding: Holding) -> None:
    """Writes much when it begins, and then waits for each word until it is told to go."""
    if not holding.view.context:
        await holding.append(*(Draft(body=Note(about="said", text=str(number))) for number in range(NOTES)))
        await holding.append(Draft(body=CtxChanged(add=(Segment(id="it", hash="0" * 64, kind="note", tokens=1),))))
    await holding.take_mail()
    if len(holding.view.signals) > 2:
        await holding.exit(Reason.OK)
    await holding.park(State.WAITING, Reason.SIGNAL)


def runner_of(place: Place) -> Runner:
    assert place.kernel._runner is not None
    return place.kernel._runner


async def parked(place: Place, pid: str, *, after: int = 0) -> int:
    """The seq at which it parked and its run was put away."""
    head = await place.until(pid, State.WAITING, after=after)
    over = runner_of(place)._over.get(pid)
    if over is not None:
        await over.wait()
    return head.seq


async def said(place: Place, pid: str, word: str, *, after: int) -> int:
    await place.send(pid, SignalKind.MESSAGE, body=word)
    return await parked(place, pid, after=after)


async def test_a_wake_reads_what_is_new_alone(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, {"plain": listen}) as place:
        pid = await place.spawn()
        at, runner = await parked(place, pid), runner_of(place)
        assert at > NOTES
        before = runner.events_read
        at = await said(place, pid, "one", after=at)
        assert runner.events_read - before == 2, "the last that it knew, and that it was woken"
        kept = runner.views.take(pid)
        assert kept == fold([event async for event in place.kernel.log.all(pid)])
        before = runner.events_read
        at = await said(place, pid, "two", after=at)
        assert runner.events_read - before > NOTES, "without the view, all of it"


async def test_a_view_that_its_log_disowns_is_thrown_away(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, {"plain": listen}) as place:
        pid = await place.spawn()
        at, runner = await parked(place, pid), runner_of(place)
        kept = runner.views.take(pid)
        assert kept is not None
        kept.hash, kept.steps = "f" * 64, {}
        runner.views.keep(pid, kept)
        before = runner.events_read
        at = await said(place, pid, "one", after=at)
        assert runner.events_read - before > NOTES
        await said(place, pid, "two", after=at)
        await place.send(pid, SignalKind.MESSAGE, body="three")
        assert (await place.over(pid)).reason is Reason.OK
        assert runner.views.used_bytes == 0, "what is over is not kept"


def view_with(segments: int) -> View:
    view = View()
    for number in range(segments):
        segment = Segment(id=f"s{number}", hash="0" * 64, kind="tool", tokens=1)
        assert view.shown.change(CtxChanged(add=(segment,))) is None
    return view


def test_what_is_kept_is_bounded_and_what_parked_longest_ago_goes_first() -> None:
    one = size_of(view_with(0))
    views = Views(bytes_max=8 * one)
    for number in range(20):
        views.keep(f"proc_{number}", view_with(0))
        assert views.used_bytes <= 8 * one
    assert views.take("proc_11") is None and views.take("proc_12") is not None
    assert views.take("proc_12") is None
    views.keep("proc_19", view_with(0))  # again, and not twice
    assert views.used_bytes == 7 * one
    assert size_of(view_with(100)) > 20 * one
    views.keep("proc_large", view_with(100))
    assert views.take("proc_large") is None and views.used_bytes == 7 * one
