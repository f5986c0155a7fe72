"""Log-in of people for the console: a password (argon2id), then a session whose token is kept as its hash.

Guessing is slowed by address and by account, before any hashing; an address that has logged in to an account before is
held up by its own failures alone, so that a stranger cannot lock anybody out. Another way to prove who one is (OIDC)
joins at `Login.open_session`, which trusts whoever calls it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import argon2
from sqlalchemy import bindparam, delete

from nimbos.accounts import people
from nimbos.accounts.secret import new_secret
from nimbos.accounts.slowdown import Slowdown, place_of
from nimbos.accounts.words import Changed, User
from nimbos.db import Database, Row, Statement, Transaction, insert
from nimbos.db.tables.accounts import sessions
from nimbos.errors import InvalidRequest, Overloaded, Unauthorized

SESSION_S = 12 * 3600
PASSWORD_CHARACTERS_MIN, PASSWORD_CHARACTERS_MAX = 10, 1024
_TOKEN_PREFIX = "ns-"  # noqa: S105
_FREE_FAILURES = 5
_LONGEST_WAIT_S = 60.0
_FORGET_S = 900.0
_AT_ONCE = 2  # hashings; each takes 64 MiB
_KNOWN_MAX = 4096

_OPEN = insert(sessions)
_CLOSE = Statement(delete(sessions).where(sessions.c.digest == bindparam("digest")))
_SWEEP = Statement(delete(sessions).where(sessions.c.expires_ms < bindparam("now")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """`token` is the cookie's value, shown once."""

    token: str
    user: User
    expires_ms: int

    def __repr__(self) -> str:
        return f"Session({self.user.id})"


class Passwords:
    """Hashing in threads, few at once: it is slow and large on purpose."""

    def __init__(self, hasher: argon2.PasswordHasher | None = None) -> None:
        self._hasher = hasher or argon2.PasswordHasher()
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._nobodys = ""

    async def hashed(self, password: str) -> str:
        """Raises: InvalidRequest for a password that is too short or too long."""
        if not PASSWORD_CHARACTERS_MIN <= len(password) <= PASSWORD_CHARACTERS_MAX:
            raise InvalidRequest(
                f"A password has {PASSWORD_CHARACTERS_MIN} to {PASSWORD_CHARACTERS_MAX} characters.", param="password"
            )
        async with self._room:
            return await asyncio.to_thread(self._hasher.hash, _bytes(password))

    async def fits(self, password: str, password_hash: str | None) -> bool:
        """As slow for a user who has no password, or is not there, as for any other."""
        if len(password) > PASSWORD_CHARACTERS_MAX:
            return False
        async with self._room:
            if not self._nobodys:
                self._nobodys = await asyncio.to_thread(self._hasher.hash, "nobody's password")
            given = _bytes(password)
            found = await asyncio.to_thread(self._verify, password_hash or self._nobodys, given)
            return found and password_hash is not None

    def _verify(self, password_hash: str, given: bytes) -> bool:
        try:
            return self._hasher.verify(password_hash, given)
        except (argon2.exceptions.VerifyMismatchError, argon2.exceptions.InvalidHashError):
            return False


class Login:
    def __init__(
        self, database: Database, passwords: Passwords, *, clock: Callable[[], float], now_ms: Callable[[], int]
    ) -> None:
        self._database = database
        self._passwords = passwords
        self._clock = clock
        self._now_ms = now_ms
        self._slowdown = Slowdown(free=_FREE_FAILURES, longest_s=_LONGEST_WAIT_S, forget_s=_FORGET_S)
        self._trying: set[str] = set()
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def check(self, name: str, password: str, *, address: str) -> User:
        """`name`: the e-mail address, or the name where only one user has it.

        Raises: Unauthorized, the same for a wrong name and a wrong password; Overloaded (limit "log-ins").
        """
        place, account = place_of(address), f"account {name.lower()[:300]}"
        if place in self._trying:
            raise Overloaded(limit="log-ins", value=1, used=1, retry_after_s=1)
        known = (account, place) in self._known
        self._check_wait(place, () if known else (account,))
        self._trying.add(place)
        try:
            row = await self._user(name)
            right = await self._passwords.fits(password, row["password_hash"] if row is not None else None)
        finally:
            self._trying.discard(place)
        if row is None or not right:
            self._slowdown.failed(place, self._clock())
            self._slowdown.failed(account, self._clock())
            raise Unauthorized("This name and this password do not belong together.")
        self._slowdown.forget(place)
        self._remember(account, place)
        return User.of(row)

    def open_session(self, user: User, *, address: str) -> tuple[Session, Callable[[], Transaction[Changed[None]]]]:
        """A session, and the transaction that begins it. The caller has made sure who this is."""
        secret = new_secret(_TOKEN_PREFIX)
        now = self._now_ms()
        session = Session(token=secret.value, user=user, expires_ms=now + 1000 * SESSION_S)

        def begin() -> Transaction[Changed[None]]:
            yield from people.live_user(user.id)
            yield _SWEEP(now=now)
            yield _OPEN(
                digest=secret.digest,
                user_id=user.id,
                address=address[:64],
                created_ms=now,
                expires_ms=session.expires_ms,
            )
            return Changed(value=None, action="login.succeeded", target=user.id)

        return session, begin

    def _check_wait(self, place: str, accounts: tuple[str, ...]) -> None:
        waits = {asked: self._slowdown.wait_s(asked, self._clock()) for asked in (place, *accounts)}
        longest = max(waits, key=lambda asked: waits[asked])
        if waits[longest] > 0:
            count = self._slowdown.count(longest)
            raise Overloaded(limit="log-ins", value=_FREE_FAILURES, used=count, retry_after_s=waits[longest])

    async def _user(self, name: str) -> Row | None:
        """By address first; by name only where it is one user's alone."""
        rows = await self._database.read(people.BY_LOGIN(wanted=name.lower()[:300], name=name[:300]))
        by_email = [row for row in rows if row["email"] == name.lower()]
        found = by_email or rows
        return found[0] if len(found) == 1 else None

    def _remember(self, account: str, place: str) -> None:
        self._known[account, place] = None
        self._known.move_to_end((account, place))
        while len(self._known) > _KNOWN_MAX:
            self._known.popitem(last=False)


def close_session(digest: bytes, user_id: str) -> Transaction[Changed[None]]:
    yield _CLOSE(digest=digest)
    return Changed(value=None, action="logout.succeeded", target=user_id)


def _bytes(password: str) -> bytes:
    return password.encode(errors="surrogatepass")
