"""Embedding: inputs in, vectors out, in the same process and under the same lease as generation.

An embedding model needs a whole input in one pass and keeps nothing, so it has no context tree; asks are served in the
order of class (rising with age), account and arrival. A step takes as many inputs as nobody notices who waits for the
next one, here or in another engine on the same cores. Read `ranker.py` for the one that scores documents.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from nimbos.engine import llama
from nimbos.engine.counters import Counters
from nimbos.engine.intake import weight_of
from nimbos.engine.loop import Hold, Post
from nimbos.engine.model import Model, Rows
from nimbos.engine.protocol import Failed, Produced, Refusal, Submit
from nimbos.engine.scheduler import RANK, FairClock, Rules, rank
from nimbos.engine.tally import Tally
from nimbos.errors import AnswerFailed, EngineFailed
from nimbos.meterfile import Row
from nimbos.types import Ask, AskClass, Chunk, Final, FinishReason, Receipt, VectorChunk

FORGET = 0.3
TIDY_EVERY = 1024  # steps


@dataclass(slots=True, eq=False)
class Work:
    """An ask with its inputs. `starts[i]`: tokens of all inputs before input `i`; `done`: inputs that were told."""

    ask: Ask
    inputs: tuple[tuple[int, ...], ...]
    tally: Tally
    arrived_ms: float
    restarts: int
    starts: tuple[int, ...]
    shared: int = 0
    done: int = 0
    compute_ms: float = 0.0
    steps: int = 0
    started_ms: float | None = field(default=None)

    @property
    def account(self) -> str:
        return self.ask.account

    @property
    def ask_class(self) -> AskClass:
        return self.ask.ask_class


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, end) of one input, computed in this sequence."""

    work: Work
    index: int
    start: int
    end: int
    sequence: int

    @property
    def count(self) -> int:
        return self.end - self.start

    @property
    def whole(self) -> bool:
        return self.end == len(self.work.inputs[self.index])


class Embedder:
    """Has the same face as `Loop`: `submit`, `cancel`, `step`, `idle`, `counts`, `flush`."""

    def __init__(self, model: Model, rules: Rules, *, post: Post, hold: Hold) -> None:
        self.model, self._rules = model, rules
        self._token_ms = 0.0  # of the last steps; 0: not known yet
        self.counters = Counters()
        self.clock = FairClock()
        self.abortable = False  # by what arrives here: it would wait in the same queue
        self.interruptible = model.can_truncate
        self._used = 0  # sequences of the last step
        self._post, self._hold = post, hold
        self._waiting: list[Work] = []

    def submit(self, submit: Submit, inputs: tuple[tuple[int, ...], ...], row: Row | None = None) -> None:
        """After an engine's death all inputs are computed again, and told again."""
        ask = submit.ask
        starts = (0, *accumulate(map(len, inputs)))
        tally = Tally(starts[-1], row, paid_prompt=ask.paid_prompt_tokens)
        tally.resume(output=0, thinking=0, cached=None)
        self.clock.arrive(ask.account, {work.ask.account for work in self._waiting})
        self._waiting.append(Work(ask, inputs, tally, _now_ms(), submit.restarts, starts))

    def cancel(self, ask_id: str) -> None:
        self._waiting = [work for work in self._waiting if work.ask.id != ask_id]

    @property
    def idle(self) -> bool:
        return not self._waiting

    def step(self, look: Callable[[], None]) -> bool:
        """One batch. Returns: False when there is nothing to compute."""
        self.model.arm()
        look()
        pieces = self._choose()
        if not pieces:
            return False
        rows = [
            Rows(
                sequence=piece.sequence,
                start=piece.start,
                tokens=piece.work.inputs[piece.index][piece.start : piece.end],
                logits=piece.whole,
            )
            for piece in pieces
        ]
        urgent = min((piece.work.ask.ask_class for piece in pieces), key=RANK.__getitem__)
        with self._hold(urgent, interruptible=self.interruptible):
            started = time.perf_counter()
            result = self.model.decode(rows, every=self.model.pools)
            milliseconds = (time.perf_counter() - started) * 1e3
        if result == llama.DECODED:
            self._deliver(pieces, milliseconds)
        return True

    def _choose(self) -> list[Piece]:
        """Whole inputs, each in a sequence of its own. What the last step left goes: it would fill the cells."""
        for sequence in range(self._used):
            self.model.drop(sequence)
        pieces = self._whole_inputs()
        self._used = len(pieces)
        return pieces

    def _whole_inputs(self) -> list[Piece]:
        pieces: list[Piece] = []
        room = self._room()
        for work in self._order():
            for index in range(work.done, len(work.inputs)):
                tokens = len(work.inputs[index])
                if pieces and (tokens > room or len(pieces) >= self.model.options.sequences):
                    return pieces
                pieces.append(Piece(work, index, 0, tokens, len(pieces)))
                room -= tokens
        return pieces

    def _room(self) -> int:
        """Tokens of a step that keeps the stall target, if a single input is not longer than that. A slow model gets
        the rows without which it would be slower still."""
        fitting = int(self._rules.stall_target_ms / self._token_ms) if self._token_ms else 0
        return min(self.model.options.step_tokens, max(self._rules.quiet_rows, fitting))

    def _order(self) -> list[Work]:
        now = _now_ms()
        if not self._rules.fair:
            return sorted(self._waiting, key=lambda w: w.arrived_ms)

        def key(work: Work) -> tuple[int, float, float]:
            return rank(work, self.clock, self._rules, now), self.clock.virtual(work.account), work.arrived_ms

        return sorted(self._waiting, key=key)

    def _deliver(self, pieces: list[Piece], milliseconds: float) -> None:
        chunks: list[tuple[str, Chunk]] = []
        failed: dict[str, str] = {}
        total = sum(piece.count for piece in pieces)
        self._count_step(total, milliseconds)
        row = 0
        for piece in pieces:
            work = piece.work
            self._charge(piece, milliseconds * piece.count / max(1, total), milliseconds)
            if piece.whole:
                try:
                    chunks.append((work.ask.id, self._result(piece, row)))
                except EngineFailed as error:
                    failed[work.ask.id] = error.message
                work.done += 1
                row += 1
        for work in self._waiting:
            work.tally.write()
        for ask_id, reason in failed.items():
            self.cancel(ask_id)
            self._post(Failed(ask_id=ask_id, refusal=Refusal(message=reason, server_fault=True)))
        for work in [w for w in self._waiting if w.done == len(w.inputs)]:
            self._waiting.remove(work)
            chunks.append((work.ask.id, _final(work)))
        self._post(Produced(chunks=tuple(chunks), waiting=len(self._waiting)))

    def _result(self, piece: Piece, row: int) -> Chunk:
        """`row`: of the model's outputs. Raises: EngineFailed, which fails this ask alone."""
        vector = self.model.embedding(piece.sequence)
        norm = float(np.linalg.norm(vector))
        if not math.isfinite(norm):
            raise AnswerFailed("The model's vectors are not finite numbers.")
        vector = vector / norm if norm > 0 else vector
        return VectorChunk(index=piece.index, values=vector.astype("<f4").tobytes())

    def _count_step(self, tokens: int, milliseconds: float) -> None:
        self.counters.steps += 1
        self.counters.step_rows += tokens
        self.counters.computed_tokens += tokens
        self.counters.prompt_tokens += tokens
        self.counters.step_seconds_sum += milliseconds / 1e3
        token_ms = milliseconds / max(1, tokens)
        self._token_ms += (FORGET if self._token_ms else 1.0) * (token_ms - self._token_ms)
        if self.counters.steps % TIDY_EVERY == 0:
            self.clock.forget_idle({work.account for work in self._waiting})

    def _charge(self, piece: Piece, share_ms: float, step_ms: float) -> None:
        work = piece.work
        if work.started_ms is None:
            work.started_ms = _now_ms() - step_ms
        start = work.starts[piece.index]
        work.tally.found(start + piece.start)
        work.tally.computed(start + piece.start, piece.count, milliseconds=share_ms)
        work.compute_ms += share_ms
        work.steps += 1
        self.clock.charge(work.account, share_ms, weight=weight_of(work.ask))
        self.clock.served(work.account, work.ask_class, _now_ms())
        self.counters.charge(work.ask.account, share_ms)

    def flush(self) -> None:
        """Nothing is held back between steps."""

    def tidy(self) -> bool:
        """Nothing is kept that could be put away."""
        return False

    def counts(self) -> tuple[dict[AskClass, int], dict[AskClass, int]]:
        waiting = dict.fromkeys(AskClass, 0)
        for work in self._waiting:
            waiting[work.ask.ask_class] += 1
        return waiting, dict.fromkeys(AskClass, 0)


def _final(work: Work) -> Final:
    started = work.started_ms if work.started_ms is not None else work.arrived_ms
    return Final(
        branch=0,
        reason=FinishReason.STOP,
        usage=work.tally.usage(first=True, output=0, thinking=0),
        receipt=Receipt(
            queue_ms=max(0, int(started - work.arrived_ms)),
            compute_ms=int(work.compute_ms),
            steps=work.steps,
            restarts=work.restarts,
        ),
    )


def _now_ms() -> float:
    return time.monotonic() * 1e3
