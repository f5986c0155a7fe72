"""The worker of one running program, as the server sees it: started when it is first needed, killed at a deadline, when
its pipe says what it must not, and when the program parks. The next call starts another.

Nothing that a worker does is trusted or is an exception of a caller's: a call has a `ToolResult`. A worker that sends a
frame that nobody asked for is ended, so a flood is its first frame.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nimbos.errors import BrokenProgram
from nimbos.kernel.segments import canonical
from nimbos.kernel.tools.process import PipeBroken, WorkerProcess, shorten
from nimbos.kernel.tools.results import WORKER_CODES, NotJson, ToolResult, Verified, read_value
from nimbos.kernel.tools.specs import ToolSpec, read_specs
from nimbos.toolwire import (
    MESSAGE_CHARACTERS,
    AskQuiet,
    Call,
    CallDone,
    FromWorker,
    Load,
    Loaded,
    Quiet,
    Run,
    RunDone,
    Step,
    StepDone,
    Verify,
    VerifyDone,
    WorkerLimits,
    shortened,
)

START_S = 30.0  # imports of a program may be slow
GRACE_S = 0.5  # for a worker to stop an async tool by itself, and live on
STEPS_OPEN_MAX = 1024  # of a durable function, not answered yet
STEPS_OPEN_BYTES_MAX = 64 * 1024 * 1024
STEP_NAME_CHARACTERS = 200


class WorkerDied(Exception):
    """The process is gone; whatever it was doing has no outcome. The message is for people."""

    def __init__(self, why: str, *, deadline: bool = False) -> None:
        super().__init__(why)
        self.deadline = deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a worker finds its program and works. `output`: a file for what it prints."""

    folder: Path
    workspace: Path
    output: Path


@dataclass(slots=True, eq=False)
class _Live:
    """A process that has loaded its program. `expected`: what it may answer. `steps`: from its durable function."""

    process: WorkerProcess
    output: Path
    specs: tuple[ToolSpec, ...]
    expected: dict[int, asyncio.Future[FromWorker]] = field(default_factory=dict)
    steps: asyncio.Queue[Step | Quiet | RunDone | WorkerDied] | None = None
    asked: int = 0
    open: dict[int, int] = field(default_factory=dict)  # sizes of steps without an answer
    quiet: set[int] = field(default_factory=set)
    reading: asyncio.Task[None] | None = None
    died: WorkerDied | None = None


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
        self._live: _Live | None = None
        self._number = 0
        self._endings: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._live.process.pid if self._live is not None else None

    async def describe(self) -> tuple[ToolSpec, ...]:
        """Raises: BrokenProgram for Python that cannot be used, StorageUnavailable."""
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

        try:
            reply = await self._exchange(live, ask, deadline_s)
            if isinstance(reply, CallDone):
                return self._result(reply)
            raise NotJson("another kind of answer")
        except WorkerDied as died:
            if died.deadline:
                return ToolResult(error="deadline", message=f"It took longer than {deadline_s:g} s.", perhaps=True)
            return ToolResult(error="died", message=f"The tool's process is gone: {died}.", perhaps=True)
        except NotJson as error:
            await self._bury(live, f"it sent a result that cannot be read ({error})")
            return ToolResult(error="died", message="The tool's process broke its protocol.", perhaps=True)

    async def verify(self, tool: str, arguments: Any, *, key: str, deadline_s: float) -> Verified:
        """Whether the call with this key happened. Raises: StorageUnavailable."""
        content = canonical(arguments)

        def ask(number: int) -> Verify:
            deadline_ms = round(deadline_s * 1000)
            return Verify(number=number, tool=tool, arguments=content, key=key, deadline_ms=deadline_ms)

        try:
            live = await self._running()
            reply = await self._exchange(live, ask, deadline_s)
            if not isinstance(reply, VerifyDone):
                raise NotJson("another kind of answer")
            result = read_value(reply.value, limit=self._limits.result_bytes)
        except BrokenProgram as error:
            return Verified(happened=None, message=error.message)
        except WorkerDied as died:
            return Verified(happened=None, message=f"The process that was asked is gone: {died}.")
        except NotJson as error:
            await self._bury(live, f"it sent a result that cannot be read ({error})")
            return Verified(happened=None, message="The process that was asked broke its protocol.")
        return Verified(happened=reply.happened, result=result, message=shortened(reply.message))

    async def run_function(self, input: Any) -> FunctionRun:
        """Starts the durable function in a process that runs no other: an earlier one is ended.

        Raises: BrokenProgram, WorkerDied, StorageUnavailable.
        """
        if self._live is not None and self._live.steps is not None:
            await self._bury(self._live, "its function begins anew")
        live = await self._running()
        live.steps = asyncio.Queue()
        await self._send(live, Run(input=canonical(input)))
        return FunctionRun(self, live)

    async def close(self) -> None:
        """Ends the process; calls in flight have died. Cancelled, it still waits until the process is gone."""
        closing = asyncio.create_task(self._close())
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await asyncio.wait({closing})
            raise

    async def _close(self) -> None:
        if self._live is not None:
            await self._bury(self._live, "its program was parked or ended")
        for ending in list(self._endings):
            await asyncio.shield(ending)

    # --- one process

    async def _running(self) -> _Live:
        async with self._starting:
            if self._live is None:
                self._live = await self._start()
            return self._live

    async def _start(self) -> _Live:
        """Raises: BrokenProgram with what the program's own code says; WorkerDied."""
        place = await self._place()
        try:
            process = await WorkerProcess.start(workspace=place.workspace, output=place.output)
        except OSError as error:
            raise WorkerDied(f"cannot be started ({error.strerror or type(error).__name__})") from error
        try:
            async with asyncio.timeout(START_S):
                folder = str(place.folder)
                await process.send(Load(folder=folder, tools=self._tools, entry=self._entry, limits=self._limits))
                first = await process.receive()
            live = _Live(process=process, output=place.output, specs=self._specs(first))
        except TimeoutError as error:
            await _gone(process)
            raise BrokenProgram(
                self._tools or self._entry, why=f"its import takes more than {START_S:.0f} s"
            ) from error
        except PipeBroken as error:
            process.kill()
            raise BrokenProgram(self._tools or self._entry, why=f"its import: {await process.wait()}") from error
        except BaseException:
            await _gone(process)
            raise
        live.reading = asyncio.create_task(self._read(live), name=f"worker {process.pid}")
        return live

    def _specs(self, first: FromWorker) -> tuple[ToolSpec, ...]:
        if not isinstance(first, Loaded):
            raise BrokenProgram(self._tools or self._entry, why="its process broke its protocol")
        if first.error:
            raise BrokenProgram("", why=shortened(first.error))
        return read_specs(first.tools, file=self._tools)

    async def _read(self, live: _Live) -> None:
        """Until the process says what it must not, or is gone."""
        try:
            while True:
                why = self._take(live, await live.process.receive())
                if why:
                    break
        except PipeBroken as broken:
            why = str(broken)
        self._end(live, WorkerDied(why))

    def _take(self, live: _Live, message: FromWorker) -> str:
        """Why this frame must not be, "" where it may."""
        if isinstance(message, CallDone | VerifyDone):
            waiting = live.expected.pop(message.number, None)
            if waiting is None:
                return "it answered what nobody asked"
            if not waiting.done():
                waiting.set_result(message)
            return ""
        if live.steps is None or isinstance(message, Loaded):
            return "it sent what nobody asked for"
        if isinstance(message, Step):
            live.asked += 1
            live.open[message.number] = len(message.arguments)
            too_many = len(live.open) > STEPS_OPEN_MAX or sum(live.open.values()) > STEPS_OPEN_BYTES_MAX
            if message.number != live.asked or too_many:
                return "it asked for too many steps at once"
            if len(message.verb) + len(message.name) > STEP_NAME_CHARACTERS:
                return "it asked for a step without a name"
        elif isinstance(message, Quiet):
            if message.number not in live.quiet or message.steps != live.asked:
                return "it miscounts its steps"
            live.quiet.discard(message.number)
        live.steps.put_nowait(message)
        return ""

    async def _exchange(self, live: _Live, ask: Callable[[int], Call | Verify], deadline_s: float) -> FromWorker:
        """Raises: WorkerDied."""
        self._number += 1
        number = self._number
        waiting: asyncio.Future[FromWorker] = asyncio.get_running_loop().create_future()
        if live.died is not None:
            raise live.died
        live.expected[number] = waiting
        try:
            async with asyncio.timeout(deadline_s + GRACE_S):
                await self._send(live, ask(number))
                return await waiting
        except TimeoutError as error:
            await self._bury(live, "a tool ran over its deadline", deadline=True)
            raise WorkerDied("it ran over its deadline", deadline=True) from error
        except asyncio.CancelledError:
            self._end(live, WorkerDied("the call was given up"))
            raise
        finally:
            live.expected.pop(number, None)

    async def _send(self, live: _Live, message: Call | Verify | Run | StepDone | AskQuiet) -> None:
        """Raises: WorkerDied."""
        if live.died is not None:
            raise live.died
        try:
            await live.process.send(message)
        except PipeBroken as error:
            await self._bury(live, str(error))
            raise WorkerDied(str(error)) from error

    def _end(self, live: _Live, died: WorkerDied) -> None:
        """At once; what waited for it is told how it ended when that is known."""
        if live.died is not None:
            return
        live.died = died
        if self._live is live:
            self._live = None
        live.process.kill()
        ending = asyncio.create_task(self._tell(live, died), name=f"end of worker {live.process.pid}")
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    async def _tell(self, live: _Live, died: WorkerDied) -> None:
        ended = await live.process.wait()
        await asyncio.to_thread(shorten, live.output)
        told = WorkerDied(f"{died} ({ended})" if str(died) == "it ended" else str(died), deadline=died.deadline)
        for waiting in live.expected.values():
            if not waiting.done():
                waiting.set_exception(told)
                waiting.exception()  # nobody may be waiting any more
        if live.steps is not None:
            live.steps.put_nowait(told)

    async def _bury(self, live: _Live, why: str, *, deadline: bool = False) -> None:
        """Ends it and waits until it is gone."""
        self._end(live, WorkerDied(why, deadline=deadline))
        if live.reading is not None and live.reading is not asyncio.current_task():
            live.reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await live.reading
        for ending in list(self._endings):
            await asyncio.shield(ending)

    def _result(self, reply: CallDone) -> ToolResult:
        """Raises: NotJson."""
        if reply.error:
            if reply.error not in WORKER_CODES or len(reply.message) > MESSAGE_CHARACTERS:
                raise NotJson("an error that is none")
            return ToolResult(error=reply.error, message=reply.message, perhaps=reply.error == "deadline")
        value = read_value(reply.value, limit=self._limits.result_bytes)
        return ToolResult(value=value, size_bytes=len(reply.value))


class FunctionRun:
    """A durable function that runs: what it asks for comes out of `next`."""

    def __init__(self, worker: ToolWorker, live: _Live) -> None:
        self._worker = worker
        self._live = live
        self._asked_quiet = 0

    async def next(self) -> Step | Quiet | RunDone:
        """Raises: WorkerDied."""
        assert self._live.steps is not None
        message = await self._live.steps.get()
        if isinstance(message, WorkerDied):
            self._live.steps.put_nowait(message)  # for whoever asks again
            raise message
        return message

    async def answer(self, number: int, *, value: bytes = b"null", error: str = "", message: str = "") -> None:
        """Raises: WorkerDied."""
        self._live.open.pop(number, None)
        done = StepDone(number=number, value=value, error=error, message=shortened(message))
        await self._worker._send(self._live, done)

    async def ask_quiet(self) -> int:
        """A `Quiet` of this number comes when everything that was answered before has had its effect.

        Raises: WorkerDied."""
        self._asked_quiet += 1
        self._live.quiet.add(self._asked_quiet)
        await self._worker._send(self._live, AskQuiet(number=self._asked_quiet))
        return self._asked_quiet


async def _gone(process: WorkerProcess) -> None:
    process.kill()
    await process.wait()
