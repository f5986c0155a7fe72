"""Contents as files. Works in threads, as disks block."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import BinaryIO

from nimbos.blobs.content import (
    READ_BYTES,
    Aged,
    Stored,
    check_content,
    check_name,
    hash_of,
    in_pieces,
    not_found,
)
from nimbos.errors import StorageUnavailable

_FULL = {errno.ENOSPC, errno.EDQUOT}
_BYTE_CHARACTERS = 2  # of a hash
_LEFT_BEHIND_S = 24 * 3600  # an incoming file that old is of a program that died


class FolderBlobs:
    """`ab/cd/abcd…`, two levels of folders, so that none grows without bound. A file that is there is whole: it is
    written under another name, synced, then renamed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def put(self, content: bytes) -> str:
        return await asyncio.to_thread(self._put, content)

    async def put_stream(self, pieces: AsyncIterator[bytes], *, limit_bytes: int) -> Stored:
        incoming = await asyncio.to_thread(_Incoming, self._folder)
        try:
            async with aclosing(in_pieces(pieces, limit_bytes=limit_bytes)) as even:
                async for piece in even:
                    await asyncio.to_thread(incoming.add, piece)
            return await asyncio.to_thread(incoming.keep)
        finally:
            await asyncio.to_thread(incoming.discard)

    async def get(self, hash: str) -> bytes:
        return await asyncio.to_thread(self._get, hash)

    async def read(
        self, hash: str, *, start: int = 0, end: int | None = None, piece_bytes: int = READ_BYTES
    ) -> AsyncIterator[bytes]:
        reading = _Reading()
        digest, position = hashlib.sha256(), start
        try:
            await asyncio.to_thread(lambda: reading.begin(self._open(hash, start)))
            while end is None or position < end:
                wanted = piece_bytes if end is None else min(piece_bytes, end - position)
                piece = await asyncio.to_thread(reading.read, wanted)
                if not piece:
                    break
                digest.update(piece)
                position += len(piece)
                yield piece
            if start == 0 and (end is None or position < end):
                check_content(hash, digest)
        finally:
            reading.close()

    async def has(self, hash: str) -> bool:
        return await asyncio.to_thread(self._path(hash).is_file)

    async def aged(self, *, before_ms: int, head_bytes: int) -> AsyncIterator[Aged]:
        for folder in await asyncio.to_thread(_below, self._folder):
            for found in await asyncio.to_thread(_aged, folder, before_ms, head_bytes):
                yield found

    async def remove(self, hash: str) -> None:
        await asyncio.to_thread(self._remove, hash)

    def _path(self, hash: str) -> Path:
        check_name(hash)
        return self._folder / hash[:2] / hash[2:4] / hash

    def _put(self, content: bytes) -> str:
        path = self._path(hash_of(content))
        if path.is_file():
            return path.name
        incoming = _Incoming(self._folder)
        try:
            incoming.add(content)
            return incoming.keep().hash
        finally:
            incoming.discard()

    def _get(self, hash: str) -> bytes:
        with self._open(hash, 0) as file:
            content = _read(file, -1)
        check_content(hash, hashlib.sha256(content))
        return content

    def _open(self, hash: str, start: int) -> BinaryIO:
        path = self._path(hash)
        try:
            file = path.open("rb")
        except FileNotFoundError as error:
            raise not_found(hash) from error
        except OSError as error:
            raise _meaning(error, path) from error
        file.seek(start)
        return file

    def _remove(self, hash: str) -> None:
        path = self._path(hash)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _meaning(error, path) from error


class _Reading:
    """A file that threads open and read; closed also where its reader goes while a thread still opens it."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        self._closed = False
        self._lock = threading.Lock()

    def begin(self, file: BinaryIO) -> None:
        with self._lock:
            self._file = file
            if self._closed:
                file.close()

    def read(self, size: int) -> bytes:
        assert self._file is not None
        return _read(self._file, size)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._file is not None:
                self._file.close()


class _Incoming:
    """A content on its way into the folder. Its methods block, and run in threads: one that was left running by a
    caller who is gone ends before the next begins."""

    def __init__(self, folder: Path) -> None:
        """Raises: StorageUnavailable."""
        self._folder = folder
        self._path = folder / f"incoming-{secrets.token_hex(8)}"
        self._lock = threading.Lock()
        self._digest = hashlib.sha256()
        self._size_bytes = 0
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _remove_left_behind(folder)
            self._file = self._path.open("xb", buffering=0)
            self._path.chmod(0o600)
        except OSError as error:
            raise _meaning(error, folder) from error

    def add(self, piece: bytes) -> None:
        with self._lock:
            try:
                left = memoryview(piece)
                while left:
                    left = left[self._file.write(left) :]
            except OSError as error:
                raise _meaning(error, self._path) from error
            self._digest.update(piece)
            self._size_bytes += len(piece)

    def keep(self) -> Stored:
        hash = self._digest.hexdigest()
        target = self._folder / hash[:2] / hash[2:4] / hash
        with self._lock:
            try:
                os.fsync(self._file.fileno())
                is_new = not target.parent.is_dir()
                target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._path.replace(target)
                _sync_folder(target.parent)
                if is_new:
                    _sync_folder(target.parent.parent)
                    _sync_folder(self._folder)
            except OSError as error:
                raise _meaning(error, self._path) from error
        return Stored(hash, self._size_bytes)

    def discard(self) -> None:
        """Leaves nothing but what was kept."""
        with self._lock:
            self._file.close()
            with contextlib.suppress(OSError):
                self._path.unlink()


def _read(file: BinaryIO, size: int) -> bytes:
    try:
        return file.read(size)
    except OSError as error:
        raise _meaning(error, Path(file.name)) from error


def _below(folder: Path) -> list[Path]:
    """The folders that hold contents, one for each first byte of a hash."""
    try:
        return sorted(path for path in folder.iterdir() if len(path.name) == _BYTE_CHARACTERS)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _meaning(error, folder) from error


def _aged(folder: Path, before_ms: int, head_bytes: int) -> list[Aged]:
    """In one such folder. What goes while it is looked at is left out."""
    found: list[Aged] = []
    for path in sorted(folder.glob(f"??/{folder.name}*")):
        try:
            stored_ms = path.stat().st_mtime_ns // 1_000_000
            if stored_ms < before_ms:
                with path.open("rb") as file:
                    found.append(Aged(path.name, file.read(head_bytes), stored_ms))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _meaning(error, path) from error
    return found


def _remove_left_behind(folder: Path) -> None:
    oldest = time.time() - _LEFT_BEHIND_S
    for path in folder.glob("incoming-*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                path.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _meaning(error: OSError, path: Path) -> StorageUnavailable:
    reason = "the disk is full. Free some space." if error.errno in _FULL else f"{error.strerror}."
    return StorageUnavailable(str(path), reason=reason)
