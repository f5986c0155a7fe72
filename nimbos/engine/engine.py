"""The server's side of one engine process: start it, watch it, start it again, and be its `TokenSource`.

The server remembers, for every ask in flight, what was emitted. When the process dies (a crash in C, the out-of-memory
killer), a new one gets each ask with its emitted tokens, and the streams go on; nothing is lost or repeated, because
only what the server received was ever given on. Read `worker.py` for the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec
import structlog

from nimbos.config import Settings
from nimbos.engine import protocol
from nimbos.engine.handshake import first_word
from nimbos.engine.library import candidates, quiet_environment
from nimbos.engine.memo import FileMark, StepTimes, file_marks, head_hash
from nimbos.errors import EngineFailed, ModelUnusable, NimbosError, Overloaded
from nimbos.meterfile import MeterFile
from nimbos.types import Ask, Chunk, Final, Kind, ModelCard, Prepared, TokenChunk, Tokens

log = structlog.get_logger("nimbos.engine")

KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "TZ")
RESTART_WINDOW_S = 60.0
PREPARE_DEATHS = 2  # of the engine while it prepared one and the same prompt
STATS_TIMEOUT_S = 30.0
SOCKET_BYTES = 4 * 1024 * 1024


@dataclass(slots=True, eq=False)
class _Active:
    """An ask in flight. `strikes`: engine deaths since it last made progress."""

    ask: Ask
    chunks: asyncio.Queue[Chunk | NimbosError]
    emitted: dict[int, list[int]] = field(default_factory=dict)
    finished: list[int] = field(default_factory=list)
    cached: dict[int, int] = field(default_factory=dict)
    admitted: bool = False
    restarts: int = 0
    strikes: int = 0
    failed: bool = False


_MakeRequest = Callable[[int], "protocol.Prepare | protocol.StatsRequest"]


class Engine:
    """One model in one process. `active`: asks in flight. Use from one event loop."""

    def __init__(
        self,
        *,
        model_path: Path,
        model_id: str,
        settings: Settings,
        model_hash: str = "",
        meters: MeterFile | None = None,
    ) -> None:
        """`meters`: where asks that have a `meter_row` are counted."""
        self.model_path = model_path
        self.model_id = model_id
        self.restarts = 0
        self.ready: protocol.Ready | None = None
        self._settings = settings
        self._hash = model_hash
        self._meters = meters
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._up = asyncio.Event()
        self._broken: NimbosError | None = None
        self._closing = False
        self._number = 0
        self._replies: dict[int, asyncio.Future[protocol.FromEngine]] = {}
        self._unanswered: dict[int, protocol.Prepare] = {}
        self._asks: dict[str, _Active] = {}
        self._deaths: deque[float] = deque(maxlen=64)
        self._finishes: deque[float] = deque(maxlen=64)
        self._times: StepTimes | None = None
        self._skip = 0
        self._prepare_deaths: dict[int, int] = {}
        self._died_with: int | None = None
        self._loaded_from: tuple[FileMark, ...] = ()

    @property
    def active(self) -> int:
        return len(self._asks)

    @property
    def answering(self) -> bool:
        """False while it loads, also after a death."""
        return self._up.is_set()

    @property
    def given_up(self) -> bool:
        """It is not restarted any more; a new one may be."""
        return self._broken is not None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    # --- starting and ending

    async def start(self) -> ModelCard:
        """Starts the process and waits until the model answers.

        Raises: ModelUnusable with libllama's reason; EngineFailed when the process dies while loading.
        """
        if not self._hash:
            self._hash = await asyncio.to_thread(head_hash, self.model_path)
        self._times = self._times or StepTimes(self._settings, self._hash)
        self._closing, self._broken = False, None
        self._loaded_from = await asyncio.to_thread(file_marks, self.model_path)
        await self._spawn_some_library()
        assert self.ready is not None
        return self.ready.card

    async def _spawn_some_library(self) -> None:
        """A library can crash on the first decode (a build for a feature that this machine only claims to have); then
        the next candidate is tried."""
        left = len(await asyncio.to_thread(candidates, self._settings))
        while True:
            try:
                return await self._spawn()
            except EngineFailed as error:
                if self._died_with is None or self._died_with >= 0 or self._skip + 1 >= left:
                    raise
                self._skip += 1
                log.warning("library crashed", model=self.model_id, skipped=self._skip, error=error.message)

    async def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        environment = {k: v for k in KEPT_ENVIRONMENT if (v := os.environ.get(k)) is not None}
        quiet_environment(environment)
        self._settings.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        meter = self._meters.descriptor() if self._meters is not None else None
        with theirs, _closing(meter), _error_log(self._settings.run_dir, self.model_id) as errors:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "nimbos.engine.worker",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno(), *([] if meter is None else [meter])],
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for the server, which ends this process when it is done
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        assert self._times is not None
        self._send(
            protocol.Start(
                model_path=str(self.model_path),
                model_id=self.model_id,
                model_hash=self._hash,
                skip_libraries=self._skip,
                settings=self._settings,
                lease_path=str(self._settings.run_dir / "lease"),
                table=self._times.load(),
                meter_descriptor=meter,
            )
        )
        try:
            self.ready = await self._handshake(reader)
        except BaseException:
            await self._end_process()
            raise
        log.info("engine ready", model=self.model_id, pid=self.pid, library=self.ready.library, tier=self.ready.tier)
        self._reading = asyncio.create_task(self._read(reader), name=f"engine {self.model_id}")
        self._up.set()

    async def _handshake(self, reader: asyncio.StreamReader) -> protocol.Ready:
        word = asyncio.ensure_future(_frame(reader))
        assert self._process is not None
        try:
            first = await first_word(word, self._process.pid)
        except EngineFailed as error:
            raise EngineFailed(f"The model {self.model_id!r} is not there. {error.message}") from error
        if isinstance(first, protocol.Ready):
            return first
        if isinstance(first, protocol.LoadFailed) and first.unusable:
            raise ModelUnusable(str(self.model_path), reason=first.reason)
        reason = first.reason if isinstance(first, protocol.LoadFailed) else await self._epitaph()
        raise EngineFailed(f"The engine for {self.model_id!r} did not start: {reason}")

    async def _epitaph(self) -> str:
        assert self._process is not None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), 2)
        self._died_with = code = self._process.returncode
        return ending_of(code, _log_name(self.model_id))

    async def close(self) -> None:
        """Ends the process; asks in flight fail."""
        self._closing = True
        self._up.clear()
        self._broken = EngineFailed(f"The model {self.model_id!r} was unloaded.")
        self._fail_all(self._broken)
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
            self._reading = None
        await self._end_process()

    async def _end_process(self) -> None:
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
            self._writer = None
        process, self._process = self._process, None
        if process is None:
            return
        try:
            await asyncio.wait_for(process.wait(), 2)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    # --- the TokenSource

    async def describe(self) -> ModelCard:
        if self.ready is None:
            return await self.start()
        return self.ready.card

    async def prepare(self, ask: Ask) -> Prepared:
        """Raises: PromptTooLong, InvalidRequest, Overloaded when too many prompts wait to be read, EngineFailed."""
        self._refuse_beyond_bounds(ask, [message.ask.account for message in self._unanswered.values()])
        reply = await self._request(lambda number: protocol.Prepare(number=number, ask=ask))
        assert isinstance(reply, protocol.PreparedReply)
        if reply.refusal is not None:
            raise reply.refusal.error()
        parts = tuple(Tokens(ids) for ids in reply.inputs)
        return Prepared(ask=msgspec.structs.replace(ask, parts=parts), prompt_tokens=sum(map(len, reply.inputs)))

    async def generate(self, ask: Ask) -> AsyncIterator[Chunk]:
        """`ask.parts` are `Tokens`, as `prepare` gives them. Closing the iterator cancels the ask.

        Raises: Overloaded, EngineFailed.
        """
        self._refuse_beyond_bounds(ask, [a.ask.account for a in self._asks.values() if not a.admitted])
        if self._broken is not None:
            raise self._broken
        active = _Active(ask, asyncio.Queue(), {b: list(ids) for b, ids in ask.emitted.items()}, list(ask.finished))
        if not self._asks:
            self._finishes.clear()  # hours without asks say nothing of the pace of those that come now
        self._asks[ask.id] = active
        branches = ask.n if ask.kind is Kind.GENERATE else 1
        told = len(ask.finished)
        try:
            if self._up.is_set():  # else the restart submits it
                self._submit(active)
            while told < branches:
                chunk = await active.chunks.get()
                if isinstance(chunk, NimbosError):
                    raise chunk
                told += isinstance(chunk, Final)
                yield chunk
        finally:
            del self._asks[ask.id]
            if len(active.finished) < branches and self._up.is_set():
                self._send(protocol.Cancel(ask_id=ask.id))
            self._finishes.append(time.monotonic())

    def extend(self, ask_id: str, *, allowance_tokens: int | None, last: bool) -> None:
        """More is paid for; kept for a restart, too."""
        active = self._asks.get(ask_id)
        if active is None:
            return
        active.ask = msgspec.structs.replace(active.ask, allowance_tokens=allowance_tokens, allowance_last=last)
        if self._up.is_set():
            self._send(protocol.Extend(ask_id=ask_id, allowance_tokens=allowance_tokens, last=last))

    async def stats(self) -> protocol.EngineStats:
        """Raises: EngineFailed when the engine does not answer."""
        if not self._up.is_set():
            raise EngineFailed(f"The engine for {self.model_id!r} is starting.")
        reply = await self._request(lambda number: protocol.StatsRequest(number=number), timeout=STATS_TIMEOUT_S)
        assert isinstance(reply, protocol.EngineStats)
        return msgspec.structs.replace(reply, restarts=self.restarts)

    def _refuse_beyond_bounds(self, ask: Ask, waiting: list[str]) -> None:
        """`waiting`: the account of each that waits. The newest caller is refused when they are too many; one account
        may be at most half of them, so that others find room."""
        bound = self._settings.engine.inbox
        own = sum(account == ask.account for account in waiting)
        if len(waiting) >= bound:
            raise Overloaded(limit="queue", value=bound, used=len(waiting), retry_after_s=self._wait_s(1))
        if own >= max(1, bound // 2):
            raise Overloaded(limit="queue of this account", value=bound // 2, used=own, retry_after_s=self._wait_s(1))

    def _wait_s(self, places: int) -> float:
        """Seconds until `places` asks will have ended, from the pace of the last ones."""
        times = self._finishes
        if len(times) < 2:
            return 5.0
        pace = (time.monotonic() - times[0]) / len(times)
        return min(600.0, max(1.0, places * pace))

    # --- talking

    def _send(self, message: protocol.ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(protocol.encode(message))

    def _submit(self, active: _Active) -> None:
        ask = msgspec.structs.replace(
            active.ask,
            emitted={branch: tuple(ids) for branch, ids in active.emitted.items()},
            finished=tuple(active.finished),
        )
        begun = {branch: len(ids) for branch, ids in active.ask.emitted.items()}
        self._send(protocol.Submit(ask=ask, begun=begun, cached=dict(active.cached), restarts=active.restarts))

    async def _request(self, make: _MakeRequest, *, timeout: float | None = None) -> protocol.FromEngine:
        if self._broken is not None:
            raise self._broken
        self._number += 1
        number = self._number
        future: asyncio.Future[protocol.FromEngine] = asyncio.get_running_loop().create_future()
        self._replies[number] = future
        message = make(number)
        if isinstance(message, protocol.Prepare):
            self._unanswered[number] = message
        try:
            if self._up.is_set():
                self._send(message)
            return await asyncio.wait_for(future, timeout)
        except TimeoutError as error:
            raise EngineFailed(f"The engine for {self.model_id!r} did not answer within {timeout:.0f} s.") from error
        finally:
            self._replies.pop(number, None)
            if self._unanswered.pop(number, None) is not None and self._up.is_set() and future.cancelled():
                self._send(protocol.Forget(number=number))
            self._prepare_deaths.pop(number, None)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            message = await _frame(reader)
            if message is None:
                break
            self._take(message)
        if not self._closing:
            self._reading = asyncio.create_task(self._restart(), name=f"restart {self.model_id}")
            self._reading.add_done_callback(self._restart_ended)

    def _restart_ended(self, task: asyncio.Task[None]) -> None:
        """A bug in restarting must not leave callers waiting."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("restart failed", model=self.model_id, error=repr(error))
            self._give_up("it could not be restarted")

    def _take(self, message: protocol.FromEngine) -> None:
        if isinstance(message, protocol.Produced):
            for ask_id, chunk in message.chunks:
                self._deliver(ask_id, chunk)
        elif isinstance(message, protocol.Admitted):
            if (active := self._asks.get(message.ask_id)) is not None:
                active.admitted = True
                active.cached.setdefault(message.branch, message.cached)
        elif isinstance(message, protocol.Failed):
            if (active := self._asks.get(message.ask_id)) is not None:
                active.chunks.put_nowait(message.refusal.error())
        elif isinstance(message, protocol.PreparedReply | protocol.EngineStats):
            future = self._replies.get(message.number)
            if future is not None and not future.done():
                future.set_result(message)
        elif isinstance(message, protocol.Learned) and self._times is not None:
            self._times.save(message.table)

    def _deliver(self, ask_id: str, chunk: Chunk) -> None:
        active = self._asks.get(ask_id)
        if active is None:  # cancelled meanwhile
            return
        active.admitted = True
        active.strikes = 0
        if isinstance(chunk, TokenChunk):
            active.emitted.setdefault(chunk.branch, []).extend(chunk.ids)
        elif isinstance(chunk, Final):
            if chunk.branch in active.finished:
                return
            active.finished.append(chunk.branch)
        active.chunks.put_nowait(chunk)

    # --- restarting

    async def _restart(self) -> None:
        """The process is gone: start another and give it every ask with what it had emitted."""
        self._up.clear()
        await self._end_process()
        log.warning("engine died", model=self.model_id, asks=len(self._asks), restarts=self.restarts)
        failed_starts = 0
        while not self._closing:
            now = time.monotonic()
            self._deaths.append(now)
            recent = sum(now - death < RESTART_WINDOW_S for death in self._deaths)
            fruitless = recent if not self._asks else min(a.strikes for a in self._asks.values())
            if max(fruitless, failed_starts) >= self._settings.engine.restart_limit:
                self._give_up(f"its process died {recent} times within {RESTART_WINDOW_S:.0f} s")
                return
            for active in self._asks.values():
                active.restarts += 1
                active.strikes += not self._unanswered  # else a prompt in preparation is as likely the cause
            for number in self._unanswered:
                self._prepare_deaths[number] = self._prepare_deaths.get(number, 0) + 1
            self._fail_poison()
            if await asyncio.to_thread(file_marks, self.model_path) not in (self._loaded_from, ()):
                self._give_up(f"{self.model_path} is another file than the one that was loaded; ask again to load it")
                return
            self.restarts += 1
            try:
                await self._spawn()
            except ModelUnusable as error:
                self._give_up(error.message)
                return
            except (NimbosError, OSError) as error:
                log.warning("engine did not start", model=self.model_id, error=str(error))
                failed_starts += 1  # for which nobody that waits is to blame, whoever came last
                await asyncio.sleep(min(5.0, 0.1 * 2**recent))
                continue
            for message in self._unanswered.values():
                self._send(message)
            for active in self._asks.values():
                if not active.failed:
                    self._submit(active)
            return

    def _fail_poison(self) -> None:
        """An ask that was there at several deaths in a row without a token in between may be their cause."""
        limit = self._settings.engine.restart_limit
        for active in self._asks.values():
            if active.strikes >= limit:
                active.failed = True
                active.chunks.put_nowait(EngineFailed(f"The engine died {active.strikes} times over this request."))
        for number, deaths in list(self._prepare_deaths.items()):
            future = self._replies.get(number)
            if deaths >= PREPARE_DEATHS and future is not None and not future.done():
                future.set_exception(EngineFailed(f"The engine died {deaths} times over this prompt."))
                self._unanswered.pop(number, None)

    def _give_up(self, reason: str) -> None:
        error = EngineFailed(f"The engine for {self.model_id!r} is down: {reason}.")
        log.error("engine given up", model=self.model_id, reason=reason)
        self._broken = error
        self._fail_all(error)

    def _fail_all(self, error: NimbosError) -> None:
        for active in self._asks.values():
            active.chunks.put_nowait(error)
        for future in self._replies.values():
            if not future.done():
                future.set_exception(error)


def ending_of(code: int | None, log_name: str) -> str:
    """Why a process with this return code has ended, as far as that tells."""
    if code is not None and code >= 0:
        return f"its process ended with {code}; what it said last is in run/{log_name}"
    if code == -signal.SIGKILL:
        return "its process was killed, as the system does when memory runs out"
    return f"its process ended with {code}; a file that crashes libllama is not a usable model"


async def _frame(reader: asyncio.StreamReader) -> protocol.FromEngine | None:
    """The next message, or None when the process is gone."""
    try:
        size = protocol.LENGTH.unpack(await reader.readexactly(protocol.LENGTH.size))[0]
        if size > protocol.FRAME_BYTES_MAX:
            return None
        message: protocol.FromEngine = protocol.decode_from_engine(await reader.readexactly(size))
        return message
    except (asyncio.IncompleteReadError, OSError, ValueError, RecursionError, msgspec.MsgspecError):
        return None  # gone, or it says what no engine of ours would: it is ended and started again


@contextlib.contextmanager
def _closing(descriptor: int | None) -> Iterator[None]:
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _log_name(model_id: str) -> str:
    safe = "".join(c if c.isalnum() or c in "-._" else "_" for c in model_id)[:100]
    return f"engine-{safe}.log"


@contextlib.contextmanager
def _error_log(folder: Path, model_id: str) -> Iterator[IO[bytes]]:
    """Where a dying process's last words go (Python tracebacks and C messages, never prompts)."""
    descriptor = os.open(folder / _log_name(model_id), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    if os.fstat(descriptor).st_size > 1_000_000:
        os.ftruncate(descriptor, 0)
    with os.fdopen(descriptor, "ab") as file:
        yield file
