"""The key behind the listener that asks for none: `ollama`, of a service account in the default project.

It is made at the first `nimbos up --ollama` and its secret kept in `NIMBOS_HOME/ollama.key` (mode 0600), so that its
limits, its budget and what it used go on. It may ask, in the class interactive, and administers nothing.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from pathlib import Path

from nimbos.accounts import Accounts
from nimbos.accounts.keys import BY_NAME, create_key, create_service_account
from nimbos.accounts.secret import new_secret
from nimbos.accounts.words import DEFAULT_PROJECT, LOCAL, Grant
from nimbos.config import Settings
from nimbos.db import Row, Transaction
from nimbos.errors import ConfigError, Unauthorized

NAME = "ollama"
ROUTES = (
    "/api",
    "/v1/chat",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/rerank",
    "/v1/responses",
)
GRANT = Grant(scopes=("class:interactive",), routes=ROUTES)


async def ollama_secret(accounts: Accounts, settings: Settings) -> str:
    """Of the key that works; a new one where there is none, or the one that was kept is revoked.

    Raises: ConfigError where somebody else's key has the name, or the file cannot be written.
    """
    file = settings.keys_file.with_name("ollama.key")
    try:
        kept = await asyncio.to_thread(_read, file)
        if kept:
            await accounts.authenticate(kept)
            return kept
    except Unauthorized:
        pass
    if await accounts.read(_living):
        raise ConfigError(
            f"There is a key named {NAME!r} already, and {file} does not hold it. Write it there, or "
            f"`nimbos key revoke {NAME}` first."
        )
    secret = new_secret()
    await asyncio.to_thread(_write, file, secret.value)
    owner = await accounts.change(LOCAL, lambda: create_service_account(DEFAULT_PROJECT, NAME))
    await accounts.change(
        LOCAL,
        lambda: create_key(
            name=NAME,
            secret=secret,
            project_id=DEFAULT_PROJECT,
            owner_kind="service_account",
            owner_id=owner.id,
            grant=GRANT,
        ),
    )
    return secret.value


def _living() -> Transaction[list[Row]]:
    return (yield BY_NAME(wanted=NAME, project=DEFAULT_PROJECT, everywhere=0))


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The key file {file} cannot be read: {error}") from error


def _write(file: Path, secret: str) -> None:
    """Whole or not at all."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(f"{secret}\n")
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(file)
    except OSError as error:
        raise ConfigError(f"The key file {file} cannot be written: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
