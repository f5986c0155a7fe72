"""The contents of files, in `blobs`. Each begins with its file's id, so no two files share one, whoever sends the same
bytes: a file can be removed without asking what else has its content. Readers see only what is behind the id.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from nimbos.blobs import Aged, Blobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A content that is stored, for the file of this id, which is not yet there."""

    file_id: str
    blob: str
    size_bytes: int


class Contents:
    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    async def store(self, file_id: str, pieces: AsyncIterator[bytes], *, limit_bytes: int) -> Received:
        """Raises: PayloadTooLarge, and nothing is stored then."""
        head = _head(file_id)

        async def whole() -> AsyncGenerator[bytes, None]:
            yield head
            async for piece in pieces:
                yield piece

        async with aclosing(whole()) as content:
            stored = await self._blobs.put_stream(content, limit_bytes=limit_bytes + len(head))
        return Received(file_id=file_id, blob=stored.hash, size_bytes=stored.size_bytes - len(head))

    async def read(
        self, file_id: str, blob: str, *, start: int = 0, end: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The bytes `[start, end)` in pieces. Raises: NotFound."""
        head_bytes = len(_head(file_id))
        dropping = head_bytes if start == 0 else 0  # read with the rest, so that the whole is checked by its hash
        first, last = start + head_bytes - dropping, None if end is None else end + head_bytes
        found = cast("AsyncGenerator[bytes, None]", self._blobs.read(blob, start=first, end=last))
        async with aclosing(found) as pieces:
            async for piece in pieces:
                kept = piece[dropping:]
                dropping -= len(piece) - len(kept)
                if kept:
                    yield kept

    def aged(self, *, before_ms: int, head_bytes: int) -> AsyncIterator[Aged]:
        """Of whatever is in the same place. `Aged.head` begins with the file's id, if it is one's."""
        return self._blobs.aged(before_ms=before_ms, head_bytes=head_bytes)

    async def remove(self, blob: str) -> None:
        await self._blobs.remove(blob)


def _head(file_id: str) -> bytes:
    return f"{file_id}\n".encode()
