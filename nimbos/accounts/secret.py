"""Secrets: how they are made, and the only form in which they are kept.

They are 32 random bytes, so a plain SHA-256 is as good as a slow hash: nobody can try them all. Passwords of people are
another thing; see `password.py`.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

KEY_PREFIX = "nb-"
_SHOWN_FIRST, _SHOWN_LAST = 7, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """`value` is shown to its owner once and kept nowhere; its `repr` shows nothing either."""

    value: str
    digest: bytes
    redacted: str

    def __repr__(self) -> str:
        return f"Secret({self.redacted})"


def new_secret(prefix: str = KEY_PREFIX) -> Secret:
    value = f"{prefix}{secrets.token_urlsafe(32)}"
    return Secret(value=value, digest=digest_of(value), redacted=redacted(value))


def digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).digest()


def redacted(secret: str) -> str:
    """Enough to tell one's own keys apart, too little to try the rest."""
    return f"{secret[:_SHOWN_FIRST]}...{secret[-_SHOWN_LAST:]}"
