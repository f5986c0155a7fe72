"""Log-in of people: argon2id, sessions kept as hashes, guessing slowed by address and account, nobody locked out."""

from __future__ import annotations

import asyncio

import pytest

from nimbos.accounts import Accounts, Role
from nimbos.accounts import people as persons
from nimbos.accounts.login import SESSION_S, Passwords
from nimbos.accounts.words import LOCAL
from nimbos.db import Statement
from nimbos.db.tables.accounts import sessions
from nimbos.errors import InvalidRequest, Overloaded, Unauthorized
from tests.accounts.conftest import Clock

PASSWORD = "correct horse battery"


async def make_user(accounts: Accounts, email: str = "ann@example.org", name: str = "Ann") -> persons.User:
    hashed = await accounts.passwords.hashed(PASSWORD)
    return await accounts.change(
        LOCAL, lambda: persons.create_user(email, role=Role.ADMIN, name=name, password_hash=hashed)
    )


async def fails(accounts: Accounts, name: str, *, address: str) -> float:
    """How long one must wait; 0 for a plain refusal."""
    try:
        await accounts.log_in(name, "wrong password", address=address)
    except Overloaded as error:
        return error.retry_after_s
    except Unauthorized:
        return 0.0
    raise AssertionError("let in")


async def test_the_right_password_opens_a_session_that_says_who_it_is(accounts: Accounts) -> None:
    user = await make_user(accounts)
    session = await accounts.log_in("Ann@Example.org", PASSWORD, address="10.0.0.1")
    identity = await accounts.session(session.token)
    assert (identity.role, identity.actor.user, identity.actor.kind) == (Role.ADMIN, user.id, "session")
    assert (await accounts.log_in("Ann", PASSWORD, address="10.0.0.1")).user.id == user.id
    assert session.token not in repr(session)


async def test_passwords_are_argon2id_and_tokens_are_kept_as_hashes(accounts: Accounts) -> None:
    user = await make_user(accounts)
    session = await accounts.log_in("ann@example.org", PASSWORD, address="10.0.0.1")
    (row,) = await accounts.database.read(persons.BY_ID(wanted=user.id))
    assert row["password_hash"].startswith("$argon2id$")
    kept = await accounts.database.read(Statement(sessions.select())())
    assert session.token not in str([tuple(row) for row in kept])


async def test_a_wrong_name_and_a_wrong_password_are_told_alike(accounts: Accounts) -> None:
    await make_user(accounts)
    words = set()
    for name, password in (("ann@example.org", "wrong password"), ("nobody@example.org", PASSWORD), ("owner", "")):
        with pytest.raises(Unauthorized) as caught:
            await accounts.log_in(name, password, address="10.0.0.1")
        words.add(caught.value.message)
    assert len(words) == 1


async def test_a_name_that_two_have_lets_nobody_in(accounts: Accounts) -> None:
    await make_user(accounts, "a@example.org", "Sam")
    await make_user(accounts, "b@example.org", "Sam")
    with pytest.raises(Unauthorized):
        await accounts.log_in("Sam", PASSWORD, address="10.0.0.1")


async def test_a_session_ends_with_log_out_password_removal_and_time(accounts: Accounts, clock: Clock) -> None:
    user = await make_user(accounts)

    async def opened() -> str:
        session = await accounts.log_in("ann@example.org", PASSWORD, address="10.0.0.1")
        clock.wall_ms = session.expires_ms - 1000 * SESSION_S
        await accounts.session(session.token)
        return session.token

    async def ended(token: str) -> None:
        with pytest.raises(Unauthorized):
            await accounts.session(token)

    token = await opened()
    await accounts.log_out(token, (await accounts.session(token)).actor)
    await ended(token)
    token = await opened()
    clock.wall_ms += 1000 * SESSION_S - 1
    await accounts.session(token)
    clock.wall_ms += 1
    await ended(token)
    token = await opened()
    hashed = await accounts.passwords.hashed(PASSWORD)
    await accounts.change(LOCAL, lambda: persons.set_password(user.id, hashed))
    await ended(token)
    token = await opened()
    await accounts.change(LOCAL, lambda: persons.remove_user(user.id))
    await ended(token)


async def test_guessing_is_slowed_by_address_also_over_many_accounts(accounts: Accounts, clock: Clock) -> None:
    waits = []
    for number in range(9):
        waits.append(await fails(accounts, f"user{number}@example.org", address="10.0.0.9"))
        clock.seconds += waits[-1]
    assert waits[:6] == [0.0] * 6
    assert waits[6] > 0


async def test_guessing_is_slowed_by_account_also_from_many_addresses(accounts: Accounts) -> None:
    await make_user(accounts)
    waits = [await fails(accounts, "ann@example.org", address=f"10.0.1.{number}") for number in range(9)]
    assert waits[:6] == [0.0] * 6
    assert all(wait > 0 for wait in waits[6:])


async def test_while_one_must_wait_the_right_password_is_not_even_tried(accounts: Accounts, clock: Clock) -> None:
    await make_user(accounts)
    for _ in range(7):
        await fails(accounts, "ann@example.org", address="10.0.0.9")
    with pytest.raises(Overloaded):
        await accounts.log_in("ann@example.org", PASSWORD, address="10.0.0.9")
    clock.seconds += 61
    assert (await accounts.log_in("ann@example.org", PASSWORD, address="10.0.0.9")).token


async def test_a_stranger_cannot_lock_out_who_logged_in_from_here_before(accounts: Accounts) -> None:
    await make_user(accounts)
    await accounts.log_in("ann@example.org", PASSWORD, address="10.0.0.1")
    for number in range(12):
        await fails(accounts, "ann@example.org", address=f"10.0.2.{number}")
    assert (await accounts.log_in("ann@example.org", PASSWORD, address="10.0.0.1")).token
    with pytest.raises(Overloaded):
        await accounts.log_in("ann@example.org", PASSWORD, address="10.0.3.1")


async def test_one_address_tries_one_password_at_a_time(accounts: Accounts) -> None:
    await make_user(accounts)
    tries = [accounts.log_in("ann@example.org", PASSWORD, address="10.0.0.1") for _ in range(4)]
    done = await asyncio.gather(*tries, return_exceptions=True)
    assert sorted(type(one).__name__ for one in done) == ["Overloaded"] * 3 + ["Session"]
    assert (await accounts.log_in("ann@example.org", PASSWORD, address="10.0.0.1")).token


@pytest.mark.parametrize("password", ["", "short", "x" * 1025])
async def test_a_password_has_a_length(password: str) -> None:
    with pytest.raises(InvalidRequest):
        await Passwords().hashed(password)


async def test_any_text_is_a_password() -> None:
    passwords = Passwords()
    odd = "gr\u00fc\u00dfe \ud800 \x00 \U0001f30d!!"
    hashed = await passwords.hashed(odd)
    assert await passwords.fits(odd, hashed)
    assert not await passwords.fits(odd + "x", hashed)
    assert not await passwords.fits("x" * 100_000, hashed)
    assert not await passwords.fits(odd, None)
    assert not await passwords.fits(odd, "not a hash")
