"""Forks: a past shared and not copied, a future of their own, effects that wait for adoption, files copied late."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.errors import Conflict, InvalidRequest, NotFound
from nimbos.kernel import Event, Reason, SignalKind, State
from nimbos.kernel.chain import decoded
from nimbos.kernel.events import CallDone, CallIntent, ModelIntent, ProcForked
from nimbos.kernel.tools import Workspaces, copies
from nimbos.ledger import Allowance
from nimbos.types import AskClass
from tests.kernel.minds import ACCOUNT, Minds, calling, minds, words
from tests.kernel.running import OTHER, PATIENCE_S

MANIFEST = '[tools]\nbuiltin = ["ask"]\n'
TOOLS = b'''
from pathlib import Path
from nimbos.adk import tool

@tool(effect="pure")
def note(text: str) -> str:
    """Writes it down."""
    with open("notes.txt", "a") as file:
        file.write(text + "\\n")
    return "noted " + text + ", of " + ", ".join(Path("notes.txt").read_text().split())

@tool(effect="idempotent")
def pay(amount: int, key: str) -> str:
    """Pays."""
    with open("paid.txt", "a") as file:
        file.write(key + "\\n")
    return "it is paid"
'''
SCRIPT = {
    "replies": [
        {"match": "^go$", **calling("note", text="one")},
        {"match": "^noted one", **calling("ask", question="Pay?")},
        {"match": "^pay$", **calling("pay", amount=7)},
        {"match": "^write$", **calling("note", text="two")},
        {"match": "^noted two", "text": "Written."},
        {"match": "^it is paid", "text": "Paid."},
        {"match": "^Withheld", "text": "Held back."},
        {"match": "^wait$", **calling("ask", question="Still?")},
        {"match": "was adopted", "text": "Paid at last."},
    ],
    "default": words(5),
}


@asynccontextmanager
async def asking(database: Database, settings: Settings) -> AsyncIterator[tuple[Minds, str]]:
    """An agent that has noted something and asks whether it may pay."""
    async with minds(database, settings, SCRIPT) as place:
        pid = await place.run(await place.program(MANIFEST, {"tools.py": TOOLS}))
        await place.until(pid, State.ASKING, reason="input")
        yield place, pid


async def fork(place: Minds, pid: str, *, at: int | None = None) -> str:
    (made,) = await place.kernel.fork(ACCOUNT, pid, at=at)
    return made


async def answer(place: Minds, pid: str, words: str) -> None:
    await place.until(pid, State.ASKING, reason="input")
    await place.send(pid, SignalKind.ANSWER, body=words)


async def said(place: Minds, pid: str, words: str) -> str:
    await answer(place, pid, words)
    return str(await place.result(pid))


def file_of(place: Minds, pid: str, name: str) -> list[str]:
    path = place.kernel.workspaces.path(pid) / name
    return path.read_text().split() if path.exists() else []


async def events(place: Minds, pid: str) -> list[Event]:
    return [event async for event in place.kernel.log.all(pid)]


async def keys(place: Minds, pid: str) -> list[str]:
    bodies = [decoded(event) for event in await events(place, pid)]
    return [body.key for body in bodies if isinstance(body, CallIntent) and body.resource == "pay"]


async def test_a_fork_shares_its_past_and_has_its_own_future(database: Database, database_settings: Settings) -> None:
    async with asking(database, database_settings) as (place, pid):
        made = await fork(place, pid)
        assert await said(place, made, "write") == "Written."
        assert await said(place, pid, "pay") == "Paid."
        past, own = await events(place, pid), await events(place, made)
        first = next(event for event in own if event.pid == made)
        body = decoded(first)
        assert isinstance(body, ProcForked)
        before = past[body.at_seq - 1]
        assert (first.seq, first.prev_hash) == (before.seq + 1, before.hash)
        assert (body.of, body.at_hash) == (pid, before.hash)
        assert own[: before.seq] == past[: before.seq], "the same rows, not copies"
        for each in (pid, made):
            verified = await place.kernel.log.verify(each)
            assert (verified.broken_at, verified.events) == (None, (await place.head(each)).seq)
        head = await place.head(made)
        assert (head.parent, head.forked_from, head.forked_seq, head.withheld) == (None, pid, before.seq, True)


async def test_many_forks_are_made_at_once_and_any_event_can_be_where_they_begin(
    database: Database, database_settings: Settings
) -> None:
    async with asking(database, database_settings) as (place, pid):
        made = await place.kernel.fork(ACCOUNT, pid, n=5)
        assert len(set(made)) == 5
        for each in made:
            await place.until(each, State.ASKING, reason="input")
        last = (await place.head(pid)).seq
        every = {seq: await fork(place, pid, at=seq) for seq in range(1, last + 1)}
        for seq, again in every.items():
            await place.until(again, State.ASKING, reason="input")
            assert (await place.kernel.log.verify(again)).broken_at is None, seq
            roles = [message["role"] for message in await place.shown(again)]
            assert roles == ["system", "user", "assistant", "tool", "assistant"], f"nothing is half, at {seq}"
            noted = file_of(place, again, "notes.txt")
            assert noted in (["one"], ["one", "one"], []), "a call that its past had not ended is made by the fork"
        assert file_of(place, pid, "notes.txt") == ["one"]


async def test_a_fork_of_a_fork_begins_before_or_behind_its_fork_point(
    database: Database, database_settings: Settings
) -> None:
    async with asking(database, database_settings) as (place, pid):
        first = await fork(place, pid)
        await place.until(first, State.ASKING, reason="input")
        at = (await place.head(first)).forked_seq
        for seq in (at - 2, at, at + 1, None):
            second = await fork(place, first, at=seq)
            assert await said(place, second, "write") == "Written."
            assert (await place.kernel.log.verify(second)).broken_at is None
            assert (await place.head(second)).forked_from == first


async def test_what_a_fork_does_outside_is_withheld_until_it_is_adopted_and_then_done_once(
    database: Database, database_settings: Settings
) -> None:
    async with asking(database, database_settings) as (place, pid):
        made = await fork(place, pid)
        await answer(place, made, "pay")
        await place.over(made)
        assert await place.result(made) == "Held back."
        assert file_of(place, made, "paid.txt") == file_of(place, pid, "paid.txt") == []
        done = [decoded(event) for event in await events(place, made) if event.kind == "call.done"]
        assert [body.withheld for body in done if isinstance(body, CallDone)][-1]
        with pytest.raises(Conflict, match="can happen no more") as refused:
            await place.kernel.adopt(ACCOUNT, made)
        at = int(refused.value.message.rpartition("--at ")[2].split("`")[0])

        again = await fork(place, made, at=at)
        await place.kernel.adopt(ACCOUNT, again)
        await place.kernel.adopt(ACCOUNT, again)
        assert await place.result(again) in ("Paid.", "Paid at last.")
        assert await said(place, pid, "pay") == "Paid."
        paid = [file_of(place, each, "paid.txt") for each in (pid, again)]
        assert [len(each) for each in paid] == [1, 1]
        assert paid[0] != paid[1], "an effect of a fork has a key of its own"
        assert set(await keys(place, made)).isdisjoint(await keys(place, pid))


async def test_a_fork_that_waits_is_adopted_with_what_it_withheld(
    database: Database, database_settings: Settings
) -> None:
    script = {**SCRIPT, "replies": [{"match": "^Withheld", **calling("ask", question="Sure?")}, *SCRIPT["replies"]]}
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program(MANIFEST, {"tools.py": TOOLS}))
        await place.until(pid, State.ASKING, reason="input")
        made = await fork(place, pid)
        await answer(place, made, "pay")
        asked = await place.until(made, State.ASKING, reason="input", after=(await place.head(made)).seq)
        assert file_of(place, made, "paid.txt") == []
        await place.kernel.adopt(ACCOUNT, made)
        await place.until(made, State.ASKING, reason="input", after=asked.seq)
        assert len(file_of(place, made, "paid.txt")) == 1
        assert not (await place.head(made)).withheld
        assert await said(place, made, "yes") == "Paid at last.", "its model was told"
        assert len(file_of(place, made, "paid.txt")) == 1


async def test_a_running_fork_is_adopted_by_its_own_server(database: Database, database_settings: Settings) -> None:
    script = {**SCRIPT, "replies": [{"match": "^long$", **words(240, rate=100.0)}, *SCRIPT["replies"]]}
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program(MANIFEST, {"tools.py": TOOLS}))
        await place.until(pid, State.ASKING, reason="input")
        made = await fork(place, pid)
        await answer(place, made, "long")
        await place.until_partial(made)
        await place.kernel.adopt(ACCOUNT, made)
        async with asyncio.timeout(PATIENCE_S):
            with place.kernel.bells.follow(made) as follower:
                follower.news.clear()
                while (await place.head(made)).withheld:
                    await follower.news.wait()
                    follower.news.clear()
        await place.result(made)
        assert (await place.view(made)).withheld is False


async def test_files_are_copied_when_one_of_the_two_is_about_to_write(
    database: Database, database_settings: Settings
) -> None:
    async with asking(database, database_settings) as (place, pid):
        first, second = await place.kernel.fork(ACCOUNT, pid, n=2)
        for each in (first, second):
            await place.until(each, State.ASKING, reason="input")
            assert not place.kernel.workspaces.path(each).exists(), "nothing is copied while nobody writes"
        assert await said(place, pid, "write") == "Written."
        assert file_of(place, pid, "notes.txt") == ["one", "two"]
        assert file_of(place, first, "notes.txt") == file_of(place, second, "notes.txt") == ["one"]
        assert await said(place, first, "write") == "Written."
        assert file_of(place, second, "notes.txt") == ["one"]


async def test_a_fork_of_a_process_that_is_over_says_its_last_answer_anew(
    database: Database, database_settings: Settings
) -> None:
    async with asking(database, database_settings) as (place, pid):
        assert await said(place, pid, "write") == "Written."
        made = await fork(place, pid)
        assert await place.result(made) == "Written."
        asked = [event for event in await events(place, made) if event.pid == made and event.kind == "model.intent"]
        assert len(asked) == 1
        assert isinstance(decoded(asked[0]), ModelIntent)
        assert (await place.head(pid)).state is State.DONE


async def test_a_fork_is_dropped_with_its_files_and_its_log_stays(
    database: Database, database_settings: Settings
) -> None:
    async with asking(database, database_settings) as (place, pid):
        first, second = await place.kernel.fork(ACCOUNT, pid, n=2)
        assert await said(place, first, "write") == "Written."
        await place.until(second, State.ASKING, reason="input")
        for each in (first, second):
            await place.kernel.drop(ACCOUNT, each)
            assert not place.kernel.workspaces.path(each).exists()
            assert len(await events(place, each)) > 5
        assert (await place.head(second)).reason is Reason.KILLED
        assert file_of(place, pid, "notes.txt") == ["one"]
        await place.kernel.drop(ACCOUNT, second)
        third = await fork(place, pid)
        await place.kernel.adopt(ACCOUNT, third)
        for real in (pid, third):
            with pytest.raises(Conflict, match="no fork"):
                await place.kernel.drop(ACCOUNT, real)


async def test_what_cannot_be_forked_or_adopted_says_so(database: Database, database_settings: Settings) -> None:
    async with asking(database, database_settings) as (place, pid):
        last = (await place.head(pid)).seq
        for wrong in (0, -1, last + 1, 10**15):
            with pytest.raises(InvalidRequest, match="no event"):
                await place.kernel.fork(ACCOUNT, pid, at=wrong)
        for number in (0, 65):
            with pytest.raises(InvalidRequest) as refused:
                await place.kernel.fork(ACCOUNT, pid, n=number)
            assert refused.value.param == "n"
        for call in (place.kernel.fork, place.kernel.adopt, place.kernel.drop):
            with pytest.raises(NotFound):
                await call(OTHER, pid)
        with pytest.raises(Conflict, match="no fork"):
            await place.kernel.adopt(ACCOUNT, pid)
        assert len(await place.kernel.list(ACCOUNT)) == 1
        assert await said(place, pid, "write") == "Written."


async def test_forks_that_are_asked_for_again_with_their_key_are_the_same(
    database: Database, database_settings: Settings
) -> None:
    async with asking(database, database_settings) as (place, pid):

        async def forks(key: str, of: str = pid, n: int = 3, at: int | None = None) -> list[str]:
            return await place.kernel.fork(ACCOUNT, of, n=n, at=at, key=key)

        at_once = await asyncio.gather(*(forks("once") for _ in range(4)))
        made = at_once[0]
        assert len(set(made)) == 3
        assert at_once == [made] * 4
        files = {path.stem for path in place.kernel.workspaces.path(pid).parent.glob("proc_*")}
        assert files == {pid, *made}, "what the others had begun is gone"
        assert await said(place, pid, "write") == "Written."
        assert await forks("once") == made, "also when the original has gone on, and is over"
        for number, at in ((2, None), (3, 1)):
            with pytest.raises(Conflict) as refused:
                await forks("once", n=number, at=at)
            assert refused.value.param == "key"
        assert set(await forks("onc", n=1)).isdisjoint(made), "a key that this one begins with"
        (deeper,) = await forks("once", of=made[0], n=1)
        assert (await place.head(deeper)).forked_from == made[0], "another process has keys of its own"
        assert len(set(await forks("", n=2) + await forks("", n=2))) == 4
        bodies = [decoded(event) for one in made for event in await events(place, one) if event.pid == one]
        heads = [(await place.head(one)).key for one in made]
        assert [body.key for body in bodies if isinstance(body, ProcForked)] == heads


async def test_a_key_for_forks_is_none_for_a_start(database: Database, database_settings: Settings) -> None:
    async with asking(database, database_settings) as (place, pid):
        (made,) = await place.kernel.fork(ACCOUNT, pid, key="one")
        for key in ("one", (await place.head(made)).key.replace("\n", " ")):
            started = await place.kernel.spawn(ACCOUNT, (await place.head(pid)).program, "go", model="demo", key=key)
            assert started not in (pid, made)
        for wrong in ((await place.head(made)).key, "k" * 301):
            with pytest.raises(InvalidRequest) as refused:
                await place.kernel.fork(ACCOUNT, pid, key=wrong)
            assert refused.value.param == "key"


async def test_a_fork_spends_what_its_original_has(database: Database, database_settings: Settings) -> None:
    script = {**SCRIPT, "replies": [{"match": "^much$", **words(100)}, *SCRIPT["replies"]]}
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program(MANIFEST, {"tools.py": TOOLS}), budget=Allowance(tokens=300))
        await place.until(pid, State.ASKING, reason="input")
        made = await place.kernel.fork(ACCOUNT, pid, n=3)
        for each in made:
            await answer(place, each, "much")
        async with asyncio.timeout(PATIENCE_S):
            for each in made:
                while (await place.head(each)).state in (State.READY, State.RUNNING):
                    await asyncio.sleep(0.01)  # of three, nobody knows which will be held
        states = [(await place.head(each)).state for each in made]
        assert State.ASKING in states, "three times a hundred words are more than is left"
        told = await place.kernel.top_up(ACCOUNT, pid, Allowance(tokens=9_000), source="user:test", external_id="more")
        assert told
        for each in made:
            await place.result(each)
        cost = await place.kernel.cost(ACCOUNT, pid)
        assert [share.pid for share in cost.processes] == [pid, *sorted(made)]


class TestCopies:
    """`copies.py` by itself."""

    def test_files_folders_and_links_are_copied_and_nothing_else(self, tmp_path: Path) -> None:
        source = tmp_path / "p"
        deep = source.joinpath(*["d"] * 300)
        deep.mkdir(parents=True)
        (deep / "file").write_bytes(b"\0" * 100_000)
        (source / "run").write_text("#!/bin/sh")
        (source / "run").chmod(0o755)
        (source / "out").symlink_to("/etc/passwd")
        (source / "up").symlink_to("..")
        os.mkfifo(source / "pipe")
        copies.owe(tmp_path, "p", ["f"])
        copies.settle(tmp_path, "f")
        copy = tmp_path / "f"
        assert copy.joinpath(*["d"] * 300, "file").read_bytes() == b"\0" * 100_000
        assert (copy / "run").stat().st_mode & 0o777 == 0o700
        assert (copy / "out").readlink() == Path("/etc/passwd")
        assert (copy / "up").is_symlink()
        assert not (copy / "pipe").exists()
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "p.forks") == ["f", "lock", "p"]

    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_what_a_program_removes_meanwhile_is_left_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        """A fork of a process that runs copies a folder in which that is at work."""
        source, copy = tmp_path / "p", copies._copy_entry
        for name in ("one", "two"):
            (source / name).mkdir(parents=True)
            (source / name / "a").write_text("a")
            (source / f"{name}.txt").write_text("t")

        def meanwhile(entry: os.DirEntry[str], made: Path, left: list[tuple[Path, Path]]) -> None:
            copy(entry, made, left)
            if kind == "folder":
                shutil.rmtree(source / "one", ignore_errors=True)
            elif entry.name in ("one.txt", "two.txt"):
                (source / {"one.txt": "two.txt", "two.txt": "one.txt"}[entry.name]).unlink(missing_ok=True)

        monkeypatch.setattr(copies, "_copy_entry", meanwhile)
        copies.owe(tmp_path, "p", ["f"])
        copies.settle(tmp_path, "p")
        found = {path.relative_to(tmp_path / "f").as_posix() for path in (tmp_path / "f").rglob("*")}
        if kind == "folder":
            assert found - {"one"} == {"two", "two/a", "one.txt", "two.txt"}
        else:
            assert len(found & {"one.txt", "two.txt"}) == 1 and {"one/a", "two/a"} < found

    def test_a_copy_that_a_death_cut_off_is_made_again(self, tmp_path: Path) -> None:
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / "a").write_text("a")
        copies.owe(tmp_path, "p", ["f"])
        (tmp_path / "f.copy").mkdir()
        (tmp_path / "f.copy" / "half").write_text("h")
        copies.settle(tmp_path, "p")
        assert [path.name for path in (tmp_path / "f").iterdir()] == ["a"]
        (tmp_path / "p" / "a").write_text("b")
        copies.settle(tmp_path, "p")
        copies.settle(tmp_path, "f")
        assert (tmp_path / "f" / "a").read_text() == "a"

    def test_a_fork_of_a_fork_without_files_has_those_of_the_first(self, tmp_path: Path) -> None:
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / "a").write_text("a")
        copies.owe(tmp_path, "p", ["f"])
        copies.owe(tmp_path, "f", ["g", "h"])
        copies.drop(tmp_path, "h")
        copies.settle(tmp_path, "f")
        (tmp_path / "f" / "a").write_text("f")
        copies.settle(tmp_path, "p")
        assert (tmp_path / "g" / "a").read_text() == "a"
        assert not (tmp_path / "h").exists()

    def test_a_process_that_has_no_files_yet_has_forks_without_files(self, tmp_path: Path) -> None:
        copies.owe(tmp_path, "p", ["f"])
        copies.settle(tmp_path, "f")
        copies.settle(tmp_path, "p")
        assert list((tmp_path / "f").iterdir()) == []


class TestTwoServers:
    """Of one home: each forks or settles in the middle of what the other does."""

    @pytest.fixture
    def shared(self, tmp_path: Path) -> Path:
        """`f` has what `p` has."""
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / "a").write_text("a")
        copies.owe(tmp_path, "p", ["f"])
        return tmp_path

    async def test_a_fork_that_is_made_while_its_original_settles_has_its_files(
        self, shared: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with middle_of(copies, "copy_tree", monkeypatch) as stop:
            settling = asyncio.create_task(Workspaces(shared).settle("p"))
            assert await asyncio.to_thread(stop.reached.wait, PATIENCE_S)
            forking = asyncio.create_task(Workspaces(shared).fork("p", ["g"]))
            await asyncio.wait({forking}, timeout=LONGER_THAN_A_FORK_S)
            stop.go.set()
            await settling
            await forking
        await self.check(shared, ["f", "g"])

    async def test_a_process_that_settles_while_it_is_forked_leaves_none_without_files(
        self, shared: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with middle_of(copies, "_from", monkeypatch, when="h") as stop:
            forking = asyncio.create_task(Workspaces(shared).fork("p", ["g", "h"]))
            assert await asyncio.to_thread(stop.reached.wait, PATIENCE_S)
            settling = asyncio.create_task(Workspaces(shared).settle("p"))
            await asyncio.wait({settling}, timeout=LONGER_THAN_A_FORK_S)
            stop.go.set()
            await forking
            await settling
        await self.check(shared, ["f", "g", "h"])

    async def check(self, root: Path, forks: list[str]) -> None:
        """Once the original is about to write, they have what it had, and nothing is owed any more."""
        await Workspaces(root).settle("p")
        (root / "p" / "a").write_text("b")
        for fork in forks:
            await Workspaces(root).settle(fork)
            assert (root / fork / "a").read_text() == "a"
        assert sorted(path.name for path in root.iterdir()) == sorted(["lock", "p", *forks])


LONGER_THAN_A_FORK_S = 0.2  # to let it go wrong, if it would


@dataclass
class Stop:
    reached: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)


@contextmanager
def middle_of(module: Any, name: str, patch: pytest.MonkeyPatch, *, when: str = "") -> Iterator[Stop]:
    """The function stands still when it is called, with this as its last argument if one is given, until `go`."""
    stop, function = Stop(), getattr(module, name)

    def standing(*arguments: Any) -> Any:
        if not when or arguments[-1] == when:
            stop.reached.set()
            stop.go.wait(PATIENCE_S)
        return function(*arguments)

    patch.setattr(module, name, standing)
    try:
        yield stop
    finally:
        stop.go.set()


async def test_a_fork_is_of_a_class_that_whoever_forks_may_have(
    database: Database, database_settings: Settings
) -> None:
    narrow = msgspec.structs.replace(ACCOUNT, scopes=frozenset({"class:batch"}))
    async with asking(database, database_settings) as (place, pid):
        (made,) = await place.kernel.fork(narrow, pid)
        assert (await place.head(pid)).ask_class is AskClass.AGENT
        assert (await place.head(made)).ask_class is AskClass.BATCH
