"""`programs:code`, which lets a key bring Python that runs here: who has it, and that it goes with the role."""

from __future__ import annotations

from nimbos.accounts import CODE_SCOPE, Accounts, Authority, Role
from nimbos.accounts import people as persons
from nimbos.accounts.words import LOCAL, Grant
from nimbos.db import Database
from tests.accounts.conftest import OWNER, make_key, make_project

ADMIN = Grant(scopes=("admin",))


async def scopes_of(accounts: Accounts, secret: str) -> frozenset[str]:
    return (await accounts.authenticate(secret)).account.scopes


async def test_keys_that_administer_have_it_and_others_have_not(accounts: Accounts) -> None:
    assert CODE_SCOPE in await scopes_of(accounts, OWNER.secret)
    plain, _ = await make_key(accounts, name="plain")
    assert CODE_SCOPE not in await scopes_of(accounts, plain)
    admin, _ = await make_key(accounts, name="admin", grant=ADMIN)
    assert CODE_SCOPE in await scopes_of(accounts, admin)
    given, _ = await make_key(accounts, name="given", grant=Grant(scopes=(CODE_SCOPE,)))
    assert await scopes_of(accounts, given) == {CODE_SCOPE}


async def test_it_goes_when_the_owner_of_the_key_is_no_admin_any_more(database: Database, accounts: Accounts) -> None:
    project = await make_project(accounts, "team")
    bob = await accounts.change(LOCAL, lambda: persons.create_user("b@x.org", role=Role.ADMIN, project_id=project.id))
    secret, _ = await make_key(accounts, project_id=project.id, owner_id=bob.id, grant=ADMIN)
    account = (await accounts.authenticate(secret)).account
    assert CODE_SCOPE in account.scopes
    assert CODE_SCOPE in (await Authority(database).check(account)).scopes
    await accounts.change(LOCAL, lambda: persons.update_user(bob.id, role=Role.READER))
    assert CODE_SCOPE not in await scopes_of(accounts, secret)
    assert CODE_SCOPE not in (await Authority(database).check(account)).scopes
