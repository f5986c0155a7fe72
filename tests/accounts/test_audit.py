"""The audit log: in the change's own transaction, dense, chained; and no row can be altered or taken away unseen."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from sqlalchemy import bindparam, delete, update

from nimbos.accounts import Accounts
from nimbos.accounts import projects as owned
from nimbos.accounts.audit import ALL, entry_of
from nimbos.accounts.words import LOCAL, Changed
from nimbos.db import Database, Statement, Transaction, insert
from nimbos.db.tables.accounts import audit_head, audit_log
from nimbos.errors import Conflict, StorageUnavailable
from tests.accounts.conftest import make_key, make_project

COLUMNS = [column.name for column in audit_log.columns]


async def run(database: Database, statement: Statement, **values: Any) -> None:
    def begin() -> Transaction[None]:
        yield statement(**values)

    await database.run(begin)


async def some_changes(accounts: Accounts) -> int:
    for number in range(3):
        await make_project(accounts, f"project {number}")
    return len(await accounts.database.read(ALL()))


async def test_a_change_is_written_down_with_what_was_before_and_after(accounts: Accounts) -> None:
    project = await make_project(accounts, "first")
    change = owned.ProjectChange(name="second")
    await accounts.change(LOCAL, lambda: owned.update_project(project.id, change))
    *_, made, renamed = [entry_of(row) for row in await accounts.database.read(ALL())]
    assert (made.action, made.before, made.after["name"]) == ("project.created", None, "first")
    assert (renamed.action, renamed.before["name"], renamed.after["name"]) == ("project.updated", "first", "second")
    assert (renamed.actor.kind, renamed.target, renamed.project) == ("local", project.id, project.id)
    assert renamed.seq == made.seq + 1


async def test_a_change_that_fails_leaves_no_row(accounts: Accounts) -> None:
    await make_project(accounts, "one")
    before = await accounts.database.read(ALL())
    with pytest.raises(Conflict):
        await make_project(accounts, "one")

    def half() -> Transaction[Changed[None]]:
        yield from owned.create_project("half")
        raise StorageUnavailable("here", reason="a test")

    with pytest.raises(StorageUnavailable):
        await accounts.change(LOCAL, half)
    assert len(await accounts.database.read(ALL())) == len(before)
    assert not await accounts.database.read(owned.BY_NAME(wanted="half"))
    assert (await accounts.verify_audit()).problem is None


async def test_changes_at_once_make_one_dense_chain(accounts: Accounts) -> None:
    before = len(await accounts.database.read(ALL()))
    await asyncio.gather(*(make_project(accounts, f"p{number}") for number in range(24)))
    rows = await accounts.database.read(ALL())
    assert [row["seq"] for row in rows] == list(range(1, before + 25))
    assert (await accounts.verify_audit()).problem is None


async def test_two_servers_at_once_make_one_chain(database: Database, accounts: Accounts) -> None:
    other = await Accounts.open(database)
    await asyncio.gather(
        *(
            make_project(server, f"{name}{number}")
            for name, server in (("a", accounts), ("b", other))
            for number in range(8)
        )
    )
    assert (await accounts.verify_audit()).problem is None
    await other.close()


@pytest.mark.parametrize("column", COLUMNS)
async def test_altering_any_column_of_any_row_is_found(accounts: Accounts, column: str) -> None:
    rows = await some_changes(accounts)
    table: Any = audit_log.c
    for seq in range(1, rows + 1):
        (row,) = [row for row in await accounts.database.read(ALL()) if row["seq"] == seq]
        kept = row[column]
        set_to = Statement(update(audit_log).where(table.seq == bindparam("at")).values({column: bindparam("new")}))
        await run(accounts.database, set_to, at=seq, new=_other(kept))
        assert (await accounts.verify_audit()).problem is not None, (seq, column)
        moved = seq if column != "seq" else _other(kept)
        await run(accounts.database, set_to, at=moved, new=kept)
    assert (await accounts.verify_audit()).problem is None


def _other(value: Any) -> Any:
    if isinstance(value, bytes | memoryview):
        return bytes([bytes(value)[0] ^ 1, *bytes(value)[1:]])
    return value + 1000 if isinstance(value, int) else f"{value}x"


async def test_taking_any_row_away_is_found_also_the_last(accounts: Accounts) -> None:
    rows = await some_changes(accounts)
    kept = {row["seq"]: dict(zip(row.keys(), row, strict=True)) for row in await accounts.database.read(ALL())}
    remove = Statement(delete(audit_log).where(audit_log.c.seq == bindparam("at")))
    for seq in range(1, rows + 1):
        await run(accounts.database, remove, at=seq)
        problem = (await accounts.verify_audit()).problem
        assert problem is not None, seq
        assert "missing" in problem
        await run(accounts.database, _put_back(), **kept[seq])
    assert (await accounts.verify_audit()).problem is None


async def test_taking_the_last_rows_or_all_away_is_found(accounts: Accounts) -> None:
    await some_changes(accounts)
    await run(accounts.database, Statement(delete(audit_log).where(audit_log.c.seq > 2)))
    problem = (await accounts.verify_audit()).problem
    assert problem is not None
    assert "missing" in problem
    await run(accounts.database, Statement(delete(audit_log)))
    assert (await accounts.verify_audit()).problem is not None


async def test_a_row_rewritten_together_with_its_hash_is_found_by_the_next(accounts: Accounts) -> None:
    rows = await some_changes(accounts)
    found = await accounts.database.read(ALL())
    first, last = found[0], found[-1]
    for row in (first, last):
        body = bytes(row["body"]).replace(b"project", b"Project")
        forged = Statement(
            update(audit_log)
            .where(audit_log.c.seq == bindparam("at"))
            .values(body=bindparam("new_body"), hash=bindparam("new_hash"))
        )
        digest = hashlib.sha256(bytes(row["prev_hash"]) + body).digest()
        await run(accounts.database, forged, at=row["seq"], new_body=body, new_hash=digest)
        assert (await accounts.verify_audit()).problem is not None
        await run(accounts.database, forged, at=row["seq"], new_body=row["body"], new_hash=row["hash"])
    assert rows == (await accounts.verify_audit()).rows


async def test_without_the_end_of_the_chain_nothing_is_believed(accounts: Accounts) -> None:
    await some_changes(accounts)
    await run(accounts.database, Statement(delete(audit_head)))
    assert (await accounts.verify_audit()).problem is not None


async def test_no_secret_is_in_the_log(accounts: Accounts) -> None:
    secret, _ = await make_key(accounts)
    bodies = b"".join(bytes(row["body"]) for row in await accounts.database.read(ALL()))
    assert secret.encode() not in bodies
    assert secret[3:].encode() not in bodies
    assert b"digest" not in bodies


def _put_back() -> Statement:
    return insert(audit_log)
