"""Embedding: inputs in, vectors out, in the same process and under the same lease as generation.

An embedding model needs a whole input in one pass and keeps nothing, so it has no context tree; asks are served in the
order of class, account and arrival, as many inputs a step as fit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from nimbos.engine import llama
from nimbos.engine.counters import Counters
from nimbos.engine.intake import weight_of
from nimbos.engine.loop import Hold, Post
from nimbos.engine.model import Model, Rows
from nimbos.engine.protocol import Produced, Submit
from nimbos.engine.scheduler import RANK, FairClock
from nimbos.engine.tally import Tally
from nimbos.meterfile import Row
from nimbos.types import Ask, AskClass, Chunk, Final, FinishReason, Receipt, VectorChunk


@dataclass(slots=True, eq=False)
class _Work:
    ask: Ask
    inputs: tuple[tuple[int, ...], ...]
    arrived_ms: float
    tally: Tally
    restarts: int = 0
    computed: int = 0
    done: int = 0
    compute_ms: float = 0.0
    steps: int = 0
    started_ms: float = field(default=0.0)


class Embedder:
    """Has the same face as `Loop`: `submit`, `cancel`, `step`, `idle`, `counts`, `flush`."""

    def __init__(self, model: Model, *, post: Post, hold: Hold) -> None:
        self.model = model
        self.counters = Counters()
        self.clock = FairClock()
        self.abortable = False
        self._post, self._hold = post, hold
        self._waiting: list[_Work] = []

    def submit(self, submit: Submit, inputs: tuple[tuple[int, ...], ...], row: Row | None = None) -> None:
        """After an engine's death all inputs are computed again, and told again."""
        ask = submit.ask
        tally = Tally(sum(map(len, inputs)), row)
        tally.resume(output=0, thinking=0, cached=None)
        self.clock.arrive(ask.account, {work.ask.account for work in self._waiting})
        self._waiting.append(_Work(ask, inputs, time.monotonic() * 1e3, tally, submit.restarts))

    def cancel(self, ask_id: str) -> None:
        self._waiting = [work for work in self._waiting if work.ask.id != ask_id]

    @property
    def idle(self) -> bool:
        return not self._waiting

    def step(self, look: Callable[[], None]) -> bool:
        """One batch of whole inputs. Returns: False when there is nothing to compute."""
        look()
        chosen = self._choose()
        if not chosen:
            return False
        rows = [
            Rows(sequence=i, start=0, tokens=work.inputs[index], logits=True) for i, (work, index) in enumerate(chosen)
        ]
        for sequence in range(len(rows)):
            self.model.drop(sequence)
        with self._hold(min((w.ask.ask_class for w, _ in chosen), key=RANK.__getitem__)):
            started = time.perf_counter()
            result = self.model.decode(rows, every=True)
            milliseconds = (time.perf_counter() - started) * 1e3
        if result != llama.DECODED:
            return True
        self._deliver(chosen, milliseconds)
        return True

    def _choose(self) -> list[tuple[_Work, int]]:
        order = sorted(
            self._waiting, key=lambda w: (RANK[w.ask.ask_class], self.clock.virtual(w.ask.account), w.arrived_ms)
        )
        chosen: list[tuple[_Work, int]] = []
        room = self.model.options.step_tokens
        for work in order:
            for index in range(work.done, len(work.inputs)):
                tokens = len(work.inputs[index])
                if tokens > room or len(chosen) >= self.model.options.sequences:
                    return chosen
                chosen.append((work, index))
                room -= tokens
        return chosen

    def _deliver(self, chosen: list[tuple[_Work, int]], milliseconds: float) -> None:
        chunks: list[tuple[str, Chunk]] = []
        total = sum(len(work.inputs[index]) for work, index in chosen)
        self.counters.steps += 1
        self.counters.step_rows += total
        self.counters.computed_tokens += total
        self.counters.prompt_tokens += total
        self.counters.step_seconds_sum += milliseconds / 1e3
        for sequence, (work, index) in enumerate(chosen):
            vector = self.model.embedding(sequence)
            norm = float(np.linalg.norm(vector))
            vector = vector / norm if norm > 0 else vector
            chunks.append((work.ask.id, VectorChunk(index=index, values=vector.astype("<f4").tobytes())))
            work.done += 1
            share = milliseconds * len(work.inputs[index]) / max(1, total)
            work.tally.computed(work.computed, len(work.inputs[index]), milliseconds=share)
            work.computed += len(work.inputs[index])
            work.compute_ms += share
            work.steps += 1
            self.clock.charge(work.ask.account, share, weight=weight_of(work.ask))
            self.counters.charge(work.ask.account, share)
        for work in self._waiting:
            work.tally.write()
        for work in [w for w in self._waiting if w.done == len(w.inputs)]:
            self._waiting.remove(work)
            usage = work.tally.usage(first=True, output=0, thinking=0)
            receipt = Receipt(compute_ms=int(work.compute_ms), steps=work.steps, restarts=work.restarts)
            chunks.append((work.ask.id, Final(branch=0, reason=FinishReason.STOP, usage=usage, receipt=receipt)))
        self._post(Produced(chunks=tuple(chunks), waiting=len(self._waiting)))

    def flush(self) -> None:
        """Nothing is held back between steps."""

    def counts(self) -> tuple[dict[AskClass, int], dict[AskClass, int]]:
        waiting = dict.fromkeys(AskClass, 0)
        for work in self._waiting:
            waiting[work.ask.ask_class] += 1
        return waiting, dict.fromkeys(AskClass, 0)
