"""The process that runs a program's Python, below its keeper (`nimbos/keeper.py`), with two descriptors: SOCKET LIFE.

The main thread runs the event loop: async tools and the durable function. Tools that are plain functions have threads.
One more thread reads frames. Nothing that a tool prints, raises or returns reaches the socket but as the `value` or
`message` of a frame. Read `kernel/tools/worker.py` for the server's side, which trusts nothing of this one.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from nimbos.adk import confinement, steps
from nimbos.adk.loading import CannotLoad, Loadable, load, told
from nimbos.adk.schema import BadTool
from nimbos.adk.tools import Happened
from nimbos.adk.values import Written, write
from nimbos.toolwire import (
    CALLS_MAX,
    LENGTH,
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
    ToWorker,
    Verify,
    VerifyDone,
    pack,
    shortened,
    to_worker,
)

_STACK_BYTES = 4 * 1024 * 1024  # of a thread: the usual 8 for each call would be a quarter of a worker's memory
_QUIET_TURNS = 64  # of the loop: what one answered step sets off is asked for within them


class Pipe:
    """Frames to and from the server. A server that is gone ends this process."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rb")

    def send(self, message: FromWorker) -> None:
        try:
            self._connection.sendall(pack(message))
        except OSError:
            confinement.end()

    def receive(self) -> ToWorker:
        head = self._stream.read(LENGTH.size)
        if len(head) < LENGTH.size:
            confinement.end()
        return to_worker(self._stream.read(LENGTH.unpack(head)[0]))


class _Raised(NamedTuple):
    error: BaseException


class Worker:
    """`serve` runs until the process is killed: that is how its life always ends."""

    def __init__(self, pipe: Pipe, wanted: Load, program: Loadable) -> None:
        self._pipe = pipe
        self._folder = Path(wanted.folder)
        self._result_bytes = wanted.limits.result_bytes
        self._program = program
        self._threads = _pool()
        self._tasks: set[asyncio.Task[None]] = set()
        self._steps: dict[int, asyncio.Future[StepDone]] = {}
        self._asked = 0

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        reading = threading.Thread(target=self._read, args=(loop,), name="pipe", daemon=True)
        reading.start()
        await asyncio.Event().wait()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            loop.call_soon_threadsafe(self._take, self._pipe.receive())

    def _take(self, message: ToWorker) -> None:
        if isinstance(message, Call):
            self._start(self._call(message))
        elif isinstance(message, Verify):
            self._start(self._verify(message))
        elif isinstance(message, Run):
            self._start(self._run(message))
        elif isinstance(message, StepDone):
            waiting = self._steps.pop(message.number, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        elif isinstance(message, AskQuiet):
            self._quiet(message, _QUIET_TURNS)

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _quiet(self, message: AskQuiet, turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._quiet, message, turns - 1)
        else:
            self._pipe.send(Quiet(number=message.number, steps=self._asked))

    # --- tools

    async def _call(self, call: Call) -> None:
        written = await self._called(call)
        value, error, message = written
        self._pipe.send(CallDone(number=call.number, value=value, error=error, message=shortened(message)))

    async def _called(self, call: Call) -> Written:
        tool = self._program.tools.get(call.tool)
        if tool is None:
            return Written(b"null", "unknown_tool", f"There is no tool {call.tool[:100]!r}.")
        try:
            arguments = tool.signature.arguments(call.arguments)
        except msgspec.DecodeError as error:
            return Written(b"null", "bad_arguments", str(error))
        if tool.keyed:
            arguments["key"] = call.key
        written: Written = await self._perform(
            tool.function, arguments, call.deadline_ms, partial(write, limit=self._result_bytes)
        )
        return written

    async def _verify(self, asked: Verify) -> None:
        tool = self._program.tools.get(asked.tool)
        told = partial(_verified, asked.number, result_bytes=self._result_bytes)
        done = told(Written(b"null", "unknown_tool", "There is no tool of that name that can be verified."))
        if tool is not None and tool.verify is not None:
            try:
                arguments = tool.signature.arguments(asked.arguments)
            except msgspec.DecodeError as error:
                done = told(Written(b"null", "bad_arguments", str(error)))
            else:
                found = await self._perform(tool.verify, {**arguments, "key": asked.key}, asked.deadline_ms, told)
                done = told(found) if isinstance(found, Written) else found
        self._pipe.send(done)

    async def _perform(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        deadline_ms: int,
        tell: Callable[[Any], Any],
    ) -> Any:
        """What `tell` makes of what it returns, whose own code may be asked for that and go wrong as well; `Written`
        where it did. A plain function cannot be stopped from here; the server kills the process at its deadline."""
        plain = not inspect.iscoroutinefunction(function)
        scope = asyncio.timeout(None if plain else deadline_ms / 1000)
        try:
            async with scope:
                if not plain:
                    return tell(await function(**arguments))
                value = await self._in_thread(function, arguments)
                if isinstance(value, _Raised):
                    raise value.error
                return tell(await value if inspect.isawaitable(value) else value)
        except BaseException as error:  # a loop top: whatever a tool raises, also SystemExit, is its result
            if scope.expired():
                return Written(b"null", "deadline", f"It took longer than {deadline_ms / 1000:g} s.")
            return Written(b"null", "raised", told(error, self._folder))

    def _in_thread(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> asyncio.Future[Any]:
        """Raises: RuntimeError, MemoryError: there is no thread for it, and none will run it."""
        taken = threading.Lock()
        try:
            return asyncio.get_running_loop().run_in_executor(self._threads, _plainly, function, arguments, taken)
        except (RuntimeError, MemoryError):  # it is queued all the same, for the threads that there are
            if not taken.acquire(blocking=False):
                confinement.end()  # one of them runs it, and nobody would hear of it
            self._threads = _pool()  # the old one counts a thread too many as idle; its threads end with their calls
            raise

    # --- the durable function

    async def _run(self, message: Run) -> None:
        try:
            function, input = self._program.function_for(msgspec.json.decode(message.input))
            value = await steps.run(function, input, self)
            written = write(value, limit=self._result_bytes)
        except BaseException as error:  # a loop top: whatever the function raises ends its process, not this one
            written = Written(b"null", "raised", told(error, self._folder))
        value, code, text = written
        self._pipe.send(RunDone(value=value, error=code, message=shortened(text)))

    async def step(self, verb: str, name: str, arguments: Mapping[str, Any]) -> bytes:
        """Raises: steps.StepFailed."""
        written = write(arguments, limit=self._result_bytes)
        if written.error:
            raise steps.StepFailed(written.error, f"The arguments of the step {name}: {written.message}")
        self._asked += 1
        number = self._asked
        waiting: asyncio.Future[StepDone] = asyncio.get_running_loop().create_future()
        self._steps[number] = waiting
        self._pipe.send(Step(number=number, verb=verb, name=shortened(name, 100), arguments=written.value))
        done = await waiting
        if done.error:
            raise steps.StepFailed(done.error, done.message)
        return done.value


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CALLS_MAX, thread_name_prefix="tool")


def _plainly(function: Callable[..., Any], arguments: Mapping[str, Any], taken: threading.Lock) -> Any:
    """In a thread: an exception as a value, as a future cannot carry each of them. What was `taken` is not run."""
    if not taken.acquire(blocking=False):
        return None
    try:
        return function(**arguments)
    except BaseException as error:  # whatever a tool raises is its result
        return _Raised(error)


def _verified(number: int, outcome: Any, result_bytes: int) -> VerifyDone:
    if isinstance(outcome, Written):
        return VerifyDone(number=number, happened=None, message=shortened(outcome.message or outcome.error))
    if isinstance(outcome, bool) or outcome is None:
        return VerifyDone(number=number, happened=outcome, message="" if outcome is not None else "It cannot be told.")
    if not isinstance(outcome, Happened):
        text = f"`verify` returned {type(outcome).__name__}; it must return True, False, None or Happened(result)."
        return VerifyDone(number=number, happened=None, message=shortened(text))
    written = write(outcome.result, limit=result_bytes)
    return VerifyDone(number=number, happened=True, value=written.value, message=shortened(written.message))


def main() -> None:
    gc.freeze()
    gc.enable()  # the keeper has begun without
    pipe = Pipe(socket.socket(fileno=int(sys.argv[1])))
    confinement.end_with_server(int(sys.argv[2]))
    wanted = pipe.receive()
    if not isinstance(wanted, Load):
        return
    limited = confinement.limit(wanted.limits)
    threading.stack_size(_STACK_BYTES)  # before the program is loaded, which may want another
    try:
        program = load(wanted)
        pipe.send(Loaded(tools=program.wires(), limited=limited))
    except (CannotLoad, BadTool) as error:
        pipe.send(Loaded(error=shortened(str(error)), limited=limited))
        return
    asyncio.run(Worker(pipe, wanted, program).serve())


if __name__ == "__main__":
    main()
