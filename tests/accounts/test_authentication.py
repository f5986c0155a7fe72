"""Who a secret is: on both databases, at once after every change here, within seconds after changes elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from nimbos.accounts import Accounts, ProjectRole, Role
from nimbos.accounts import keys as keyed
from nimbos.accounts import people as persons
from nimbos.accounts import projects as owned
from nimbos.accounts.authentication import KEPT_S
from nimbos.accounts.secret import digest_of
from nimbos.accounts.words import DEFAULT_PROJECT, LOCAL, OWNER_USER, Grant, allowed_model, allowed_route
from nimbos.db import Bound, Database, Row
from nimbos.errors import Conflict, NotFound, Overloaded, Unauthorized
from nimbos.keys import FileKey
from tests.accounts.conftest import OWNER, Clock, make_key, make_project, make_user


async def refused(accounts: Accounts, secret: str, *, address: str = "") -> str:
    with pytest.raises(Unauthorized) as caught:
        await accounts.authenticate(secret, address=address)
    return caught.value.message


async def test_the_owners_key_is_the_owner_of_the_default_project(accounts: Accounts) -> None:
    identity = await accounts.authenticate(OWNER.secret)
    assert (identity.account.id, identity.account.key, identity.account.user) == (
        DEFAULT_PROJECT,
        "key_owner",
        OWNER_USER,
    )
    assert identity.role is Role.OWNER
    assert identity.account.scopes >= {"admin"}


async def test_a_key_says_its_project_its_user_and_what_it_may(accounts: Accounts) -> None:
    project = await make_project(accounts, "research")
    grant = Grant(scopes=("class:batch",), models=("demo",), routes=("/v1/chat/completions",), weight=2.0)
    secret, key = await make_key(accounts, project_id=project.id, grant=grant)
    identity = await accounts.authenticate(secret)
    account = identity.account
    assert (account.id, account.name, account.key, account.key_name) == (project.id, "research", key.id, "laptop")
    assert (account.scopes, account.models, account.weight) == ({"class:batch"}, {"demo"}, 2.0)
    assert identity.role is None
    assert allowed_model(account, "demo")
    assert not allowed_model(account, "other")
    assert allowed_route(account, "/v1/chat/completions")
    assert allowed_route(account, "/v1/models")
    assert not allowed_route(account, "/v1/chat/completionsx")
    assert not allowed_route(account, "/v1/embeddings")


async def test_a_revoked_key_is_refused_at_once(accounts: Accounts) -> None:
    secret, key = await make_key(accounts)
    await accounts.authenticate(secret)
    await accounts.change(LOCAL, lambda: keyed.revoke_key(key))
    assert "'laptop' was revoked" in await refused(accounts, secret)


async def test_a_key_expires_on_time_also_while_it_is_remembered(accounts: Accounts, clock: Clock) -> None:
    secret, _ = await make_key(accounts, expires_ms=clock.wall_ms + 1500)
    await accounts.authenticate(secret)
    clock.wall_ms += 1499
    await accounts.authenticate(secret)
    clock.wall_ms += 1
    assert "'laptop' expired at 2027-01-15" in await refused(accounts, secret)


async def test_a_change_made_by_another_server_holds_within_seconds(
    database: Database, accounts: Accounts, clock: Clock
) -> None:
    other = await Accounts.open(database, owner=OWNER)
    secret, key = await make_key(accounts)
    await accounts.authenticate(secret)
    await other.change(LOCAL, lambda: keyed.revoke_key(key))
    await refused(other, secret)
    await accounts.authenticate(secret)  # not heard of it yet
    clock.seconds += KEPT_S
    await refused(accounts, secret)
    await other.close()


class SlowReads:
    """A database whose reads of keys wait for `go`, so that a change can come between a look-up and its end."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.looked = asyncio.Event()
        self.go = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    async def read(self, query: Bound) -> list[Row]:
        rows = await self._database.read(query)
        if query.statement is keyed.BY_DIGEST:
            self.looked.set()
            await self.go.wait()
        return rows


async def test_a_look_up_that_began_before_a_revocation_is_not_remembered(database: Database) -> None:
    slow = SlowReads(database)
    accounts = await Accounts.open(slow, owner=OWNER)  # type: ignore[arg-type]
    secret, key = await make_key(accounts)
    early = asyncio.ensure_future(accounts.authenticate(secret))
    await slow.looked.wait()
    await accounts.change(LOCAL, lambda: keyed.revoke_key(key))
    slow.go.set()
    await early  # it was good when it was looked up
    await refused(accounts, secret)
    await accounts.close()


async def test_a_key_dies_with_the_membership_of_its_owner(accounts: Accounts) -> None:
    project = await make_project(accounts, "team")
    ann = await make_user(accounts, "ann@example.org", Role.MEMBER, project_id=project.id)
    secret, _ = await make_key(accounts, project_id=project.id, owner_id=ann.id)
    await accounts.authenticate(secret)
    await accounts.change(LOCAL, lambda: persons.remove_member(project.id, ann.id))
    assert "'laptop'" in await refused(accounts, secret)
    await accounts.change(LOCAL, lambda: persons.add_member(project.id, ann, ProjectRole.MEMBER))
    await refused(accounts, secret)  # it stays dead


async def test_an_admins_key_needs_no_membership_but_dies_with_the_role(accounts: Accounts) -> None:
    project = await make_project(accounts, "team")
    bob = await make_user(accounts, "bob@example.org", Role.ADMIN)
    secret, _ = await make_key(accounts, project_id=project.id, owner_id=bob.id, grant=Grant(scopes=("admin",)))
    assert (await accounts.authenticate(secret)).role is Role.ADMIN
    await accounts.change(LOCAL, lambda: persons.update_user(bob.id, role=Role.READER))
    assert "does not belong" in await refused(accounts, secret)


async def test_a_key_with_the_scope_admin_may_what_its_owner_may_now(accounts: Accounts) -> None:
    bob = await make_user(accounts, "bob@example.org", Role.ADMIN, project_id=DEFAULT_PROJECT)
    secret, _ = await make_key(accounts, owner_id=bob.id, grant=Grant(scopes=("admin",)))
    assert (await accounts.authenticate(secret)).role is Role.ADMIN
    await accounts.change(LOCAL, lambda: persons.update_user(bob.id, role=Role.READER))
    assert (await accounts.authenticate(secret)).role is Role.READER


async def test_a_key_dies_with_its_owner(accounts: Accounts) -> None:
    ann = await make_user(accounts, "ann@example.org", Role.MEMBER, project_id=DEFAULT_PROJECT)
    secret, _ = await make_key(accounts, owner_id=ann.id)
    await accounts.authenticate(secret)
    await accounts.change(LOCAL, lambda: persons.remove_user(ann.id))
    assert "revoked" in await refused(accounts, secret)


async def test_a_key_dies_with_its_service_account(accounts: Accounts) -> None:
    robot = await accounts.change(LOCAL, lambda: keyed.create_service_account(DEFAULT_PROJECT, "robot"))
    secret, _ = await make_key(accounts, owner_kind="service_account", owner_id=robot.id)
    identity = await accounts.authenticate(secret)
    assert (identity.actor.service_account, identity.account.user) == (robot.id, "")
    await accounts.change(LOCAL, lambda: keyed.remove_service_account(DEFAULT_PROJECT, robot.id))
    assert "revoked" in await refused(accounts, secret)


async def test_a_key_dies_with_its_project(accounts: Accounts) -> None:
    project = await make_project(accounts, "short lived")
    secret, _ = await make_key(accounts, project_id=project.id)
    await accounts.authenticate(secret)
    await accounts.change(LOCAL, lambda: owned.archive_project(project.id))
    assert "archived" in await refused(accounts, secret)


@pytest.mark.parametrize(
    ("mode", "models", "of_key", "allowed"),
    [
        ("", (), None, {"a", "b", "c"}),
        ("", (), ("a",), {"a"}),
        ("allow_list", ("a", "b"), None, {"a", "b"}),
        ("allow_list", ("a", "b"), ("b", "c"), {"b"}),
        ("allow_list", (), None, set()),
        ("deny_list", ("a",), None, {"b", "c"}),
        ("deny_list", ("a",), ("a", "b"), {"b"}),
    ],
)
async def test_a_key_may_ask_what_it_and_its_project_may(
    accounts: Accounts, mode: Any, models: tuple[str, ...], of_key: tuple[str, ...] | None, allowed: set[str]
) -> None:
    project = await make_project(accounts, "lists")
    secret, _ = await make_key(accounts, project_id=project.id, grant=Grant(models=of_key))
    await accounts.change(LOCAL, lambda: owned.set_models(project.id, mode, models))
    account = (await accounts.authenticate(secret)).account
    assert {model for model in "abc" if allowed_model(account, model)} == allowed


async def test_names_are_unique_among_the_living_of_a_project(accounts: Accounts) -> None:
    other = await make_project(accounts, "other")
    _, first = await make_key(accounts, "bot")
    await make_key(accounts, "bot", project_id=other.id)
    with pytest.raises(Conflict, match="has a key named 'bot' already"):
        await make_key(accounts, "bot")
    await accounts.change(LOCAL, lambda: keyed.revoke_key(first))
    await make_key(accounts, "bot")


async def test_many_who_want_one_name_at_once_get_one_key(accounts: Accounts) -> None:
    made = await asyncio.gather(*(make_key(accounts, "same") for _ in range(16)), return_exceptions=True)
    assert sorted(type(one).__name__ for one in made) == ["Conflict"] * 15 + ["tuple"]


async def test_a_key_needs_an_owner_with_a_place_in_its_project(accounts: Accounts) -> None:
    stranger = await make_user(accounts, "eve@example.org", Role.READER)
    with pytest.raises(NotFound):
        await make_key(accounts, owner_id=stranger.id)
    with pytest.raises(NotFound):
        await make_key(accounts, owner_id="user_nobody")


async def test_unknown_keys_are_slowed_by_address_and_good_ones_never(accounts: Accounts, clock: Clock) -> None:
    secret, _ = await make_key(accounts)
    for number in range(20):
        assert "not known here" in await refused(accounts, f"nb-guess-{number}", address="10.0.0.9")
    waits = []
    for number in range(8):
        with pytest.raises(Overloaded) as caught:
            await accounts.authenticate(f"nb-more-{number}", address="10.0.0.9")
        waits.append(caught.value.retry_after_s)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    await accounts.authenticate(secret, address="10.0.0.9")
    await refused(accounts, "nb-guess", address="10.0.0.10")
    clock.seconds += 301
    await refused(accounts, "nb-guess", address="10.0.0.9")


async def test_a_key_that_was_good_once_is_no_guess(accounts: Accounts) -> None:
    secret, key = await make_key(accounts)
    await accounts.change(LOCAL, lambda: keyed.revoke_key(key))
    for _ in range(40):
        assert "revoked" in await refused(accounts, secret, address="10.0.0.9")


async def test_keys_of_the_file_work_and_their_projects_are_made_once(database: Database) -> None:
    key = FileKey(name="old", digest=digest_of("nb-old"), account="alice", scopes=frozenset({"class:batch"}))
    for _ in range(2):
        accounts = await Accounts.open(database, owner=OWNER, file_keys=(key,))
        identity = await accounts.authenticate("nb-old")
        assert (identity.account.name, identity.account.key_name) == ("alice", "old")
        assert (identity.account.scopes, identity.role) == ({"class:batch"}, None)
        await accounts.close()
    rows = await database.read(owned.BY_NAME(wanted="alice"))
    assert [row["id"] for row in rows] == [identity.account.id]


async def test_a_key_of_the_file_does_not_bring_its_archived_project_back(database: Database) -> None:
    """Not at the next start either. One that is made anew under the name takes its key again."""
    key = FileKey(name="old", digest=digest_of("nb-old"), account="alice", scopes=frozenset())
    accounts = await Accounts.open(database, owner=OWNER, file_keys=(key,))
    first = (await accounts.authenticate("nb-old")).account.id
    await accounts.change(LOCAL, lambda: owned.archive_project(first))
    assert "archived" in await refused(accounts, "nb-old")
    await accounts.close()
    accounts = await Accounts.open(database, owner=OWNER, file_keys=(key,))
    assert "archived" in await refused(accounts, "nb-old")
    assert await database.read(owned.BY_NAME(wanted="alice")) == []
    anew = await make_project(accounts, "alice")
    await accounts.close()
    accounts = await Accounts.open(database, owner=OWNER, file_keys=(key,))
    assert (await accounts.authenticate("nb-old")).account.id == anew.id != first
    await accounts.close()


async def test_the_last_use_is_noted_without_a_write_for_each_ask(
    database: Database, accounts: Accounts, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, key = await make_key(accounts)
    runs: list[Callable[..., Any]] = []
    plain = database.run

    async def counted(begin: Callable[..., Any], *, durable: bool = False) -> Any:
        runs.append(begin)
        return await plain(begin, durable=durable)

    monkeypatch.setattr(database, "run", counted)
    for _ in range(50):
        clock.wall_ms += 10
        await accounts.authenticate(secret)
    assert runs == []
    await accounts.note_uses()
    assert len(runs) == 1
    (row,) = await database.read(keyed.BY_ID(wanted=key.id))
    assert row["last_used_ms"] == clock.wall_ms


async def test_what_was_used_is_noted_when_it_closes(database: Database) -> None:
    accounts = await Accounts.open(database, owner=OWNER)
    secret, key = await make_key(accounts)
    await accounts.authenticate(secret)
    await accounts.close()
    (row,) = await database.read(keyed.BY_ID(wanted=key.id))
    assert row["last_used_ms"] is not None


async def test_a_secret_is_kept_as_its_hash_alone(database: Database, accounts: Accounts) -> None:
    secret, key = await make_key(accounts)
    (row,) = await database.read(keyed.BY_ID(wanted=key.id))
    assert bytes(row["digest"]) == digest_of(secret)
    assert secret not in str([row[name] for name in row.keys()])  # noqa: SIM118
    assert key.redacted == f"{secret[:7]}...{secret[-4:]}"
    assert "digest" not in repr(key)
