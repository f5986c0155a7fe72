"""From a remote file to a file on disk: resumed, hashed, and there only when it is whole.

    name.part        the bytes so far
    name.part.json   which file they are of: address, size, validator
    name             after the hash was right, by one rename

A part whose remote file has changed begins anew. A cut, a 5xx or a 429 is tried again from where it stopped; what
counts against the patience is tries without a new mebibyte, so a long download over a bad line ends well.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec

from nimbos.errors import DownloadFailed
from nimbos.hub.disk import BLOCK_BYTES, Fetched, drop_part, part_bytes, part_of, record_of, settle
from nimbos.hub.progress import Progress
from nimbos.hub.remote import Body, PassingFailure, Remote, RemoteFile, SourceUnreachable

Result = TypeVar("Result")

_MAX_WAIT_S = 120.0
_MAX_CHANGES = 3


class _PartRecord(msgspec.Struct, frozen=True, kw_only=True):
    url: str
    size_bytes: int | None
    validator: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to put up with a source. `sleep` is what waits between tries."""

    tries: int = 6
    first_wait_s: float = 0.5
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def wait(self, failure: PassingFailure, failed: int, progress: Progress) -> None:
        """Raises: SourceUnreachable when `failed` tries were enough, or the server asks for too much time."""
        if failed >= self.tries:
            raise SourceUnreachable(f"{failure}. Gave up after {failed} tries.") from failure
        wait_s = failure.wait_s if failure.wait_s is not None else min(self.first_wait_s * 2 ** (failed - 1), 30.0)
        if wait_s > _MAX_WAIT_S:
            raise SourceUnreachable(f"{failure}: the server asks to come back in {wait_s:.0f} s.") from failure
        progress.note(f"{failure}; trying again in {wait_s:.1f} s ({failed} of {self.tries})")
        await self.sleep(wait_s)

    async def keep_trying(self, action: Callable[[], Awaitable[Result]], progress: Progress) -> Result:
        """Raises: as `wait`, and whatever `action` raises beside PassingFailure."""
        failed = 0
        while True:
            try:
                return await action()
            except PassingFailure as failure:
                failed += 1
                await self.wait(failure, failed, progress)


async def fetch(remote: Remote, file: RemoteFile, target: Path, *, patience: Patience, progress: Progress) -> Fetched:
    """Downloads `file` to `target`, going on with a part that is there. Nobody else may write that part.

    Raises: DownloadFailed; the part stays for the next try unless its bytes proved wrong.
    """
    try:
        for _ in range(_MAX_CHANGES):
            download = _Download(remote, file, target, patience, progress)
            changed = await download.run()
            if changed is None:
                return await download.finish()
            if file.sha256 and not changed.sha256:
                break
            progress.note(f"{file.label} changed meanwhile; beginning anew")
            drop_part(target)
            file = changed
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadFailed(
                f"The disk of {target.parent} is full. The part stays; free some space and go on."
            ) from error
        raise DownloadFailed(f"{target} cannot be written: {error.strerror}") from error
    drop_part(target)
    raise DownloadFailed(f"{file.label} changed while it was downloaded. Try again.")


class _Download:
    """One file, until it is whole, has changed on the server, or patience has ended."""

    def __init__(self, remote: Remote, file: RemoteFile, target: Path, patience: Patience, progress: Progress) -> None:
        self.remote = remote
        self.file = file
        self.target = target
        self.part = part_of(target)
        self.patience = patience
        self.progress = progress
        self.have = 0
        self.digest = hashlib.sha256()
        self.resumed = False

    async def run(self) -> RemoteFile | None:
        """None when the part is whole, or what the file has become on the server."""
        await self._take_up()
        failed, counted = 0, self.have
        while self.file.size_bytes is None or self.have < self.file.size_bytes:
            try:
                async with self.remote.open(self.file, self.have if self._sure else 0) as body:
                    if _differs(self.file, body.file):
                        return body.file
                    await self._read(body)
                if self.file.size_bytes is None or self.have == self.file.size_bytes:
                    break
                raise PassingFailure(f"{self.file.label} ended after {self.have} of {self.file.size_bytes} bytes")
            except PassingFailure as failure:
                if self.have >= counted + BLOCK_BYTES:
                    failed, counted = 0, self.have
                failed += 1
                await self.patience.wait(failure, failed, self.progress)
        return None

    @property
    def _sure(self) -> bool:
        """Whether other bytes than those we have begun with would be noticed."""
        return bool(self.file.validator or self.file.sha256)

    async def finish(self) -> Fetched:
        have, want = self.digest.hexdigest(), self.file.sha256
        if want is not None and have != want:
            drop_part(self.target)
            if not self.resumed:
                raise DownloadFailed(
                    f"{self.file.label} came with the wrong bytes: its sha256 is {have} and should be {want}. "
                    "They were thrown away; try again, or another source."
                )
            self.progress.note("the resumed download does not have the right hash; beginning anew")
            return await fetch(self.remote, self.file, self.target, patience=self.patience, progress=self.progress)
        await asyncio.to_thread(settle, self.part, self.target)
        record_of(self.target).unlink(missing_ok=True)
        return Fetched(path=self.target, size_bytes=self.have, sha256=have)

    async def _take_up(self) -> None:
        """Goes on with the part if it is of this very file; its bytes are hashed again, not believed."""
        record = _PartRecord(url=self.file.label, size_bytes=self.file.size_bytes, validator=self.file.validator)
        length = part_bytes(self.target)
        if (
            not length
            or not record.validator
            or _read_record(self.target) != record
            or length > (record.size_bytes or 0)
        ):
            drop_part(self.target)
            await asyncio.to_thread(_write_record, self.target, record)
            self.part.touch(mode=0o600)
        else:
            self.progress.note(f"going on after {length / 1e6:,.0f} MB")
            self.resumed = True
            await self._hash_part()
        self.progress.start(self.target.name, total_bytes=self.file.size_bytes, done_bytes=self.have)

    async def _hash_part(self) -> None:
        with self.part.open("rb") as part:
            while block := await asyncio.to_thread(part.read, 4 * BLOCK_BYTES):
                await asyncio.to_thread(self.digest.update, block)
                self.have += len(block)

    async def _read(self, body: Body) -> None:
        """Appends the body to the part. The state is right after every block, however this ends."""
        self.resumed = self.resumed or body.start > 0
        if body.start != self.have:
            if body.start:
                raise PassingFailure(f"{self.file.label} was asked from byte {self.have} on and begins at {body.start}")
            self._begin_anew()
        with self.part.open("r+b", buffering=0) as part:
            part.seek(self.have)
            waiting = bytearray()
            try:
                async for block in body.response.aiter_raw():
                    self._require_room(self.have + len(waiting) + len(block))
                    waiting += block
                    self.progress.advance(len(block))
                    if len(waiting) >= BLOCK_BYTES:
                        full, waiting = waiting, bytearray()
                        await self._write(part.write, full)
            finally:
                self._write_now(part.write, waiting)

    async def _write(self, write: Callable[[bytes], int | None], block: bytearray) -> None:
        writing = asyncio.ensure_future(asyncio.to_thread(self._write_now, write, block))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await writing  # the thread still uses the file
            raise

    def _write_now(self, write: Callable[[bytes], int | None], block: bytearray) -> None:
        rest = memoryview(block)
        while rest:
            count = write(bytes(rest)) or 0
            self.digest.update(rest[:count])
            self.have += count
            rest = rest[count:]

    def _require_room(self, count: int) -> None:
        limit = self.file.size_bytes
        if limit is not None and count > limit:
            drop_part(self.target)
            raise DownloadFailed(f"{self.file.label} sends more than the {limit} bytes that it announced.")

    def _begin_anew(self) -> None:
        os.truncate(self.part, 0)
        self.have, self.digest, self.resumed = 0, hashlib.sha256(), False
        self.progress.start(self.target.name, total_bytes=self.file.size_bytes, done_bytes=0)


def _differs(known: RemoteFile, seen: RemoteFile) -> bool:
    """Whether the server offers other bytes than those we have begun with."""
    return seen.validator != known.validator or (
        None not in (seen.size_bytes, known.size_bytes) and seen.size_bytes != known.size_bytes
    )


def with_hash(file: RemoteFile, sha256: str | None) -> RemoteFile:
    """What another place (a listing, the catalog) knows of a file's hash.

    Raises: DownloadFailed when the server contradicts it.
    """
    if sha256 is None or file.sha256 == sha256:
        return file
    if file.sha256 is not None:
        raise DownloadFailed(f"{file.label} has the sha256 {file.sha256} and should have {sha256}.")
    return replace(file, sha256=sha256)


def _read_record(target: Path) -> _PartRecord | None:
    try:
        return msgspec.json.decode(record_of(target).read_bytes(), type=_PartRecord)
    except (OSError, msgspec.DecodeError):
        return None


def _write_record(target: Path, record: _PartRecord) -> None:
    record_of(target).write_bytes(msgspec.json.encode(record))
