"""What asyncpg's and the server's errors mean to a caller.

The codes are SQLSTATE. Source: PostgreSQL's manual, appendix A.
"""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from nimbos.errors import ConfigError, Conflict, InvalidRequest, NimbosError, StorageUnavailable

# What the way to the server raises, beside the server's own errors.
TRANSPORT = (OSError, TimeoutError, UnicodeEncodeError, asyncpg.InterfaceError, asyncpg.InternalClientError)

_COLLISIONS = {"40001", "40P01"}  # serialisation failure, deadlock
_REASONS = {
    "53100": "the disk is full. Free some space; the service then goes on by itself.",
    "25006": "it is read-only. Give the URL of a server that can be written to.",
    "55P03": "another program has locked a row or table for too long. End that program.",
    "57014": "a statement took too long.",
    "42501": "the user may not do this. Let the user own the database.",
    "3D000": "there is no such database. Make it: `createdb NAME`.",
}
_REASONS_BY_CLASS = {
    "08": "the connection was lost.",
    "28": "the user or the password is wrong.",
    "53": "the server is out of connections or memory.",
    "57": "the server is starting or stopping.",
    "58": "the server cannot read or write its disk.",
    "XX": "the server reports damaged data or an error of its own.",
}
_IN_DOUBT = " It was lost while committing, so the change may have been made."


def is_collision(error: BaseException) -> bool:
    if isinstance(error, asyncpg.exceptions.InvalidCachedStatementError):
        return True  # a migration changed the tables; the driver has forgotten its plans
    return isinstance(error, asyncpg.PostgresError) and error.sqlstate in _COLLISIONS


def is_loss(error: BaseException) -> bool:
    """The connection ended, or is ending: what was not committed is undone."""
    ended = (OSError, asyncpg.PostgresConnectionError, asyncpg.exceptions.OperatorInterventionError)
    if isinstance(error, asyncpg.exceptions.QueryCanceledError | TimeoutError):
        return False  # it lives, and what it did takes too long
    return isinstance(error, ended) or _is_ended(error)


def bad_url() -> ConfigError:
    return ConfigError("The database's URL cannot be read. It is postgresql://user:password@host/name.")


@dataclass(frozen=True, slots=True)
class Meaning:
    """`where` names the database without the password."""

    where: str

    @classmethod
    def of(cls, url: str) -> Meaning:
        try:
            parts = make_url(url)
        except (ValueError, ArgumentError) as error:
            raise bad_url() from error
        host = parts.host or str(parts.query.get("host", "localhost"))
        return cls(f"{parts.database} at {host}")

    def __call__(self, error: BaseException, *, committing: bool = False) -> Exception:
        """What to raise for `error`; `error` itself, when it is a bug of ours."""
        if isinstance(error, asyncpg.PostgresError):
            return self._of_server(error, in_doubt=committing)
        if isinstance(error, (ValueError, UnicodeEncodeError)):  # asyncpg's own DataError is one
            return InvalidRequest("A value cannot be stored: too large, or a text with half a character.")
        if isinstance(error, NimbosError):
            return error
        if isinstance(error, TimeoutError):
            return self._away("the server did not answer in time.", in_doubt=committing)
        if isinstance(error, OSError):
            return self._away("the server cannot be reached.", in_doubt=committing)
        assert isinstance(error, Exception)
        if isinstance(error, asyncpg.InternalClientError) or _is_ended(error):
            return self._away("the connection was lost.", in_doubt=committing)
        return error

    def _away(self, reason: str, *, in_doubt: bool) -> StorageUnavailable:
        return StorageUnavailable(self.where, reason=reason + (_IN_DOUBT if in_doubt else ""), in_doubt=in_doubt)

    def _of_server(self, error: asyncpg.PostgresError, *, in_doubt: bool) -> Exception:
        code = error.sqlstate or ""
        if code[:2] == "23":
            return Conflict("There is a row already that does not allow this one.")
        if code[:2] == "22":
            return InvalidRequest("A value cannot be stored: too large, or a text with a NUL character.")
        if code[:2] == "40":
            return StorageUnavailable(self.where, reason="others keep changing the same rows. Try again.")
        reason = _REASONS.get(code) or _REASONS_BY_CLASS.get(code[:2])
        return self._away(reason, in_doubt=in_doubt) if reason else error


def _is_ended(error: BaseException) -> bool:
    """asyncpg says in prose only that a connection or its pool is closed."""
    return isinstance(error, asyncpg.InterfaceError) and "clos" in str(error)
