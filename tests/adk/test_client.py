"""The kit's client: what the commands do, from Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from nimbos.adk import Client, Program, Refused, client
from nimbos.errors import NotReady
from tests.adk.asking import curious
from tests.live import OWNER_SECRET, Live, serving

PROGRAMS = Path(__file__).parent.parent.parent / "programs"
SCRIPT: dict[str, Any] = {
    "replies": [{"match": "count", "text": "one two three four five"}],
    "default": {"text": "Hello there."},
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("home"), {"demo": SCRIPT}) as running:
        yield running


@pytest.fixture
def hello() -> Program:
    return Program("hello", instructions="Greet.", builtin=[])


async def test_a_program_is_run_and_followed_to_its_end(live: Live, hello: Program) -> None:
    async with Client(live.url, OWNER_SECRET) as nimbos:
        process = await nimbos.run(hello, "Please count.", model="demo", name="one", budget={"tokens": 500})
        seen = [one async for one in process.events()]
        numbers = [one.seq for one in seen if one.seq is not None]
        assert numbers == list(range(1, len(numbers) + 1))
        assert (seen[0].kind, seen[-1].kind) == ("proc.created", "end")
        later = [one.seq async for one in process.events(after=3) if one.seq is not None]
        assert later == numbers[3:]
        assert await process.result() == "one two three four five"
        now = await process.now()
        assert (now["name"], now["state"], now["program"]) == ("one", "done", hello.hash)


async def test_the_same_key_is_the_same_process(live: Live, hello: Program) -> None:
    async with Client(live.url, OWNER_SECRET) as nimbos:
        hash = await nimbos.put(hello)
        first = await nimbos.run(hash, "Hi.", model="demo", key="k1")
        assert (await nimbos.run("hello", "Hi.", model="demo", key="k1")).pid == first.pid


async def test_what_a_process_asks_is_answered_and_forks_are_made(live: Live) -> None:
    async with Client(live.url, OWNER_SECRET) as nimbos:
        process = await nimbos.run(PROGRAMS / "form", "Anna Berg, a@example.org, 12.6.2027", model="demo")
        async with aclosing(process.events()) as events:
            async for one in events:
                if one.kind == "proc.state" and one.data["body"]["to"] == "asking":
                    break
        (fork,) = await process.fork()
        assert fork.pid != process.pid
        await process.answer("4")
        assert (await process.result())["persons"] == "4"
        await fork.signal("kill")
        with pytest.raises(Refused) as caught:
            await fork.result()
        assert caught.value.code == "killed"
        kept, left = await process.fork(n=2)
        async with aclosing(kept.events()) as events:
            async for one in events:  # while it runs, its own server makes it real, a moment later
                if one.kind == "proc.state" and one.data["pid"] == kept.pid and one.data["body"]["to"] == "asking":
                    break
        assert not (await kept.adopt())["withheld"]
        assert (await left.drop())["state"] == "done"
        for real in (process, kept):
            with pytest.raises(Refused) as caught:
                await real.drop()
            assert (caught.value.status, caught.value.code) == (409, "conflict")


async def test_best_of_n_over_forks_is_one_line(live: Live, hello: Program) -> None:
    async with Client(live.url, OWNER_SECRET) as nimbos:
        process = await nimbos.run(hello, "Please count.", model="demo")
        await process.result()
        best = max([await fork.result() for fork in await process.fork(n=3, key="best")], key=len)
        assert best == "one two three four five"
        forks = await process.fork(n=3, key="best")
        assert len({fork.pid for fork in forks}) == 3
        for fork in forks:
            seen = [one async for one in fork.events() if one.kind == "model.intent"]
            assert [one.data["pid"] for one in seen] == [fork.pid], "each has said it anew"


async def test_the_same_signal_is_given_once(live: Live) -> None:
    async with Client(live.url, OWNER_SECRET) as nimbos:
        process = await nimbos.run(Program("curious", entry=curious), model="demo", budget={"tokens": 50})
        async with aclosing(process.events()) as events:
            async for one in events:
                if one.kind == "proc.state" and one.data["body"]["to"] == "asking":
                    break
        for _ in range(2):
            await process.signal("top_up", {"tokens": 7}, id="once")
        cost = await nimbos.send("GET", f"/v1/processes/{process.pid}/cost")
        assert {one["meter"]: one["limit"] for one in cost["budgets"]}["tokens"] == 57
        for _ in range(2):
            await process.answer("Well.", id="mine")
        assert await process.result() == "Well."


async def test_what_the_server_refuses_is_told(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Client(live.url, OWNER_SECRET) as nimbos:
        with pytest.raises(Refused) as caught:
            await nimbos.run("none", "Hi.")
        assert (caught.value.status, caught.value.code) == (404, "not_found")
        with pytest.raises(Refused):
            await nimbos.process("proc_none").result()
    async with Client(live.url, "nb-wrong") as stranger:
        with pytest.raises(Refused, match="not known"):
            await stranger.run("hello")
    monkeypatch.setenv("NIMBOS_HOME", str(tmp_path))
    monkeypatch.setenv("NIMBOS_API_KEY", "nb-x")
    with pytest.raises(NotReady, match="nimbos up"):
        Client()


async def test_who_follows_a_process_does_not_hold_a_server_that_stops(tmp_path: Path) -> None:
    """It is told, and goes on behind its last event at the server that comes back."""
    program = Program("curious", entry=curious)
    with serving(tmp_path, {"demo": SCRIPT}, database_url="") as live:
        async with Client(live.url, OWNER_SECRET) as nimbos:
            process = await nimbos.run(program, model="demo")
            async with aclosing(process._streamed(0, watch=False)) as events:
                last = 0
                with pytest.raises(client._Away):
                    async for one in events:
                        last = one.seq or last
                        if one.kind == "proc.state" and one.data["body"]["to"] == "asking":
                            live.stop()
    with serving(tmp_path, {"demo": SCRIPT}, database_url="") as live:
        async with Client(live.url, OWNER_SECRET) as nimbos:
            again = nimbos.process(process.pid)
            await again.answer("It goes on.")
            later = [one.seq async for one in again.events(after=last)]
            assert later[0] == last + 1
            assert await again.result() == "It goes on."
