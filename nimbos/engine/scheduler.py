"""Scheduler: which tokens of which asks go into the next batch.

Pure: it reads jobs, costs and the time it is given, and returns a plan; `worker.py` performs it. Read `worker.py` next.

There is no prefill phase and no decode phase. A *job* is one branch of an ask: it has tokens, and some of them are
computed. A job that has produced a token is *running* and wants one row a step (or a few, when tokens are forced);
before that it wants its prompt, in slices. A step that holds a running interactive job is kept below the stall target:
prompt slices and rows of lower classes are left out until the predicted time fits. Three things may exceed it, or they
would never end: interactive rows themselves (which the plan says), one waiting prompt where those rows alone come near
the target, and work that has aged to their rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nimbos.types import AskClass

RANK = {AskClass.INTERACTIVE: 0, AskClass.AGENT: 1, AskClass.BATCH: 2}
WIDE_ROWS = 16  # measured: 16 rows decode 2.3 times as many tokens a second as one, 32 rows 2.8 times
FILL = 0.75  # of the stall target: steps vary, so what may be left out is added only up to here
NEAR_TARGET = 0.6  # of the stall target: above it, prompts would get next to nothing beside the running rows
STRETCH, STRETCH_MOST = 1.5, 6.0  # times what the running rows take alone: so far may a waiting prompt stretch a step
PATIENCE_MS = 4_000.0  # after which it may stretch it twice as far, then three times, up to the most
FIRST_LEVEL_MS = 500.0  # of computing; each further level is as long as all before it together
KERNEL_ROWS = 4  # x86 kernels for repacked weights work on multiples of four rows


class Costs(Protocol):
    """Predicted milliseconds of a step (`calibrate.StepTime`)."""

    def predict(self, rows: int, cells: int) -> float:
        """`rows` in the batch; `cells`: sum over the rows of the tokens that each attends to."""
        ...


class Claim(Protocol):
    """Whoever waits to be served: a job, or an ask of `embedder.py`."""

    @property
    def account(self) -> str: ...
    @property
    def ask_class(self) -> AskClass: ...
    @property
    def arrived_ms(self) -> float: ...


@dataclass(slots=True, eq=False)
class Job:
    """One branch of an ask. `tokens` are prompt and answer; the first `computed` of them are in memory.

    `sequence`: the model's id while live, else None. `leader`: a job that is computing a prefix this one shares;
    it waits until the leader has `lead_tokens` of them. `parked`: it waits until more tokens are paid for; it keeps
    what it has as long as nobody needs it. `overhang`: guessed tokens behind `computed` that are in memory until it is
    known which of them are right. `returning`: what is kept of its context outside of the cells is being put back.
    `weight`: its account's share, 1.0 is everybody's. `process`: of whose longer run it is a part, "" for none.
    """

    ask_id: str
    branch: int
    account: str
    ask_class: AskClass
    arrived_ms: float
    tokens: list[int]
    limit_tokens: int  # tokens of answer that may still come, when admitted
    computed: int = 0
    overhang: int = 0
    running: bool = False
    parked: bool = False
    returning: bool = False
    weight: float = 1.0
    process: str = ""
    sequence: int | None = None
    leader: Job | None = None
    lead_tokens: int = 0
    served_ms: float = 0.0
    number: int = 0

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Slice:
    """The next `count` tokens of `job`; with `samples`, these are its last and a token is sampled after them.
    `guess`: what may follow those, computed as well (`guessing.py`)."""

    job: Job
    count: int
    samples: bool
    guess: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return self.count + len(self.guess)


@dataclass(frozen=True, slots=True)
class Plan:
    """`predicted_ms` of the whole step; `stalled`: interactive rows alone exceed the stall target."""

    slices: tuple[Slice, ...]
    rows: int
    predicted_ms: float
    has_interactive: bool
    stalled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """`quiet_rows`: longest step while nothing interactive is there, so that an arrival interrupts little.
    `age_ms`: a job not served for so long rises by one class. `fair` off is first come, first served."""

    stall_target_ms: float = 150.0
    max_rows: int = 512
    quiet_rows: int = 128
    live_jobs: int = 64
    age_ms: float = 10_000.0
    fair: bool = True


@dataclass(slots=True)
class FairClock:
    """Virtual time of each account: milliseconds of computing it was given (VTC, Sheng et al., OSDI 2024, with
    calibrated time in place of token counts). The account with the least is served first."""

    _virtual: dict[str, float] = field(default_factory=dict)
    _served_ms: dict[tuple[str, AskClass], float] = field(default_factory=dict)
    _behind_ms: dict[str, float] = field(default_factory=dict)  # computing that each process has had, oldest use first

    def arrive(self, account: str, active: Iterable[str]) -> None:
        """An account without work comes back: idle time is no credit: it starts where the least active one is."""
        floor = min((self._virtual.get(a, 0.0) for a in active), default=None)
        if floor is None:
            floor = max(self._virtual.values(), default=0.0) if account not in self._virtual else self._virtual[account]
        self._virtual[account] = max(self._virtual.get(account, 0.0), floor)

    def charge(self, account: str, milliseconds: float, *, weight: float = 1.0, process: str = "") -> None:
        """An account of weight 2 pays half, and so gets twice as much as one of weight 1."""
        self._virtual[account] = self._virtual.get(account, 0.0) + milliseconds / weight
        if process:
            self._behind_ms[process] = self._behind_ms.pop(process, 0.0) + milliseconds

    def served(self, account: str, ask_class: AskClass, now_ms: float) -> None:
        self._served_ms[account, ask_class] = now_ms

    def unserved_since(self, job: Claim) -> float:
        """Since when the job's account has had nothing in the job's class, though the job was there."""
        return max(job.arrived_ms, self._served_ms.get((job.account, job.ask_class), 0.0))

    def virtual(self, account: str) -> float:
        return self._virtual.get(account, 0.0)

    def level(self, job: Job, rules: Rules, now_ms: float) -> int:
        """How little work its process has left, 0 least, as far as that can be told: most programs are short, so who
        has had little will most likely need little more (least attained service). It sinks while the job waits.
        Source: Autellix (Luo et al., 2025)."""
        behind_ms = self._behind_ms.get(job.process, 0.0) if job.process else 0.0
        level = 0 if behind_ms < FIRST_LEVEL_MS else 1 + int(math.log2(behind_ms / FIRST_LEVEL_MS))
        waited_ms = max(0.0, now_ms - max(job.arrived_ms, job.served_ms))
        return max(0, level - int(waited_ms / rules.age_ms))

    def forget_idle(self, active: set[str], *, keep: int = 1024) -> None:
        """Bounds the tables: idle accounts beyond `keep` are dropped, the least served first, and processes, those that
        had nothing for longest first."""
        idle = sorted((a for a in self._virtual if a not in active), key=self._virtual.__getitem__)
        for account in idle[: max(0, len(self._virtual) - keep)]:
            del self._virtual[account]
        for account, ask_class in [key for key in self._served_ms if key[0] not in self._virtual]:
            del self._served_ms[account, ask_class]
        for process in list(self._behind_ms)[: max(0, len(self._behind_ms) - keep)]:
            del self._behind_ms[process]


def rank(job: Claim, clock: FairClock, rules: Rules, now_ms: float) -> int:
    """0 is served first. What an account has in a class rises while all of it goes unserved; one job that waits behind
    its own account's others does not, or a flood would overtake by growing old."""
    if not rules.fair:
        return 0
    aged = int((now_ms - clock.unserved_since(job)) / rules.age_ms)
    return max(0, RANK[job.ask_class] - aged)


def admission_order(
    waiting: Sequence[Job], clock: FairClock, rules: Rules, now_ms: float, live: Sequence[Job] = ()
) -> list[Job]:
    """Who becomes live first: by class, then by the account that had least, then by the program with the least work
    left, then by arrival."""
    served = {job.account for job in live}
    if not rules.fair:
        return sorted(waiting, key=lambda j: j.number)

    def key(job: Job) -> tuple[int, float, bool, int, int]:
        own, level = rank(job, clock, rules, now_ms), clock.level(job, rules, now_ms)
        return own, clock.virtual(job.account), job.account in served, level, job.number

    return sorted(waiting, key=key)


def may_live(job: Job, live: Sequence[Job], costs: Costs, rules: Rules) -> bool:
    """Whether one more live job is good for those that run.

    Prompts become live no earlier than they can be computed: what became live keeps its cells, and who is next should
    be decided as late as possible.
    Up to `WIDE_ROWS` interactive rows a step gains much by each more; beyond them, one is taken in only while the step
    stays within the stall target. An account that has nothing live may always have one, so that a flood of others
    cannot hold the last place.
    """
    if len(live) >= rules.live_jobs:
        return False
    if not rules.fair or all(j.account != job.account for j in live):
        return True
    beginning = sum(j.pending for j in live if not j.running and RANK[j.ask_class] <= RANK[job.ask_class])
    if beginning >= rules.max_rows:
        return False
    if job.ask_class is not AskClass.INTERACTIVE:
        return True
    peers = [j for j in live if j.ask_class is AskClass.INTERACTIVE]
    rows = len(peers) + 1
    cells = sum(len(j.tokens) for j in peers) + len(job.tokens)
    return rows <= WIDE_ROWS or costs.predict(rows, cells) <= rules.stall_target_ms


def victim(live: Sequence[Job], job: Job) -> Job | None:
    """The live job that gives way to `job`: a parked one, else the latest of the lowest class below its own."""
    lower = [j for j in live if j.parked or RANK[j.ask_class] > RANK[job.ask_class]]
    return max(lower, key=lambda j: (j.parked, RANK[j.ask_class], j.number), default=None)


def plan(live: Sequence[Job], costs: Costs, clock: FairClock, rules: Rules, now_ms: float) -> Plan:
    """The next step. Jobs that follow a leader or are parked are left out. An empty plan means nothing can be
    computed."""
    ready = [job for job in live if job.leader is None and job.pending > 0 and not job.parked]
    inherited = _inherited_ranks(live, clock, rules, now_ms)

    def key(job: Job) -> tuple[int, bool, float, int, int]:
        own = min(rank(job, clock, rules, now_ms), inherited.get(id(job), 9))
        if not rules.fair:
            return own, not job.running, 0.0, 0, job.number
        return own, not job.running, clock.virtual(job.account), clock.level(job, rules, now_ms), job.number

    ready.sort(key=key)
    held = [job for job in ready if job.running and job.ask_class is AskClass.INTERACTIVE]
    waiting_prompt = any(key(j)[0] == 0 and not j.running and j.ask_class is AskClass.INTERACTIVE for j in ready)
    step = _Step(costs, rules)
    for job in held:
        step.add(job, job.pending)
    alone_ms = step.milliseconds
    urgent = [job for job in ready if held and not job.running and _urgent(job, key(job)[0])]
    if alone_ms > NEAR_TARGET * rules.stall_target_ms:  # else these fit below the target, like all others
        for job in urgent[:1]:  # interactive work itself: it may stretch the step, or it would never begin
            stretch = STRETCH if _holds_up(job, step, clock, rules) else _stretch(job, now_ms)
            step.add(job, max(_fitting(step, job, job.pending, stretch * alone_ms), KERNEL_ROWS))
    stalled = bool(held) and step.milliseconds > rules.stall_target_ms
    ceiling = FILL * rules.stall_target_ms if held else None
    rows_ms = 0.0  # of the running ones
    for job in ready:
        if job in held or job in step:
            continue
        if job.running:
            _add_running(step, job, ceiling, waiting_prompt, aged=key(job)[0] == 0)
            rows_ms = step.milliseconds
        elif ceiling is None and rows_ms and _holds_up(job, step, clock, rules):
            _add_prompt(step, job, STRETCH * rows_ms, _slice_limit(job, rules), least=KERNEL_ROWS)
        else:
            _add_prompt(step, job, ceiling, _slice_limit(job, rules))
    return Plan(tuple(step.slices), step.rows, step.milliseconds, bool(held) or waiting_prompt, stalled)


def _stretch(job: Job, now_ms: float) -> float:
    """A crowd's prompts would wait for minutes behind its own rows if none of those ever waited for them."""
    return min(STRETCH_MOST, STRETCH * (1 + max(0.0, now_ms - job.arrived_ms) / PATIENCE_MS))


def _holds_up(job: Job, step: _Step, clock: FairClock, rules: Rules) -> bool:
    """Whether the job's prompt would make a row wait whose account has had less: it may stretch their step only a
    little, or the few tokens of one who asks now and then would each wait for a slice of a flood's prompts."""
    had = clock.virtual(job.account)
    return rules.fair and any(
        part.job.running and part.job.account != job.account and clock.virtual(part.job.account) < had
        for part in step.slices
    )


def _inherited_ranks(live: Sequence[Job], clock: FairClock, rules: Rules, now_ms: float) -> dict[int, int]:
    """A job that others wait for is as urgent as the most urgent of them. It waits for nobody itself."""
    inherited: dict[int, int] = {}
    for job in live:
        if job.leader is not None:
            urgency = rank(job, clock, rules, now_ms)
            inherited[id(job.leader)] = min(urgency, inherited.get(id(job.leader), 9))
    return inherited


class _Step:
    """The step being put together."""

    def __init__(self, costs: Costs, rules: Rules) -> None:
        self.costs, self.rules = costs, rules
        self.slices: list[Slice] = []
        self.rows = 0
        self.cells = 0

    def __contains__(self, job: Job) -> bool:
        return any(part.job is job for part in self.slices)

    @property
    def milliseconds(self) -> float:
        return self.costs.predict(self.rows, self.cells) if self.rows else 0.0

    def with_rows(self, job: Job, count: int) -> float:
        return self.costs.predict(self.rows + count, self.cells + _attended(job, count))

    def add(self, job: Job, count: int) -> None:
        count = min(count, job.pending, self.rules.max_rows - self.rows)
        if count <= 0:
            return
        self.slices.append(Slice(job, count, count == job.pending))
        self.rows += count
        self.cells += _attended(job, count)


def _attended(job: Job, count: int) -> int:
    return count * (job.computed + count // 2)


def _add_running(step: _Step, job: Job, ceiling: float | None, waiting_prompt: bool, *, aged: bool) -> None:
    """A row of a lower class rides along where it costs the interactive ones nothing they would notice, and when all
    of its kind went without for so long that it has risen to their rank."""
    if job.ask_class is not AskClass.INTERACTIVE:
        if ceiling is not None and not aged and step.with_rows(job, job.pending) > ceiling:
            return
        if (
            ceiling is None
            and waiting_prompt
            and step.rows
            and step.with_rows(job, job.pending) > 1.02 * step.milliseconds
        ):
            return
    step.add(job, job.pending)


def _slice_limit(job: Job, rules: Rules) -> int:
    return rules.max_rows if job.ask_class is AskClass.INTERACTIVE else rules.quiet_rows


def _urgent(job: Job, rank_now: int) -> bool:
    """Interactive by itself, or because an interactive one waits for it, or by age."""
    return job.ask_class is AskClass.INTERACTIVE or rank_now == 0


def _add_prompt(step: _Step, job: Job, ceiling: float | None, limit: int, *, least: int = 0) -> None:
    """As large a slice as fits: the whole rest, or a count that makes the step a multiple of the kernels' rows. The
    step's first prompt gets `least`, whether they fit or not."""
    room = min(job.pending, limit - step.rows, step.rules.max_rows - step.rows)
    if room <= 0:
        return
    if ceiling is not None:
        first = all(part.job.running for part in step.slices)
        room = max(_fitting(step, job, room, ceiling), min(room, least) if first else 0)
    if 0 < room < job.pending:
        aligned = (step.rows + room) // KERNEL_ROWS * KERNEL_ROWS - step.rows
        room = aligned if aligned > 0 else room
    if room > 0:
        step.add(job, room)


def _fitting(step: _Step, job: Job, room: int, ceiling: float) -> int:
    """The largest count ≤ room whose step fits the ceiling, by bisection (time grows with rows)."""
    if step.with_rows(job, room) <= ceiling:
        return room
    low, high = 0, room
    while high - low > 1:
        middle = (low + high) // 2
        if step.with_rows(job, middle) <= ceiling:
            low = middle
        else:
            high = middle
    return low
