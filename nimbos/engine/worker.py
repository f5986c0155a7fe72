"""The engine process: `python -m nimbos.engine.worker FD`, where FD is its end of a socket to the server.

Threads: the main one runs the step loop; one reads frames (and stops a long step when something urgent arrives, and
the process when the server is gone); one tokenizes and compiles grammars, urgent ones first, for each account in turn.
Nothing else happens inside a step.
Read `engine.py` for the server's side, `loop.py` for the steps.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from nimbos.config import EngineSettings, Settings
from nimbos.engine import confine, protocol
from nimbos.engine.calibrate import StepTime, StepTimeTable
from nimbos.engine.embedder import Embedder
from nimbos.engine.grammar import GrammarFactory, Matcher
from nimbos.engine.lease import Lease
from nimbos.engine.library import candidates, thread_count
from nimbos.engine.llama import open_library
from nimbos.engine.loop import Loop
from nimbos.engine.model import Model, ModelOptions
from nimbos.engine.prompts import Prompts
from nimbos.engine.ranker import Ranker
from nimbos.engine.ranking import Ranking
from nimbos.engine.scheduler import RANK, Rules
from nimbos.engine.sizes import choose_cells, choose_sequences
from nimbos.engine.swapfile import SwapFile
from nimbos.engine.turns import Turns
from nimbos.errors import ModelUnusable, NimbosError
from nimbos.meterfile import Rows
from nimbos.types import AskClass, Kind, ModelCard, Tokens

EMBED_STEP_TOKENS = 2048
LEARN_EVERY_S = 30.0
TIDY_AFTER_S = 5.0  # without work


class Pipe:
    """Frames over a socket. Sending is guarded by a lock, since three threads send."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()

    def send(self, message: protocol.FromEngine) -> None:
        frame = protocol.encode(message)
        with self._lock:
            try:
                self._socket.sendall(frame)
            except OSError:
                os._exit(0)  # the server is gone; so are all asks

    def receive(self) -> protocol.ToEngine | None:
        """The next frame, or None at the end of file."""
        head = self._exactly(protocol.LENGTH.size)
        if head is None:
            return None
        body = self._exactly(protocol.LENGTH.unpack(head)[0])
        return None if body is None else protocol.decode_to_engine(body)

    def _exactly(self, size: int) -> bytes | None:
        buffer = bytearray(size)
        view = memoryview(buffer)
        at = 0
        while at < size:
            count = self._socket.recv_into(view[at:])
            if count == 0:
                return None
            at += count
        return bytes(buffer)


class Worker:
    def __init__(self, pipe: Pipe, start: protocol.Start) -> None:
        """Confines the process and loads the model. Raises: ModelUnusable, EngineFailed."""
        self._pipe = pipe
        settings = start.settings
        self._meters = Rows(start.meter_descriptor) if start.meter_descriptor is not None else None
        library, refused = open_library(candidates(settings)[start.skip_libraries :])
        threads = thread_count(settings.engine)
        lease = Lease(Path(start.lease_path)) if start.lease_path else None
        options = ModelOptions(cells=0, sequences=settings.engine.sequences, threads=threads)
        path = Path(start.model_path)
        swap = _swap_file(settings)
        tier = confine.confine([*confine.model_files(path), library.folder, *confine.code_paths()])
        model = Model(library, path, options)
        whole = model.kind is not Kind.GENERATE  # whole inputs, no answers
        cells = choose_cells(model, settings.engine)
        step = min(EMBED_STEP_TOKENS, model.context_tokens) if whole else min(settings.engine.max_step_tokens, cells)
        model.options = ModelOptions(
            cells=max(cells, step),
            threads=threads,
            step_tokens=step,
            sequences=choose_sequences(model, settings.engine.sequences),
            flash_attention=settings.engine.flash_attention,
        )
        model.open_context(lease.flag if lease and model.can_truncate else None)
        self._model, self._lease = model, lease
        own = settings.engine.context_tokens or model.context_tokens
        in_one_pass = model.kind is Kind.EMBED or not model.causal
        limit = min(own, model.context_tokens, step if in_one_pass else model.cells)
        ranking = Ranking(model, limit) if model.kind is Kind.RERANK else None
        self._prompts = Prompts(model, limit, ranking)
        self._grammars = GrammarFactory(model.vocab)
        hold = lease.hold if lease else _no_lease
        costs = _costs(start.table, model)
        rules = _rules(settings.engine, model)
        if ranking is not None:
            self._loop: Loop | Embedder = Ranker(model, ranking, rules, post=pipe.send, hold=hold)
        elif whole:
            self._loop = Embedder(model, rules, post=pipe.send, hold=hold)
        else:
            share = settings.engine.share_prefixes and model.shares_prefixes
            swap_bytes = settings.engine.swap_memory_mib * 1024 * 1024
            self._loop = Loop(
                model,
                costs,
                rules,
                post=pipe.send,
                hold=hold,
                share=share,
                context_limit=limit,
                swap_bytes=swap_bytes if share else 0,
                swap=swap if share else None,
                guess_tokens=settings.engine.guess_tokens,
            )
            self._loop.warm()
        self._costs = costs
        self._inbox: deque[_Arrival] = deque()
        self._compiling: set[str] = set()  # asks whose grammar is not taken in yet; whoever is cancelled is not here
        self._extended: dict[str, protocol.Extend] = {}  # what came for those meanwhile
        self._arrived = threading.Event()
        self._preparing: Turns[protocol.Prepare | protocol.Submit] = Turns()
        self._learned_at = time.monotonic()
        self._learned_steps = 0
        pipe.send(
            protocol.Ready(
                card=_card(start, model, limit),
                library=str(library.folder),
                variant=library.variant,
                features=library.features,
                tier=tier,
                threads=threads,
                cells=model.cells,
                limit_tokens=limit,
                refused=tuple(refused),
            )
        )

    def run(self) -> None:
        """The main thread's life. Ends with the process."""
        threading.Thread(target=self._read, daemon=True, name="reader").start()
        threading.Thread(target=self._prepare, daemon=True, name="preparer").start()
        while True:
            if not self._loop.step(self._look):
                self._learn(force=False)
                if not self._arrived.wait(timeout=TIDY_AFTER_S):
                    while not self._arrived.is_set() and self._loop.tidy():
                        pass
            elif time.monotonic() - self._learned_at > LEARN_EVERY_S:
                self._learn(force=False)

    # --- reader thread

    def _read(self) -> None:
        try:
            while (message := self._pipe.receive()) is not None:
                self._sort(message)
        finally:
            os._exit(0)  # end of file, or a frame that cannot be read: the server died, or let go of this engine

    def _sort(self, message: protocol.ToEngine) -> None:
        if isinstance(message, protocol.Prepare):
            self._queue(message, message.number)
        elif isinstance(message, protocol.Forget):
            self._preparing.drop(message.number)
        elif isinstance(message, protocol.Submit):
            if message.ask.grammar is not None:
                self._compiling.add(message.ask.id)
                self._queue(message, message.ask.id)
            else:
                self._arrive(message)
        elif isinstance(message, protocol.Cancel):
            self._preparing.drop(message.ask_id)
            self._compiling.discard(message.ask_id)  # before the main thread hears of it
            self._arrive(message)
        elif isinstance(message, protocol.Extend | protocol.StatsRequest):
            self._arrive(message)

    def _queue(self, message: protocol.Prepare | protocol.Submit, key: int | str) -> None:
        ask = message.ask
        self._preparing.put(message, key=key, account=ask.account, rank=RANK[ask.ask_class])

    def _arrive(self, message: _Arrival) -> None:
        self._inbox.append(message)
        self._arrived.set()
        submit = message.submit if isinstance(message, _Compiled) else message
        urgent = isinstance(submit, protocol.Submit) and submit.ask.ask_class is AskClass.INTERACTIVE
        if urgent and self._loop.abortable:
            self._model.abort()
        if urgent and self._lease is not None:
            self._lease.interrupt_others()

    # --- preparer thread

    def _prepare(self) -> None:
        while True:
            self._prepare_one(self._preparing.get())

    def _prepare_one(self, work: protocol.Prepare | protocol.Submit) -> None:
        try:
            if isinstance(work, protocol.Prepare):
                self._pipe.send(self._prompts.prepare(work, self._grammars))
            else:
                assert work.ask.grammar is not None
                self._arrive(_Compiled(work, self._grammars.compile(work.ask.grammar)))
        except NimbosError as error:
            self._refuse(work, protocol.refusal_of(error))
        except BaseException:  # a loop top (a panic in Rust is no Exception): fails this request, keeps the process
            traceback.print_exc()
            self._refuse(work, protocol.Refusal(message="The prompt could not be prepared.", server_fault=True))

    def _refuse(self, work: protocol.Prepare | protocol.Submit, refusal: protocol.Refusal) -> None:
        if isinstance(work, protocol.Prepare):
            self._pipe.send(protocol.PreparedReply(number=work.number, refusal=refusal))
        else:
            self._compiling.discard(work.ask.id)
            self._pipe.send(protocol.Failed(ask_id=work.ask.id, refusal=refusal))

    # --- main thread, between steps

    def _look(self) -> None:
        self._arrived.clear()
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, protocol.Submit):
                self._submit(message, None)
            elif isinstance(message, _Compiled):
                self._take_compiled(message)
            elif isinstance(message, protocol.Cancel):
                self._loop.cancel(message.ask_id)
                self._extended.pop(message.ask_id, None)
            elif isinstance(message, protocol.Extend):
                self._extend(message)
            else:
                self._pipe.send(self._stats(message.number))

    def _extend(self, message: protocol.Extend) -> None:
        if message.ask_id in self._compiling:
            self._extended[message.ask_id] = message
        elif isinstance(self._loop, Loop):
            self._loop.extend(message.ask_id, allowance_tokens=message.allowance_tokens, last=message.last)

    def _take_compiled(self, compiled: _Compiled) -> None:
        """Unless it was cancelled meanwhile. If it is right now, the cancel is behind it in the inbox."""
        ask_id = compiled.submit.ask.id
        extended = self._extended.pop(ask_id, None)
        if ask_id not in self._compiling:
            return
        self._compiling.discard(ask_id)
        self._submit(compiled.submit, compiled.matcher)
        if extended is not None:
            self._extend(extended)

    def _submit(self, submit: protocol.Submit, matcher: Matcher | None) -> None:
        ask = submit.ask
        inputs = tuple(part.ids for part in ask.parts if isinstance(part, Tokens))
        try:
            row = None
            if self._meters is not None and ask.meter_row is not None:
                row = self._meters.row(ask.meter_row, ask.id)
            if isinstance(self._loop, Embedder):
                self._loop.submit(submit, inputs, row)
            else:
                self._loop.submit(submit, tuple(token for ids in inputs for token in ids), matcher, row)
        except NimbosError as error:
            self._pipe.send(protocol.Failed(ask_id=ask.id, refusal=protocol.refusal_of(error)))

    def _stats(self, number: int) -> protocol.EngineStats:
        counters = self._loop.counters
        waiting, live = self._loop.counts()
        tree = self._loop.tree if isinstance(self._loop, Loop) else None
        return protocol.EngineStats(
            number=number,
            waiting=waiting,
            live=live,
            cells_used=tree.used_cells if tree else 0,
            cells_total=self._model.cells,
            cells_pinned=tree.pinned_cells if tree else 0,
            swapped_bytes=self._loop.residence.stored_bytes if isinstance(self._loop, Loop) else 0,
            swapped_out_tokens=self._loop.residence.written_tokens if isinstance(self._loop, Loop) else 0,
            swapped_in_tokens=self._loop.residence.restored_tokens if isinstance(self._loop, Loop) else 0,
            sequences_used=tree.branches if tree else 0,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            output_tokens=counters.output_tokens,
            recomputed_tokens=counters.recomputed_tokens,
            computed_tokens=counters.computed_tokens,
            steps=counters.steps,
            step_rows=counters.step_rows,
            step_seconds=tuple(counters.step_seconds),
            step_seconds_sum=counters.step_seconds_sum,
            overhead_seconds_sum=counters.overhead_seconds_sum,
            preemptions=counters.preemptions,
            stalls=counters.stalls,
            evictions=counters.evictions,
            guessed_tokens=counters.guessed_tokens,
            guessed_right_tokens=counters.guessed_right_tokens,
            account_ms=counters.account_ms,
            resident_bytes=_resident_bytes(),
            threads=self._loop.threads.threads if isinstance(self._loop, Loop) else self._model.options.threads,
            contended=isinstance(self._loop, Loop) and self._loop.threads.contended,
            pid=os.getpid(),
        )

    def _learn(self, *, force: bool) -> None:
        steps = self._loop.counters.steps
        if force or steps > self._learned_steps + 20:
            self._learned_steps = steps
            self._pipe.send(protocol.Learned(table=msgspec.json.encode(self._costs.table)))
        self._learned_at = time.monotonic()


@dataclass(frozen=True, slots=True)
class _Compiled:
    """An ask and its grammar, ready."""

    submit: protocol.Submit
    matcher: Matcher


_Arrival = protocol.Submit | _Compiled | protocol.Cancel | protocol.Extend | protocol.StatsRequest


def _swap_file(settings: Settings) -> SwapFile | None:
    size_bytes = settings.engine.swap_disk_mib * 1024 * 1024
    return SwapFile.make(settings.run_dir, size_bytes) if size_bytes else None


def _rules(settings: EngineSettings, model: Model) -> Rules:
    step = model.options.step_tokens
    return Rules(
        stall_target_ms=settings.stall_target_ms,
        max_rows=step,
        fair=settings.fair,
        quiet_rows=min(128, step),
        live_jobs=max(1, min(64, model.options.sequences // (2 if model.shares_prefixes else 1))),
    )


def _costs(table: bytes, model: Model) -> StepTime:
    prior = StepTime.prior(
        weight_bytes=model.weight_bytes,
        kv_bytes_per_token=model.kv_bytes_per_token,
        heads=model.attention_heads,
        threads=model.options.threads,
    )
    if table:
        with contextlib.suppress(msgspec.DecodeError):
            known = msgspec.json.decode(table, type=StepTimeTable)
            if known.usable:
                known.idle_part = known.idle_part or prior.table.idle_part
                return StepTime(known)
    return prior


def _card(start: protocol.Start, model: Model, limit: int) -> ModelCard:
    vocab = model.vocab
    control = tuple(vocab.pieces[i].decode(errors="replace") for i in sorted(vocab.control) if vocab.pieces[i])
    return ModelCard(
        id=start.model_id,
        model_hash=start.model_hash,
        architecture=model.metadata("general.architecture") or "",
        context_tokens=limit,
        n_vocab=model.n_vocab,
        kind=model.kind,
        chat_template=model.chat_template,
        bos=_text(vocab.pieces, vocab.bos),
        eos=_text(vocab.pieces, vocab.eos),
        control=control,
        user_defined=model.user_defined(),
        fim=model.fim_marks(),
        shares_prefixes=model.shares_prefixes,
        embedding_size=model.embedding_size,
        created=int(time.time()),
    )


def _text(pieces: tuple[bytes, ...], token: int | None) -> str:
    return pieces[token].decode(errors="replace") if token is not None else ""


def _resident_bytes() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


@contextlib.contextmanager
def _no_lease(_ask_class: AskClass, *, interruptible: bool) -> Iterator[None]:
    yield


def main() -> None:
    confine.die_with_parent()
    connection = socket.socket(fileno=int(sys.argv[1]))
    pipe = Pipe(connection)
    start = pipe.receive()
    if not isinstance(start, protocol.Start):
        return
    try:
        worker = Worker(pipe, start)
    except ModelUnusable as error:
        pipe.send(protocol.LoadFailed(unusable=True, reason=error.reason))
        return
    except (NimbosError, OSError) as error:
        pipe.send(protocol.LoadFailed(unusable=False, reason=str(error)))
        return
    worker.run()


if __name__ == "__main__":
    main()
