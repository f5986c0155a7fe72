"""The worker of one running program, as the server sees it: started when it is first needed, killed at a deadline, when
its pipe says what it must not, and when the program parks. The next call starts another, once this one is gone.

Nothing that a worker does is trusted or is an exception of a caller's: a call has a `ToolResult`. `live.py` has the
process, `adk/worker.py` is its side.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nimbos.errors import BrokenProgram
from nimbos.kernel.segments import canonical
from nimbos.kernel.tools.live import FunctionRun, Live, WorkerDied
from nimbos.kernel.tools.printed import end_of, printed_since
from nimbos.kernel.tools.process import PipeBroken, WorkerProcess
from nimbos.kernel.tools.results import WORKER_CODES, NotJson, ToolResult, Verified, read_value
from nimbos.kernel.tools.specs import ToolSpec, read_specs
from nimbos.kernel.tools.turns import Turns
from nimbos.toolwire import (
    CALLS_MAX,
    MESSAGE_CHARACTERS,
    Call,
    CallDone,
    FromWorker,
    Load,
    Loaded,
    Run,
    Verify,
    VerifyDone,
    WorkerLimits,
    shortened,
)

START_S = 60.0  # imports of a program may be slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a worker finds its program and works. `output`: a file for what it prints."""

    folder: Path
    workspace: Path
    output: Path


class ToolWorker:
    """`place` is asked for at each start. Use from one event loop; calls may run at once."""

    def __init__(
        self,
        place: Callable[[], Awaitable[Place]],
        *,
        tools: str,
        entry: str = "",
        limits: WorkerLimits | None = None,
    ) -> None:
        """`tools`: the program's file of tools, "" for none. `entry`: of a durable function, `main.py:main`."""
        self._place = place
        self._tools = tools
        self._entry = entry
        self._limits = limits or WorkerLimits()
        self._starting = asyncio.Lock()
        self._turns = Turns(CALLS_MAX)
        self._live: Live | None = None
        self._output: Path | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._live.pid if self._live is not None and self._live.died is None else None

    def turn(self, *, alone: bool) -> AbstractAsyncContextManager[None]:
        """For whoever is about to call: beside others, or with nothing beside it."""
        return self._turns.take(alone=alone)

    async def describe(self) -> tuple[ToolSpec, ...]:
        """Raises: BrokenProgram for Python that cannot be used; WorkerDied, StorageUnavailable."""
        return (await self._running()).specs

    async def call(self, tool: str, arguments: Any, *, key: str = "", deadline_s: float) -> ToolResult:
        """The deadline counts from when the worker is up. Cancelled, it kills the worker.

        Raises: StorageUnavailable when the program's files cannot be put in place.
        """
        content = canonical(arguments)
        try:
            live = await self._running()
        except BrokenProgram as error:
            return ToolResult(error="not_loaded", message=error.message)
        except WorkerDied as died:
            return ToolResult(error="died", message=f"The tool was not run: its process {died}.")

        def ask(number: int) -> Call:
            deadline_ms = round(deadline_s * 1000)
            return Call(number=number, tool=tool, arguments=content, key=key, deadline_ms=deadline_ms)

        output = self._output
        assert output is not None, "a worker that runs has a file for what it prints"
        start = end_of(output)  # a look at its size takes less than a thread's turn
        result = await self._exchanged(live, ask, deadline_s)
        if end_of(output) == start:
            return result
        return replace(result, printed=await asyncio.to_thread(printed_since, output, start))

    async def _exchanged(self, live: Live, ask: Callable[[int], Call], deadline_s: float) -> ToolResult:
        begun = time.monotonic()
        try:
            return self._result(await live.exchange(ask, deadline_s))
        except WorkerDied as died:
            if died.deadline and time.monotonic() - begun >= deadline_s:  # its own, not that of a call beside it
                late = f"It took longer than {deadline_s:g} s."
                return ToolResult(error="deadline", message=late, perhaps=True, suspects=1)
            gone = f"The tool's process is gone: {died}."
            return ToolResult(error="died", message=gone, perhaps=True, suspects=died.suspects)
        except NotJson as error:
            await live.bury(WorkerDied(f"it sent a result that cannot be read ({error})", known=True))
            return ToolResult(error="died", message="The tool's process broke its protocol.", perhaps=True, suspects=1)

    async def verify(self, tool: str, arguments: Any, *, key: str, deadline_s: float) -> Verified:
        """Whether the call with this key happened. Raises: StorageUnavailable."""
        content = canonical(arguments)

        def ask(number: int) -> Verify:
            deadline_ms = round(deadline_s * 1000)
            return Verify(number=number, tool=tool, arguments=content, key=key, deadline_ms=deadline_ms)

        try:
            live = await self._running()
        except BrokenProgram as error:
            return Verified(happened=None, message=error.message)
        except WorkerDied as died:
            return Verified(happened=None, message=f"The process that was to be asked {died}.")
        try:
            reply = await live.exchange(ask, deadline_s)
            if not isinstance(reply, VerifyDone):
                raise NotJson("another kind of answer")
            result = read_value(reply.value)
        except WorkerDied as died:
            return Verified(happened=None, message=f"The process that was asked is gone: {died}.")
        except NotJson as error:
            await live.bury(WorkerDied(f"it sent a result that cannot be read ({error})", known=True))
            return Verified(happened=None, message="The process that was asked broke its protocol.")
        return Verified(happened=reply.happened, result=result, message=shortened(reply.message))

    async def run_function(self, input: Any) -> FunctionRun:
        """Starts the durable function in a process that runs no other: an earlier one is ended.

        Raises: BrokenProgram, WorkerDied, StorageUnavailable.
        """
        if self._live is not None and self._live.function is not None:
            await self._live.bury(WorkerDied("its function begins anew"))
        live = await self._running()
        live.function = asyncio.Queue()
        await live.send(Run(input=canonical(input)))
        return FunctionRun(live)

    async def close(self) -> None:
        """Ends the process; calls in flight have died. Cancelled, it still waits until the process is gone."""
        closing = asyncio.create_task(self._close())
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await asyncio.wait({closing})
            raise

    async def _close(self) -> None:
        async with self._starting:
            if self._live is not None:
                await self._live.bury(WorkerDied("its program was parked or ended"))

    async def _running(self) -> Live:
        async with self._starting:
            if self._live is None or self._live.died is not None:
                if self._live is not None:
                    await self._live.bury(WorkerDied("it ended"))  # two must not work in one folder
                try:
                    self._live = await self._start()
                except WorkerDied:  # once may be the machine's fault: no memory, an administrator
                    self._live = await self._start()
            return self._live

    async def _start(self) -> Live:
        """Raises: BrokenProgram with what the program's own code says; WorkerDied."""
        place = await self._place()
        self._output = place.output
        try:
            process = await WorkerProcess.start(
                workspace=place.workspace, output=place.output, below=self._limits.below
            )
        except OSError as error:
            raise WorkerDied(f"cannot be started ({error.strerror or type(error).__name__})") from error
        file = self._tools or self._entry
        try:
            async with asyncio.timeout(START_S):
                folder = str(place.folder)
                await process.send(Load(folder=folder, tools=self._tools, entry=self._entry, limits=self._limits))
                first = await process.receive()
            return Live(process, place.output, self._specs(first), value_bytes=self._limits.result_bytes)
        except BaseException as error:
            process.kill()
            ended = await asyncio.shield(asyncio.ensure_future(process.wait()))
            if isinstance(error, TimeoutError):
                raise BrokenProgram(file, why=f"its import takes more than {START_S:.0f} s") from error
            if isinstance(error, PipeBroken) and process.killed:
                raise WorkerDied(f"did not start: {ended}") from error
            if isinstance(error, PipeBroken):
                raise BrokenProgram(file, why=f"its import: {error} ({ended})") from error
            raise

    def _specs(self, first: FromWorker) -> tuple[ToolSpec, ...]:
        """Raises: BrokenProgram."""
        if not isinstance(first, Loaded):
            raise BrokenProgram(self._tools or self._entry, why="its process broke its protocol")
        if first.error:
            raise BrokenProgram("", why=shortened(first.error))
        return read_specs(first.tools, file=self._tools)

    def _result(self, reply: FromWorker) -> ToolResult:
        """Raises: NotJson."""
        if not isinstance(reply, CallDone):
            raise NotJson("another kind of answer")
        if reply.error:
            if reply.error not in WORKER_CODES or len(reply.message) > MESSAGE_CHARACTERS:
                raise NotJson("an error that is none")
            late = reply.error == "deadline"
            return ToolResult(error=reply.error, message=reply.message, perhaps=late, suspects=int(late))
        value = read_value(reply.value)
        return ToolResult(value=value, size_bytes=len(reply.value))
