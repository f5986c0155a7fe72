"""`nimbos usage` where there is more than a page of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.types import Usage
from tests.cli.command import called, make_home
from tests.ledger.books import Books


async def fill(home: Path) -> None:
    database = await Database.open(Settings(home=str(home)))
    for number in range(3):
        await Books(database).ask_and_settle(Usage(input=10 * (number + 1)), process=f"proc_{number}")
    await database.close()


def test_usage_by_process_comes_in_pages(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    asyncio.run(fill(home))
    arguments = ("usage", "--by", "process", "--limit", "2")
    first = json.loads(called(home, *arguments, "--json").stdout)
    assert [row["process"] for row in first["rows"]] == ["proc_2", "proc_1"]
    assert (first["total"]["asks"], first["total"]["input_tokens"]) == (3, 60)
    assert (first["has_more"], first["next_page"]) == (True, "2")
    last = json.loads(called(home, *arguments, "--page", "2", "--json").stdout)
    assert [row["process"] for row in last["rows"]] == ["proc_0"]
    assert (last["total"], last["has_more"], last["next_page"]) == (first["total"], False, None)
    for form in ((), ("--csv",)):
        assert "--page 2" in called(home, *arguments, *form).stderr
        assert called(home, *arguments, "--page", "2", *form).stderr == ""
