"""The server's end of the render worker: starts it when first needed, keeps it warm, kills it when it misbehaves.
`renderer.py` is the worker. One job is in it at a time; a killed worker takes only that job with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import sys
from pathlib import Path

import msgspec

import nimbos
from nimbos.chat.renderer import RENDER_SECONDS
from nimbos.chat.template import MAX_PROMPT_CHARACTERS, Rendered, RenderFailure, RenderJob, RenderResult
from nimbos.errors import InvalidRequest
from nimbos.integers import beyond_64_bits

_START_SECONDS = 30
_MAX_REPLY_BYTES = 4 * MAX_PROMPT_CHARACTERS + 4096  # a character has at most four bytes
_ROOT = Path(__file__).anchor
_PLACE_CHARACTERS = 100
_LENGTH = struct.Struct(">I")
_INHERITED = ("TZ", "SYSTEMROOT")  # what Python and the local date need, and nothing else


class RenderProcess:
    """Renders jobs in a process of their own. Close it, or the worker lives as long as this process."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def render(self, job: RenderJob) -> RenderResult:
        """A failure is a value. After one of kind memory, time or died the worker is gone; the next starts another.

        Raises: InvalidRequest for an integer beyond 64 bits among the job's variables, saying where it stands.
        """
        frame = _encode(job)
        async with self._turn:
            clean = False
            try:
                result = await self._exchange(frame)
                clean = not (isinstance(result, RenderFailure) and result.kind in ("memory", "time", "died"))
                return result
            finally:
                if not clean:  # also when cancelled: a reply nobody read would be taken for the next job's
                    await self._kill()

    async def close(self) -> None:
        async with self._turn:
            await self._kill()

    async def _exchange(self, frame: bytes) -> RenderResult:
        try:
            process = await self._running()
            async with asyncio.timeout(RENDER_SECONDS):
                assert process.stdin is not None
                process.stdin.write(_LENGTH.pack(len(frame)) + frame)
                await process.stdin.drain()
                reply = await _read_frame(process)
            return _decode(reply)
        except TimeoutError:
            return RenderFailure("time")
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError, OSError):
            return RenderFailure("died")

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "nimbos.chat.renderer",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                cwd=_ROOT,
                env=_environment(),
            )
            async with asyncio.timeout(_START_SECONDS):
                await _read_frame(self._process)
        return self._process

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {**kept, "PYTHONPATH": str(Path(nimbos.__file__).parent.parent), "PYTHONUTF8": "1"}


def _encode(job: RenderJob) -> bytes:
    try:
        return msgspec.msgpack.encode(job)
    except OverflowError as error:
        place = (beyond_64_bits(job.variables) or "messages")[:_PLACE_CHARACTERS]
        raise InvalidRequest(f"`{place}` has an integer beyond 64 bits.", param=place) from error


def _decode(reply: bytes) -> RenderResult:
    result: RenderResult = msgspec.msgpack.decode(reply, type=Rendered | RenderFailure)
    return result


async def _read_frame(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    (length,) = _LENGTH.unpack(await process.stdout.readexactly(_LENGTH.size))
    if length > _MAX_REPLY_BYTES:
        raise ConnectionError(f"a frame of {length} bytes")
    return await process.stdout.readexactly(length)
