"""What the step loop remembers of one branch beside its job: the answer, what it used, and how it was served."""

from __future__ import annotations

from dataclasses import dataclass, field

from nimbos.engine.answer import Answer
from nimbos.engine.guessing import Guesser
from nimbos.engine.protocol import Submit
from nimbos.engine.scheduler import Job
from nimbos.engine.tally import Tally
from nimbos.types import Ask, Final, FinishReason, Receipt


@dataclass(slots=True, eq=False)
class Track:
    """`known`: positions below it were computed before, by an earlier life of this branch. `begun`: tokens of output,
    and of thinking among them, that were there when the ask was made; they are not this ask's to pay."""

    job: Job
    ask: Ask
    answer: Answer
    tally: Tally
    submit: Submit
    known: int
    begun: tuple[int, int] = (0, 0)
    output_tokens: int = 0
    thinking_tokens: int = 0
    computed_again: int = 0
    admitted_ms: float | None = None
    compute_ms: float = 0.0
    steps: int = 0
    rows: int = 0
    preemptions: int = 0
    pinned: bool = False
    guesser: Guesser = field(default_factory=Guesser)

    @property
    def submitted_tokens(self) -> int:
        return self.tally.prompt_tokens + len(self.ask.emitted.get(self.job.branch, ()))

    def resumed(self) -> None:
        """The answer has taken what was emitted before: it is known, and counted already."""
        self.output_tokens, self.thinking_tokens = self._own()

    def admitted(self, matched: int, now_ms: float) -> int | None:
        """Returns: prompt tokens found in memory, for the server to keep, at the very first admission; else None."""
        first = self.admitted_ms is None and self.job.branch not in self.submit.cached
        if self.admitted_ms is None:
            self.admitted_ms = now_ms
        self.tally.found(matched)
        return self.tally.cached if first else None

    def computed(self, count: int, milliseconds: float) -> None:
        """The next `count` tokens of the job are in memory, for this share of a step."""
        start = self.job.computed
        self.computed_again += self.tally.computed(start, count, known=self.known, milliseconds=milliseconds)
        self.known = max(self.known, start + count)

    def answered(self) -> None:
        """Counts what the answer has taken since the last call."""
        output, thinking = self._own()
        self.tally.answered(output - self.output_tokens, thinking - self.thinking_tokens)
        self.output_tokens, self.thinking_tokens = output, thinking

    def _own(self) -> tuple[int, int]:
        output, thinking = self.begun
        return self.answer.output_tokens - output, max(0, self.answer.thinking_tokens - thinking)

    def stepped(self, milliseconds: float, rows: int) -> None:
        self.steps += 1
        self.rows += rows
        self.compute_ms += milliseconds

    def final(self, reason: FinishReason, now_ms: float) -> Final:
        started = self.admitted_ms if self.admitted_ms is not None else now_ms
        return Final(
            branch=self.job.branch,
            reason=reason,
            stopped_by=self.answer.stopped_by,
            budget_ended=self.answer.budget_ended,
            usage=self.tally.usage(
                first=self.job.branch == 0, output=self.output_tokens, thinking=self.thinking_tokens
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
