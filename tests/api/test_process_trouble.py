"""What goes wrong around processes of a real server: clocks, folders, versions, mail that nobody reads. Nothing is
lost, and whoever asks is told."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from sqlalchemy import Integer, Text, bindparam, update

from nimbos.config import Settings
from nimbos.db import Database, Statement, Transaction
from nimbos.db.tables.kernel import process_events
from nimbos.kernel import mailbox, runner
from tests.live import Live, error_of, serving
from tests.processing import CURIOUS, Processes

TWO_HOURS_NS = 7_200 * 10**9
CODE = 'entry = "main.py:main"\n'
SLEEPER = {
    "nimbos.toml": f'name = "sleeper"\n{CODE}',
    "main.py": "from nimbos.adk import sleep\n\n\nasync def main(s):\n    await sleep(s)\n    return 'rested'\n",
}
READER = {
    "nimbos.toml": f'name = "reader"\n{CODE}',
    "data.txt": "It stands there.",
    "main.py": (
        "from nimbos.adk import ask, call\n\n\n"
        "async def main(input):\n"
        '    before = await call("look")\n'
        '    await ask("Once more?")\n'
        '    return [before, await call("look", step="again")]\n'
    ),
    "tools.py": (
        "from pathlib import Path\n\nfrom nimbos.adk import tool\n\n\n"
        '@tool(effect="pure")\n'
        "def look() -> str:\n"
        '    """Reads a file beside this one."""\n'
        '    return (Path(__file__).parent / "data.txt").read_text()\n'
    ),
}
SCRIPT = {
    "replies": [
        {"match": "^Ask", "times": 1, "tool_calls": [{"name": "ask", "arguments": {"question": "Which city?"}}]},
        {"match": "Paris", "text": "It is Paris."},
    ],
    "default": {"text": "Hello to you."},
}


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with serving(tmp_path / "home", {"demo": SCRIPT}) as running:
        yield running


@pytest.fixture
def mine(live: Live) -> Processes:
    return Processes(live.http)


def test_a_wall_clock_that_is_set_neither_ends_nor_stretches_a_wait(
    mine: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper, real = mine.put(SLEEPER), time.time_ns
    long = mine.spawn(sleeper, 3_600)
    mine.until(long, "waiting")
    for jump_ns in (TWO_HOURS_NS, -TWO_HOURS_NS):
        monkeypatch.setattr(time, "time_ns", partial(_shifted, real, jump_ns))
        assert mine.over(mine.spawn(sleeper, 0.2))["result"] == "rested"  # so timers have been looked at since
        assert mine.process(long)["state"] == "waiting"


def _shifted(clock: Callable[[], int], by_ns: int) -> int:
    return clock() + by_ns


def test_a_program_whose_folder_is_deleted_while_it_runs_goes_on(live: Live, mine: Processes) -> None:
    program = mine.put(READER)
    pid = mine.spawn(program)
    mine.until(pid, "asking")
    folder = Path(live.settings.home) / "programs" / program
    folder.chmod(0o700)
    shutil.rmtree(folder)
    assert mine.signal(pid, "answer", body="Yes.").status_code == 200
    assert mine.over(pid)["result"] == ["It stands there."] * 2


def test_a_log_from_a_newer_version_waits_for_that_and_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "UNREADABLE_RETRY_S", 0.05)
    with serving(tmp_path / "home", {"demo": SCRIPT}, database_url="") as newer:
        before = Processes(newer.http)
        program = before.put(CURIOUS)
        pid = before.spawn(program, "Ask me.")
        before.until(pid, "asking")
        settings = newer.settings
    asyncio.run(write_version(settings, pid, 99))
    with serving(tmp_path / "home", {"demo": SCRIPT}, database_url="") as older:
        mine = Processes(older.http)
        error = error_of(mine.get(f"processes/{pid}"), 503)
        assert error["code"] == "log_from_newer_version" and "newer version" in error["message"]
        assert [one["id"] for one in mine.get("processes").json()["data"]] == [pid]
        assert mine.signal(pid, "answer", body="Paris").status_code == 200
        assert mine.over(mine.spawn(program, "Hello."))["result"] == "Hello to you."
        assert mine.process(pid)["state"] == "ready", "nobody here runs it"
        asyncio.run(write_version(settings, pid, 1))
        assert mine.over(pid)["result"] == "It is Paris."


async def write_version(settings: Settings, pid: str, version: int) -> None:
    """What another version of the server would have written."""
    change = Statement(
        update(process_events)
        .where(process_events.c.pid == bindparam("of", type_=Text))
        .values(version=bindparam("to", type_=Integer))
    )

    def begin() -> Transaction[None]:
        yield change(of=pid, to=version)

    database = await Database.open(settings)
    await database.run(begin)
    await database.close()


def test_words_that_nobody_hears_are_refused_in_the_end_and_an_answer_still_comes_through(
    mine: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailbox, "UNREAD_MAX", 3)
    pid = mine.spawn(mine.put(READER))
    mine.until(pid, "asking")
    for number in range(3):
        assert mine.signal(pid, "message", body=f"word {number}").status_code == 200
    received = (one for one in mine.stream(pid) if one.kind == "signal.received")
    assert len(list(islice(received, 3))) == 3, "they are out of the mailbox"
    refused = mine.signal(pid, "message", body="one more")
    assert error_of(refused, 429)["code"] == "overloaded"
    assert "'signals in the mailbox' of 3" in refused.json()["error"]["message"] and refused.headers["retry-after"]
    monkeypatch.setattr(mailbox, "MESSAGE_BYTES_MAX", 100)
    assert "message" in error_of(mine.signal(pid, "message", body="x" * 100), 413)["message"]
    assert mine.signal(pid, "answer", body="Yes.").status_code == 200
    assert mine.over(pid)["result"] == ["It stands there."] * 2
