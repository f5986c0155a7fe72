"""What the step loop remembers of one branch beside its job: the answer, and how it was served."""

from __future__ import annotations

from dataclasses import dataclass

from nimbos.engine.answer import Answer
from nimbos.engine.protocol import Submit
from nimbos.engine.scheduler import Job
from nimbos.types import Ask, Final, FinishReason, Receipt, Usage


@dataclass(slots=True, eq=False)
class Track:
    """`prompt_tokens`: of the ask's prompt, without what was emitted before. `computed_again`: tokens that an earlier
    life of this ask had computed already, after an engine's death."""

    job: Job
    ask: Ask
    answer: Answer
    prompt_tokens: int
    submit: Submit
    cached_tokens: int | None = None
    computed_again: int = 0
    admitted_ms: float | None = None
    compute_ms: float = 0.0
    steps: int = 0
    rows: int = 0
    preemptions: int = 0

    @property
    def submitted_tokens(self) -> int:
        return self.prompt_tokens + len(self.ask.emitted.get(self.job.branch, ()))

    def admitted(self, matched: int, now_ms: float) -> int | None:
        """Notes the prompt tokens found in memory at the first admission.

        Returns: them, for the server to keep, or None when they were known already (a preempted or restarted ask).
        """
        restarted = self.job.branch in self.submit.cached  # it had begun before the engine died
        if self.admitted_ms is not None or restarted:
            self.computed_again += len(self.job.tokens) - matched if self.admitted_ms is None else 0
        if self.admitted_ms is None:
            self.admitted_ms = now_ms
        if self.cached_tokens is not None:
            return None
        known = self.submit.cached.get(self.job.branch)
        self.cached_tokens = min(matched, self.prompt_tokens) if known is None else known
        return self.cached_tokens if known is None else None

    def stepped(self, milliseconds: float, rows: int) -> None:
        self.steps += 1
        self.rows += rows
        self.compute_ms += milliseconds

    def final(self, reason: FinishReason, now_ms: float) -> Final:
        first = self.job.branch == 0
        cached = self.cached_tokens or 0
        started = self.admitted_ms if self.admitted_ms is not None else now_ms
        return Final(
            branch=self.job.branch,
            reason=reason,
            stopped_by=self.answer.stopped_by,
            usage=Usage(
                input=self.prompt_tokens if first else 0,
                cached=cached if first else 0,
                output=self.answer.output_tokens,
                thinking=self.answer.thinking_tokens,
                recomputed=self.computed_again,
            ),
            receipt=Receipt(
                queue_ms=int(started - self.job.arrived_ms),
                compute_ms=int(self.compute_ms),
                steps=self.steps,
                mean_batch=round(self.rows / self.steps, 2) if self.steps else 0.0,
                preemptions=self.preemptions,
                restarts=self.submit.restarts,
            ),
        )
