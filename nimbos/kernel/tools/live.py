"""One process that has loaded its program: what may come out of its pipe, who waits for it, and its end.

A frame that nobody asked for, that says what it must not or is larger than a result may be, ends the process, so a
flood is its first frame. What a function may say unasked is counted: steps without an answer, and one end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from nimbos.kernel.tools.process import PipeBroken, WorkerProcess, shorten
from nimbos.kernel.tools.specs import ToolSpec
from nimbos.toolwire import (
    ROOM_BYTES,
    AskQuiet,
    Call,
    CallDone,
    FromWorker,
    Loaded,
    Quiet,
    Run,
    RunDone,
    Step,
    StepDone,
    Verify,
    VerifyDone,
    shortened,
)

GRACE_S = 0.5  # for a worker to stop an async tool by itself, and live on
STEPS_OPEN_MAX = 1024  # of a durable function, not answered yet
STEPS_OPEN_BYTES_MAX = 64 * 1024 * 1024
STEP_NAME_CHARACTERS = 200


class WorkerDied(Exception):
    """The process is gone; whatever it was doing has no outcome. The message is for people. `deadline`: it was killed
    because a tool ran over its own. `known`: whose doing it was is known, and no other call's. `suspects`: else, how
    many may have ended it: the calls under way, and its function while that runs."""

    def __init__(self, why: str, *, deadline: bool = False, known: bool = False) -> None:
        super().__init__(why)
        self.deadline = deadline
        self.known = known or deadline
        self.suspects = 0

    def told(self, why: str) -> WorkerDied:
        """The same, with more to say."""
        told = WorkerDied(why, deadline=self.deadline, known=self.known)
        told.suspects = self.suspects
        return told


class Live:
    """`died` says why it is of no use any more. `function`: what its durable function says, once one runs."""

    def __init__(self, process: WorkerProcess, output: Path, specs: tuple[ToolSpec, ...], *, value_bytes: int) -> None:
        """`output`: what it prints. `value_bytes`: that a result or a step's arguments may have as JSON."""
        self.specs = specs
        self.died: WorkerDied | None = None
        self.function: asyncio.Queue[Step | Quiet | RunDone | WorkerDied] | None = None
        self._process = process
        self._output = output
        self._value_bytes = value_bytes
        self._number = 0
        self._expected: dict[int, asyncio.Future[FromWorker]] = {}
        self._steps = 0
        self._returned = False
        self._open: dict[int, int] = {}  # sizes of steps without an answer
        self._quiet: set[int] = set()
        self._ending: asyncio.Task[None] | None = None
        self._reading = asyncio.create_task(self._read(), name=f"worker {process.pid}")

    @property
    def pid(self) -> int:
        return self._process.pid

    async def exchange(self, ask: Callable[[int], Call | Verify], deadline_s: float) -> FromWorker:
        """Cancelled, or over its deadline, the process is ended. Raises: WorkerDied."""
        if self.died is not None:
            raise self.died
        self._number += 1
        number = self._number
        waiting: asyncio.Future[FromWorker] = asyncio.get_running_loop().create_future()
        self._expected[number] = waiting
        try:
            async with asyncio.timeout(deadline_s + GRACE_S):
                await self.send(ask(number))
                return await waiting
        except TimeoutError as error:
            died = WorkerDied("a tool ran over its deadline", deadline=True)
            await self.bury(died)
            raise died from error
        except asyncio.CancelledError:
            self.end(WorkerDied("the call was given up", known=True))
            raise
        finally:
            self._expected.pop(number, None)

    async def send(self, message: Call | Verify | Run | StepDone | AskQuiet) -> None:
        """Raises: WorkerDied."""
        if self.died is not None:
            raise self.died
        if isinstance(message, StepDone):
            self._open.pop(message.number, None)
        elif isinstance(message, AskQuiet):
            self._quiet.add(message.number)
        try:
            await self._process.send(message)
        except PipeBroken as error:
            await self.bury(WorkerDied(str(error)))
            raise self.died or WorkerDied(str(error)) from error

    def end(self, died: WorkerDied) -> None:
        """At once; what waited for it is told how it ended when that is known."""
        if self.died is None:
            self.died = died
            runs = self.function is not None and not self._returned
            died.suspects = 0 if died.known else len(self._expected) + runs
            self._process.kill()
            self._ending = asyncio.create_task(self._tell(died), name=f"end of worker {self.pid}")

    async def bury(self, died: WorkerDied) -> None:
        """Ends it and waits until it is gone."""
        self.end(died)
        if self._reading is not asyncio.current_task():
            self._reading.cancel()
            await asyncio.wait({self._reading})
        assert self._ending is not None
        await asyncio.shield(self._ending)

    async def _read(self) -> None:
        """Until the process says what it must not, or is gone."""
        why = ""
        try:
            while not why:
                why = self._take(await self._process.receive(most_bytes=self._value_bytes + ROOM_BYTES))
        except PipeBroken as broken:
            why = str(broken)
        self.end(WorkerDied(why))

    def _take(self, message: FromWorker) -> str:
        """Why this frame must not be, "" where it may."""
        size = 0 if isinstance(message, Loaded | Quiet) else len(_value_of(message))
        if size > self._value_bytes:
            return f"it sent a value of {size} bytes; at most {self._value_bytes} are taken"
        if isinstance(message, CallDone | VerifyDone):
            waiting = self._expected.pop(message.number, None)
            if waiting is None:
                return "it answered what nobody asked"
            if not waiting.done():
                waiting.set_result(message)
            return ""
        if self.function is None or isinstance(message, Loaded):
            return "it sent what nobody asked for"
        why = ""
        if isinstance(message, Step):
            why = self._take_step(message)
        elif isinstance(message, Quiet):
            if message.number not in self._quiet or message.steps != self._steps:
                return "it miscounts its steps"
            self._quiet.discard(message.number)
        elif self._returned:
            why = "its function ended twice"
        else:
            self._returned = True
        if not why:
            self.function.put_nowait(message)
        return why

    def _take_step(self, step: Step) -> str:
        self._steps += 1
        self._open[step.number] = len(step.arguments)
        too_many = len(self._open) > STEPS_OPEN_MAX or sum(self._open.values()) > STEPS_OPEN_BYTES_MAX
        if step.number != self._steps or too_many:
            return "it asked for too many steps at once"
        if len(step.verb) + len(step.name) > STEP_NAME_CHARACTERS:
            return "it asked for a step whose name is too long"
        return ""

    async def _tell(self, died: WorkerDied) -> None:
        ended = await self._process.wait()
        await asyncio.to_thread(shorten, self._output)
        told = died.told(f"{died} ({ended})" if str(died) == "it ended" else str(died))
        for waiting in self._expected.values():
            if not waiting.done():
                waiting.set_exception(told)
                waiting.exception()  # nobody may be waiting any more
        if self.function is not None:
            self.function.put_nowait(told)


def _value_of(message: CallDone | VerifyDone | Step | RunDone) -> bytes:
    return message.arguments if isinstance(message, Step) else message.value


class FunctionRun:
    """A durable function that runs: what it asks for comes out of `next`."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._questions = 0

    async def next(self) -> Step | Quiet | RunDone:
        """Raises: WorkerDied."""
        assert self._live.function is not None
        message = await self._live.function.get()
        if isinstance(message, WorkerDied):
            self._live.function.put_nowait(message)  # for whoever asks again
            raise message
        return message

    async def answer(self, number: int, *, value: bytes = b"null", error: str = "", message: str = "") -> None:
        """Raises: WorkerDied."""
        await self._live.send(StepDone(number=number, value=value, error=error, message=shortened(message)))

    async def ask_quiet(self) -> int:
        """A `Quiet` of this number comes when everything that was answered before has had its effect.

        Raises: WorkerDied."""
        self._questions += 1
        await self._live.send(AskQuiet(number=self._questions))
        return self._questions
