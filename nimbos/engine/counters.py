"""What the engine counts about itself, for `/metrics` and `nimbos bench`."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from nimbos.engine.protocol import STEP_BUCKETS_S
from nimbos.engine.scheduler import Plan
from nimbos.engine.track import Track
from nimbos.types import AskClass

ACCOUNTS_MAX = 1024


@dataclass(slots=True)
class Counters:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    computed_tokens: int = 0
    steps: int = 0
    step_rows: int = 0
    step_seconds: list[int] = field(default_factory=lambda: [0] * len(STEP_BUCKETS_S))
    step_seconds_sum: float = 0.0
    overhead_seconds_sum: float = 0.0
    preemptions: int = 0
    stalls: int = 0
    evictions: int = 0
    guessed_tokens: int = 0
    guessed_right_tokens: int = 0
    output_tokens: dict[AskClass, int] = field(default_factory=lambda: dict.fromkeys(AskClass, 0))
    account_ms: dict[str, float] = field(default_factory=dict)

    def admitted(self, *, prompt: int, cached: int, track: Track) -> None:
        if track.job.branch == 0 and track.preemptions == 0:
            self.prompt_tokens += prompt
            self.cached_tokens += min(cached, prompt)

    def stepped(self, plan: Plan, milliseconds: float) -> None:
        self.steps += 1
        self.step_rows += plan.rows
        self.computed_tokens += plan.rows
        self.step_seconds[bisect_left(STEP_BUCKETS_S, milliseconds / 1e3)] += 1
        self.step_seconds_sum += milliseconds / 1e3
        self.stalls += plan.stalled

    def charge(self, account: str, milliseconds: float) -> None:
        if account in self.account_ms or len(self.account_ms) < ACCOUNTS_MAX:
            self.account_ms[account] = self.account_ms.get(account, 0.0) + milliseconds

    def finished(self, track: Track) -> None:
        emitted = len(track.ask.emitted.get(track.job.branch, ()))
        self.output_tokens[track.job.ask_class] += track.answer.output_tokens - emitted
        self.recomputed_tokens += track.computed_again
