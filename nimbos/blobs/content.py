"""What a place for contents must do, and what both places share: hashes, and pieces of one length."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from nimbos.errors import NotFound, PayloadTooLarge, StorageUnavailable

PIECE_BYTES = 256 * 1024  # written at once
READ_BYTES = 64 * 1024

_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Stored:
    hash: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Aged:
    """`head`: its first bytes. `stored_ms`: when it came, first; a content that is put again is not younger."""

    hash: str
    head: bytes
    stored_ms: int


class Blobs(Protocol):
    """All methods may raise StorageUnavailable, also for a content whose bytes no longer have its hash."""

    async def put(self, content: bytes) -> str:
        """Stores it, so that it outlives a loss of power, and returns its hash."""
        ...

    async def put_stream(self, pieces: AsyncIterator[bytes], *, limit_bytes: int) -> Stored:
        """Stores what comes without holding it in memory. Whatever `pieces` raises ends it, and nothing is kept.

        Raises: PayloadTooLarge.
        """
        ...

    async def get(self, hash: str) -> bytes:
        """Raises: NotFound."""
        ...

    def read(
        self, hash: str, *, start: int = 0, end: int | None = None, piece_bytes: int = READ_BYTES
    ) -> AsyncIterator[bytes]:
        """The bytes `[start, end)`, or as many of them as there are, in pieces of at most `piece_bytes`. The hash is
        checked when a reading from the start comes to the end. Raises: NotFound."""
        ...

    async def has(self, hash: str) -> bool: ...

    def aged(self, *, before_ms: int, head_bytes: int) -> AsyncIterator[Aged]:
        """All contents that came before then."""
        ...

    async def remove(self, hash: str) -> None:
        """For whoever knows that nothing refers to it any more. What is not there is no error."""
        ...


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def check_name(hash: str) -> str:
    """`hash`, which may come from a client. Raises: NotFound for what cannot be one."""
    if not _HASH.fullmatch(hash):
        raise NotFound("There is no such content.")
    return hash


def not_found(hash: str) -> NotFound:
    return NotFound(f"There is no content {hash}.")


def check_content(hash: str, digest: hashlib._Hash) -> None:
    """Raises: StorageUnavailable."""
    if digest.hexdigest() != hash:
        raise StorageUnavailable(f"content {hash}", reason="it is damaged: its bytes have another hash.")


async def in_pieces(pieces: AsyncIterator[bytes], *, limit_bytes: int) -> AsyncGenerator[bytes, None]:
    """The same bytes in pieces of `PIECE_BYTES`; only the last is shorter. Raises: PayloadTooLarge."""
    kept, size_bytes = bytearray(), 0
    async for piece in pieces:
        size_bytes += len(piece)
        if size_bytes > limit_bytes:
            raise PayloadTooLarge(have=None, limit=limit_bytes, what="file")
        kept += piece
        while len(kept) >= PIECE_BYTES:
            yield bytes(kept[:PIECE_BYTES])
            del kept[:PIECE_BYTES]
    if kept:
        yield bytes(kept)
