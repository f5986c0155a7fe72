"""One operating-system process that runs a program's Python, and the pipe to it. Knows frames, not what they ask for.

It gets an environment of its own with nothing of the server's in it, two descriptors, and a session of its own. It ends
when the server does, however that ends, and with it all that it started: its keeper sees to that (`nimbos/keeper.py`),
which is the process that is known here, and ends as the worker did.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec

import nimbos
from nimbos.keeper import TOO_MANY_CODE
from nimbos.toolwire import FRAME_BYTES_MAX, LENGTH, FromWorker, ToWorker, from_worker, pack

_KEPT = ("TZ", "SYSTEMROOT")  # what Python and the local date need
_PATH = "/usr/local/bin:/usr/bin:/bin"
_READ_BYTES = 1 << 20
_PATIENCE_S = 10.0  # with a keeper, which is longer than it takes to end what is below it
OUTPUT_BYTES = 1 << 20  # kept of what a process has printed


class PipeBroken(Exception):
    """Nothing more comes from this process; the message says why, for people."""


class WorkerProcess:
    """`start` makes one. Whoever has it kills it; then `wait` it out."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, life: int
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._life: int | None = life

    @classmethod
    async def start(cls, *, workspace: Path, output: Path, below: int) -> WorkerProcess:
        """`output`: a file for what it prints, begun anew. `below`: processes that it may be, with what it starts.

        Raises: OSError.
        """
        ours, theirs = socket.socketpair()
        life_theirs, life = os.pipe()
        try:
            with theirs, output.open("wb") as printed:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-P", "-s", "-m", "nimbos.keeper", str(theirs.fileno()), str(life_theirs), str(below)),
                    pass_fds=[theirs.fileno(), life_theirs],
                    cwd=workspace,
                    env=environment(workspace),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=printed,
                    stderr=printed,
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            os.close(life)
            raise
        finally:
            os.close(life_theirs)
        try:
            reader, writer = await asyncio.open_connection(sock=ours, limit=_READ_BYTES)
        except BaseException:
            os.close(life)  # which it does not outlive
            await process.wait()
            raise
        return cls(process, reader, writer, life)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def killed(self) -> bool:
        """It is gone, and did not end by itself."""
        return self._process.returncode is not None and self._process.returncode < 0

    async def send(self, message: ToWorker) -> None:
        """Waits while the worker takes nothing. Raises: PipeBroken."""
        try:
            self._writer.write(pack(message))
            await self._writer.drain()
        except OSError as error:
            raise PipeBroken("its pipe is closed") from error

    async def receive(self, *, most_bytes: int = FRAME_BYTES_MAX) -> FromWorker:
        """Raises: PipeBroken, also for what is no frame of ours."""
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            if length > most_bytes:
                raise PipeBroken(f"it sent a frame of {length} bytes; at most {most_bytes} are taken")
            return from_worker(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise PipeBroken("it ended") from error
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise PipeBroken("it sent what is no frame") from error

    def kill(self) -> None:
        """At once, with whatever it started. `wait` until that is so."""
        life, self._life = self._life, None
        if life is None:
            return
        if sys.platform != "linux":
            self._kill_group()
        os.close(life)  # which the keeper sees, and the system, which kills the worker's group
        self._writer.transport.abort()

    def _kill_group(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def wait(self) -> str:
        """Until it is gone, once it was killed. How it ended, for people."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                code = await self._process.wait()
        except TimeoutError:  # a tool can stop its keeper; the worker dies with it
            self._kill_group()
            code = await self._process.wait()
        if code == TOO_MANY_CODE:
            return "it was ended: too many processes were started"
        if code >= 0:
            return f"it ended with {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"it was ended by {name}" + _WHY.get(name, "")


_WHY = {"SIGXCPU": ": it has used up its processor time", "SIGSEGV": ": it crashed in C code", "SIGKILL": ""}


def shorten(output: Path) -> None:
    """What was printed is kept to its last part. Blocks."""
    with contextlib.suppress(OSError):
        size = output.stat().st_size
        if size > OUTPUT_BYTES:
            with output.open("r+b") as file:
                file.seek(size - OUTPUT_BYTES)
                last = file.read(OUTPUT_BYTES)
                file.seek(0)
                file.write(last)
                file.truncate()


def environment(workspace: Path) -> dict[str, str]:
    """Nothing that was not meant for a program: no keys, no tokens, no proxies."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return {
        **kept,
        "PATH": _PATH,
        "HOME": str(workspace),
        "TMPDIR": str(workspace),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(Path(nimbos.__file__).parent.parent),
        "PYTHONUTF8": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # a program's folder is read-only
        "OMP_NUM_THREADS": "1",  # the processors are the engines', which share them step by step
        "OPENBLAS_NUM_THREADS": "1",
    }
