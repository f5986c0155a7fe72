"""Keys that stand outside the database: the owner's, and those of a file from before there were others.

The owner's key has the scope `admin`. It is `NIMBOS_API_KEY`, or is made once and kept in
`NIMBOS_HOME/owner.key` (mode 0600), so that a restart prints the same. `NIMBOS_HOME/keys.toml` holds more;
their `account` names a project:

    [keys.laptop]
    key = "nb-…"            # or sha256 = "…", so that the file holds no secret
    account = "alice"
    scopes = ["class:batch"]

Scopes: `admin`; `class:NAME` limits a key to the classes named; `programs:code` allows uploading programs with
Python. Keys are better made by `nimbos key create`.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from nimbos.config import Settings
from nimbos.errors import ConfigError
from nimbos.types import AskClass

ADMIN = "admin"
_SCOPES = frozenset({ADMIN, *(f"class:{name}" for name in AskClass), "programs:code"})


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    account: str
    key: str | None = None
    sha256: str | None = None
    scopes: tuple[str, ...] = ()


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: dict[str, _Entry] = msgspec.field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerKey:
    """`file` is where the key is kept, or None when it came from the environment."""

    secret: str
    file: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKey:
    """A key of `keys.toml`. `digest`: SHA-256 of the secret; `account`: the project's name."""

    name: str
    digest: bytes
    account: str
    scopes: frozenset[str]


def file_keys(settings: Settings) -> tuple[FileKey, ...]:
    """Raises: ConfigError naming the file and the key's name."""
    return tuple(_read_table(settings.keys_file).values())


def owner_key(settings: Settings) -> OwnerKey:
    """The bootstrap key; made and stored at the first call.

    Raises: ConfigError.
    """
    named = os.environ.get("NIMBOS_API_KEY")
    if named is not None:
        return OwnerKey(secret=_checked(named, "NIMBOS_API_KEY"), file=None)
    file = owner_key_file(settings)
    try:
        if not file.exists():
            _create(file, f"nb-{secrets.token_urlsafe(32)}\n")
        return OwnerKey(secret=_checked(file.read_text().strip(), str(file)), file=file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The key file {file} cannot be read or written: {error}") from error


def owner_key_file(settings: Settings) -> Path:
    return settings.keys_file.with_name("owner.key")


def _create(file: Path, text: str) -> None:
    """Whole or not at all, and the first of several processes wins."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(FileExistsError):
            os.link(draft, file)
    finally:
        draft.unlink()


def _read_table(file: Path) -> dict[bytes, FileKey]:
    try:
        table = tomllib.loads(file.read_text()) if file.exists() else {}
        entries = msgspec.convert(table, _File).keys
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{file}: {error}") from error
    found: dict[bytes, FileKey] = {}
    for name, entry in entries.items():
        where = f"{file}: [keys.{name}]"
        digest = _digest_of(entry, where)
        if digest in found:
            raise ConfigError(f"{where}: the same key stands here twice.")
        unknown = set(entry.scopes) - _SCOPES
        if unknown:
            raise ConfigError(f"{where}: unknown scope {min(unknown)!r}; there are {', '.join(sorted(_SCOPES))}.")
        if not entry.account:
            raise ConfigError(f"{where}: `account` is empty.")
        found[digest] = FileKey(name=name, digest=digest, account=entry.account, scopes=frozenset(entry.scopes))
    return found


def _digest_of(entry: _Entry, where: str) -> bytes:
    if (entry.key is None) == (entry.sha256 is None):
        raise ConfigError(f"{where}: give one of `key` and `sha256`.")
    if entry.key is not None:
        return _digest(_checked(entry.key, where))
    try:
        digest = bytes.fromhex(entry.sha256 or "")
    except ValueError as error:
        raise ConfigError(f"{where}: `sha256` is not hexadecimal.") from error
    if len(digest) != 32:
        raise ConfigError(f"{where}: `sha256` has {len(digest)} bytes and must have 32.")
    return digest


def _checked(secret: str, where: str) -> str:
    if not secret or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ConfigError(f"{where}: a key is made of printable ASCII characters without spaces.")
    return secret


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
