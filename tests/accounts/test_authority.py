"""A batch outlives what its key may: each line asks with what the key may at that moment. On both databases."""

from __future__ import annotations

import pytest

from nimbos.accounts import Accounts, Authority, ProjectRole
from nimbos.accounts.keys import create_key, create_service_account, update_key, update_service_account
from nimbos.accounts.projects import set_models
from nimbos.accounts.secret import new_secret
from nimbos.accounts.words import DEFAULT_PROJECT, LOCAL, Grant
from nimbos.db import Database
from nimbos.errors import Unauthorized
from nimbos.keys import OwnerKey

OWNER = OwnerKey(secret="nb-owner", file=None)


async def test_a_line_asks_with_what_its_key_and_project_may_now(database: Database) -> None:
    accounts = await Accounts.open(database, owner=OWNER)
    secret = new_secret()
    program = await accounts.change(LOCAL, lambda: create_service_account(DEFAULT_PROJECT, "robot"))
    key = await accounts.change(
        LOCAL,
        lambda: create_key(
            name="robot",
            secret=secret,
            project_id=DEFAULT_PROJECT,
            owner_kind="service_account",
            owner_id=program.id,
            grant=Grant(),
        ),
    )
    submitted = (await accounts.authenticate(secret.value)).account
    owners = (await accounts.authenticate(OWNER.secret)).account
    authority = Authority(database)
    assert await authority.check(submitted) == submitted
    assert await authority.check(owners) == owners

    await accounts.change(LOCAL, lambda: set_models(DEFAULT_PROJECT, "deny_list", ("large",)))
    await accounts.change(LOCAL, lambda: update_key(DEFAULT_PROJECT, key.id, grant=Grant(models=("small",))))
    now = await authority.check(submitted)
    assert (now.models, now.denied_models) == (frozenset({"small"}), frozenset({"large"}))
    assert (await authority.check(owners)).denied_models == {"large"}

    leaving = ProjectRole.NONE
    await accounts.change(LOCAL, lambda: update_service_account(DEFAULT_PROJECT, program.id, name=None, role=leaving))
    with pytest.raises(Unauthorized, match="does not belong"):
        await authority.check(submitted)
    await accounts.close()
