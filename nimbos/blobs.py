"""Contents by their hash: files, batch lines, stored responses, pictures.

A content is known by the SHA-256 of its bytes, so storing it twice is storing it once, and reading it checks it. In a
folder by default, in the database by setting. Knows nothing of who owns a content: the parts that store one keep its
hash in their rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.errors import NotFound, PayloadTooLarge, StorageUnavailable

_HASH = re.compile(r"[0-9a-f]{64}")
_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True, slots=True)
class Stored:
    hash: str
    size_bytes: int


class Blobs(Protocol):
    """Raises everywhere: StorageUnavailable, also for a content whose bytes no longer have its hash."""

    async def put(self, content: bytes) -> str:
        """Stores it, durably, and returns its hash."""
        ...

    async def put_stream(self, pieces: AsyncIterator[bytes], *, limit_bytes: int) -> Stored:
        """Stores what comes without ever holding it in memory. Raises: PayloadTooLarge, and then nothing is kept."""
        ...

    async def get(self, hash: str) -> bytes:
        """Raises: NotFound."""
        ...

    def read(
        self, hash: str, *, start: int = 0, end: int | None = None, piece_bytes: int = 65536
    ) -> AsyncIterator[bytes]:
        """The bytes `[start, end)` in pieces. The hash is checked when all are read. Raises: NotFound."""
        ...

    async def has(self, hash: str) -> bool: ...

    async def remove(self, hash: str) -> None:
        """What is not there is no error."""
        ...


def open_blobs(settings: Settings, database: Database) -> Blobs:
    """As `storage.blobs` says. Nothing has to be closed."""
    return FolderBlobs(Path(settings.storage.blobs or Path(settings.home) / "blobs"))


class FolderBlobs:
    """`ab/cd/abcd…`, two levels of folders, so that none grows without bound. A file that is there is whole: it is
    written under another name, synced, then renamed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def put(self, content: bytes) -> str:
        return await asyncio.to_thread(self._put, content)

    async def put_stream(self, pieces: AsyncIterator[bytes], *, limit_bytes: int) -> Stored:
        incoming = await asyncio.to_thread(self._incoming)
        try:
            async for piece in pieces:
                if incoming.size_bytes + len(piece) > limit_bytes:
                    raise PayloadTooLarge(have=None, limit=limit_bytes, what="file")
                await asyncio.to_thread(incoming.add, piece)
            return await asyncio.to_thread(incoming.keep)
        finally:
            await asyncio.to_thread(incoming.discard)

    async def get(self, hash: str) -> bytes:
        return await asyncio.to_thread(self._get, hash)

    async def read(
        self, hash: str, *, start: int = 0, end: int | None = None, piece_bytes: int = 65536
    ) -> AsyncIterator[bytes]:
        file = await asyncio.to_thread(self._open, hash)
        digest = hashlib.sha256() if start == 0 else None
        try:
            await asyncio.to_thread(file.seek, start)
            position = start
            while end is None or position < end:
                wanted = piece_bytes if end is None else min(piece_bytes, end - position)
                piece = await asyncio.to_thread(file.read, wanted)
                if not piece:
                    self._check(hash, digest)
                    return
                if digest is not None:
                    digest.update(piece)
                position += len(piece)
                yield piece
        finally:
            file.close()

    async def has(self, hash: str) -> bool:
        return await asyncio.to_thread(self._path(hash).is_file)

    async def remove(self, hash: str) -> None:
        await asyncio.to_thread(self._path(hash).unlink, missing_ok=True)

    def _path(self, hash: str) -> Path:
        if not _HASH.fullmatch(hash):
            raise NotFound("There is no such content.")
        return self._folder / hash[:2] / hash[2:4] / hash

    def _put(self, content: bytes) -> str:
        path = self._path(hash_of(content))
        if path.is_file():
            return path.name
        incoming = self._incoming()
        try:
            incoming.add(content)
            return incoming.keep().hash
        finally:
            incoming.discard()

    def _incoming(self) -> _Incoming:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return _Incoming(self._folder)
        except OSError as error:
            raise _meaning(error, self._folder) from error

    def _get(self, hash: str) -> bytes:
        with self._open(hash) as file:
            content = file.read()
        self._check(hash, hashlib.sha256(content))
        return content

    def _open(self, hash: str) -> BinaryIO:
        path = self._path(hash)
        try:
            return path.open("rb")
        except FileNotFoundError as error:
            raise NotFound(f"There is no content {hash}.") from error
        except OSError as error:
            raise _meaning(error, path) from error

    def _check(self, hash: str, digest: hashlib._Hash | None) -> None:
        if digest is not None and digest.hexdigest() != hash:
            raise StorageUnavailable(
                str(self._path(hash)), reason="the content is damaged: its bytes have another hash."
            )


class _Incoming:
    """A content on its way into the folder. Blocks; used in threads, one call at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / f"incoming-{secrets.token_hex(8)}"
        self._file = os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0)
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def add(self, piece: bytes) -> None:
        try:
            left = memoryview(piece)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise _meaning(error, self._path) from error
        self._digest.update(piece)
        self.size_bytes += len(piece)

    def keep(self) -> Stored:
        hash = self._digest.hexdigest()
        target = self._folder / hash[:2] / hash[2:4] / hash
        try:
            os.fsync(self._file.fileno())
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._path.rename(target)
            for folder in (target.parent, target.parent.parent, self._folder):
                _sync_folder(folder)
        except OSError as error:
            raise _meaning(error, self._path) from error
        return Stored(hash, self.size_bytes)

    def discard(self) -> None:
        """What was kept stays."""
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _meaning(error: OSError, path: Path) -> StorageUnavailable:
    reason = "the disk is full. Free some space." if error.errno in _FULL else f"{error.strerror}."
    return StorageUnavailable(str(path), reason=reason)
