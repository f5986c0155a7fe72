"""The scheduler: invariants of random plans, and whole runs on a simulated machine whose clock is the cost model."""

from __future__ import annotations

import dataclasses
import heapq
import random
import statistics
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nimbos.engine.calibrate import KNOTS, StepTime
from nimbos.engine.intake import weight_of
from nimbos.engine.scheduler import (
    WIDE_ROWS,
    FairClock,
    Job,
    Plan,
    Rules,
    admission_order,
    may_live,
    plan,
    rank,
    victim,
)
from nimbos.types import Ask, AskClass

COSTS = StepTime.prior(weight_bytes=400_000_000, kv_bytes_per_token=12_288)
RULES = Rules()
NUMBERS = iter(range(10**9))


def job(
    ask_class: AskClass = AskClass.INTERACTIVE, *, prompt: int = 10, computed: int = 0, running: bool = False,
    account: str = "a", arrived: float = 0.0, served: float = 0.0, process: str = "",
) -> Job:  # fmt: skip
    return Job(
        ask_id="ask", branch=0, account=account, ask_class=ask_class, arrived_ms=arrived, tokens=[0] * prompt,
        limit_tokens=64, computed=computed, running=running, sequence=1, served_ms=served, number=next(NUMBERS),
        process=process,
    )  # fmt: skip


def running(ask_class: AskClass = AskClass.INTERACTIVE, *, context: int = 100, account: str = "a") -> Job:
    return job(ask_class, prompt=context, computed=context - 1, running=True, account=account)


def planned(jobs: Sequence[Job], *, now: float = 0.0, rules: Rules = RULES, clock: FairClock | None = None) -> Plan:
    return plan(jobs, COSTS, clock or FairClock(), rules, now)


JOBS = st.builds(
    job,
    st.sampled_from(AskClass),
    prompt=st.integers(1, 3000),
    account=st.sampled_from("abc"),
    arrived=st.floats(0, 1000),
)


@settings(max_examples=150, deadline=None)
@given(jobs=st.lists(JOBS, max_size=40), started=st.sets(st.integers(0, 39)), led=st.sets(st.integers(1, 39)))
def test_every_plan_keeps_the_promises(jobs: list[Job], started: set[int], led: set[int]) -> None:
    for i, each in enumerate(jobs):
        if i in started:
            each.running, each.computed = True, len(each.tokens) - 1
        elif i in led:
            each.leader = jobs[0]
    chosen = planned(jobs, now=1000.0)
    assert chosen.rows == sum(s.count for s in chosen.slices) <= RULES.max_rows
    assert len({id(s.job) for s in chosen.slices}) == len(chosen.slices), "a job twice in one step"
    for part in chosen.slices:
        assert part.job.leader is None
        assert 0 < part.count <= part.job.pending
        assert part.samples == (part.count == part.job.pending)
    held = [j for j in jobs if j.running and j.ask_class is AskClass.INTERACTIVE and j.leader is None]
    assert {id(j) for j in held} <= {id(s.job) for s in chosen.slices}, "an interactive row was left out"
    if held:
        own = [s for s in chosen.slices if s.job.ask_class is AskClass.INTERACTIVE]
        lower = [s for s in chosen.slices if s.job.ask_class is not AskClass.INTERACTIVE]
        urgent = {id(jobs[0])} if any(j.leader is jobs[0] for j in jobs) else set()  # inherited from who waits for it
        idle = all(id(s.job) in urgent for s in lower)
        assert chosen.predicted_ms <= RULES.stall_target_ms or idle, "lower rows in a step over the target"
        assert own
    if any(j.leader is None for j in jobs):
        assert chosen.slices, "there was work and nothing was planned"


@settings(max_examples=25, deadline=None)
@given(jobs=st.lists(JOBS, min_size=1, max_size=24), answer=st.integers(1, 20))
def test_every_job_ends_in_any_mix(jobs: list[Job], answer: int) -> None:
    """A naive bound: no run needs more steps than one that computes a kernel's rows of one job at a time."""
    left = {id(j): answer for j in jobs}
    bound = sum(j.pending // 4 + answer + 1 for j in jobs) * 2
    now, live = 0.0, list(jobs)
    clock = FairClock()
    for _ in range(bound):
        chosen = planned(live, now=now, clock=clock)
        assert chosen.slices
        now += chosen.predicted_ms
        for part in chosen.slices:
            part.job.computed += part.count
            part.job.served_ms = now
            clock.charge(part.job.account, chosen.predicted_ms * part.count / chosen.rows)
            clock.served(part.job.account, part.job.ask_class, now)
            if part.samples:
                part.job.running = True
                part.job.tokens.append(0)
                left[id(part.job)] -= 1
        live = [j for j in live if left[id(j)] > 0]
        if not live:
            return
    pytest.fail(f"{len(live)} jobs were starved")


def test_a_prompt_slice_shrinks_to_the_stall_target() -> None:
    chosen = planned([running(), job(AskClass.BATCH, prompt=2000)])
    prompt_rows = chosen.rows - 1
    assert 3 <= prompt_rows < 200
    assert chosen.predicted_ms <= RULES.stall_target_ms
    assert chosen.rows % 4 == 0, "slices fill the kernels' rows"


def test_without_interactive_rows_a_slice_is_long() -> None:
    assert planned([job(AskClass.BATCH, prompt=2000)]).rows == RULES.quiet_rows
    assert planned([job(AskClass.INTERACTIVE, prompt=2000)]).rows == RULES.max_rows


def test_interactive_rows_alone_may_exceed_the_target_and_say_so() -> None:
    rules = dataclasses.replace(RULES, stall_target_ms=50.0)
    chosen = planned([running() for _ in range(12)] + [running(AskClass.BATCH)], rules=rules)
    assert chosen.stalled
    assert chosen.rows == 12


def test_batch_rows_ride_along_while_they_fit() -> None:
    chosen = planned([running()] + [running(AskClass.BATCH) for _ in range(3)])
    assert chosen.rows == 4
    assert chosen.predicted_ms <= RULES.stall_target_ms


def test_an_interactive_prompt_goes_before_all_else() -> None:
    prompt = job(prompt=400)
    chosen = planned([job(AskClass.BATCH, prompt=900), running(AskClass.BATCH), prompt])
    assert chosen.slices[0].job is prompt
    assert chosen.slices[0].samples


@pytest.mark.parametrize(("prompt", "rides"), [(8, 0), (400, 1)])
def test_a_row_of_a_lower_class_rides_beside_a_waiting_person_only_where_it_costs_nothing(
    prompt: int, rides: int
) -> None:
    assert planned([running(AskClass.BATCH), job(prompt=prompt)]).rows == prompt + rides


def test_what_others_wait_for_is_as_urgent_as_they_are() -> None:
    leader, other = job(AskClass.BATCH, prompt=900), job(AskClass.AGENT, prompt=900)
    follower = job(AskClass.INTERACTIVE, prompt=900)
    follower.leader = leader
    chosen = planned([other, leader, follower])
    assert chosen.slices[0].job is leader


def test_what_goes_unserved_rises_a_class_with_age() -> None:
    old, clock = job(AskClass.BATCH, arrived=0.0), FairClock()
    assert [rank(old, clock, RULES, ms) for ms in (0.0, 11_000.0, 21_000.0, 99_000.0)] == [2, 1, 0, 0]
    clock.served("a", AskClass.BATCH, 20_000.0)
    assert rank(old, clock, RULES, 21_000.0) == 2, "its account was served: the job waits behind its own kind"


def test_first_come_first_served_looks_at_arrival_only() -> None:
    rules = dataclasses.replace(RULES, fair=False)
    first, second = job(AskClass.BATCH), job(AskClass.INTERACTIVE)
    assert admission_order([second, first], FairClock(), rules, 0.0) == [first, second]


def test_admission_serves_the_account_that_had_least() -> None:
    clock = FairClock()
    clock.charge("flood", 5000.0)
    jobs = [job(account="flood"), job(account="polite")]
    assert admission_order(jobs, clock, RULES, 0.0)[0].account == "polite"


def test_idle_time_is_no_credit() -> None:
    clock = FairClock()
    clock.charge("busy", 5000.0)
    clock.arrive("new", ["busy"])
    assert clock.virtual("new") == 5000.0


def test_the_table_of_accounts_is_bounded() -> None:
    clock = FairClock()
    for number in range(3000):
        clock.charge(f"account {number}", number)
        clock.served(f"account {number}", AskClass.BATCH, number)
    clock.forget_idle({"account 0"})
    assert clock.virtual("account 0") == 0.0
    assert clock.virtual("account 2999") == 2999
    assert clock.virtual("account 5") == 0.0
    assert clock.unserved_since(job(AskClass.BATCH, account="account 2999")) == 2999
    assert clock.unserved_since(job(AskClass.BATCH, account="account 5")) == 0.0, "when it was served is still known"


def test_a_flood_of_interactive_jobs_leaves_a_place_for_every_other_account() -> None:
    live: list[Job] = []
    while may_live(job(account="flood"), live, COSTS, RULES):
        live.append(running(account="flood"))
    assert len(live) == WIDE_ROWS
    assert may_live(job(account="polite"), live, COSTS, RULES)
    assert may_live(job(AskClass.BATCH, account="flood"), live, COSTS, RULES)
    quick = StepTime.prior(weight_bytes=10_000_000, kv_bytes_per_token=0)
    assert may_live(job(account="flood"), live, quick, RULES), "a small model takes more within the target"


def test_the_latest_of_the_lowest_class_gives_way() -> None:
    agent, early, late = running(AskClass.AGENT), running(AskClass.BATCH), running(AskClass.BATCH)
    assert victim([early, late, agent], job()) is late
    assert victim([agent], job(AskClass.AGENT)) is None


def test_one_that_is_parked_gives_way_before_any_that_runs_whatever_its_class() -> None:
    early, late, batch = running(), running(), running(AskClass.BATCH)
    early.parked = late.parked = True
    assert victim([early, late, batch, running()], job()) is late
    assert victim([early, running()], job(AskClass.BATCH)) is early
    assert victim([batch, running()], job(AskClass.BATCH)) is None


def test_two_backlogged_accounts_are_served_alike() -> None:
    """Closed loops of one account with many, long asks and one with few, short ones, through admission and steps."""
    clock, now = FairClock(), 0.0
    served = {"many": 0.0, "few": 0.0}
    live: list[Job] = []
    waiting = [job(AskClass.BATCH, prompt=600, account="many") for _ in range(30)]
    waiting += [job(AskClass.BATCH, prompt=100, account="few") for _ in range(12)]
    left: dict[int, int] = {}
    rules = dataclasses.replace(RULES, live_jobs=8)
    for _ in range(1500):
        for each in admission_order(waiting, clock, rules, now):
            if not may_live(each, live, COSTS, rules):
                break
            waiting.remove(each)
            live.append(each)
            left[id(each)] = 24
        chosen = planned(live, now=now, clock=clock, rules=rules)
        now += chosen.predicted_ms
        for part in chosen.slices:
            share = chosen.predicted_ms * part.count / chosen.rows
            clock.charge(part.job.account, share)
            clock.served(part.job.account, part.job.ask_class, now)
            served[part.job.account] += share
            part.job.computed += part.count
            part.job.served_ms = now
            if part.samples:
                part.job.running = True
                part.job.tokens.append(0)
                left[id(part.job)] -= 1
                if left[id(part.job)] == 0:
                    live.remove(part.job)
                    size = 600 if part.job.account == "many" else 100
                    waiting.append(job(AskClass.BATCH, prompt=size, account=part.job.account, arrived=now))
    one, other = served.values()
    jain = (one + other) ** 2 / (2 * (one**2 + other**2))
    assert jain >= 0.95, served


def test_step_time_learns_what_it_sees_and_stays_in_order() -> None:
    costs = StepTime.prior(weight_bytes=400_000_000, kv_bytes_per_token=0)
    truth = {1: 10.0, 4: 20.0, 16: 50.0, 128: 300.0}
    for _ in range(30):
        for rows, milliseconds in truth.items():
            costs.observe(rows, 0, milliseconds)
    for rows, milliseconds in truth.items():
        assert costs.predict(rows, 0) == pytest.approx(milliseconds, rel=0.1)
    predictions = [costs.predict(rows, 0) for rows in range(1, KNOTS[-1])]
    assert predictions == sorted(predictions)


def test_one_outlier_moves_a_learned_step_time_little() -> None:
    costs = StepTime.prior(weight_bytes=400_000_000, kv_bytes_per_token=0)
    for _ in range(20):
        costs.observe(8, 0, 40.0)
    costs.observe(8, 0, 4000.0)
    assert costs.predict(8, 0) < 50.0


def test_a_large_model_over_the_target_still_begins_prompts_and_serves_what_has_aged() -> None:
    """One row alone takes longer than the stall target: nothing would ever fit below it."""
    slow = StepTime.prior(weight_bytes=5_000_000_000, kv_bytes_per_token=0)
    talk, prompt, batch = running(), job(prompt=400), running(AskClass.BATCH)
    chosen = plan([talk, prompt, batch], slow, FairClock(), RULES, 0.0)
    assert chosen.stalled
    assert [s.job for s in chosen.slices] == [talk, prompt]
    assert chosen.slices[1].count >= 4
    later = plan([talk, batch], slow, FairClock(), RULES, 30_000.0)
    assert batch in [s.job for s in later.slices]


@pytest.mark.parametrize("ask_class", [AskClass.AGENT, AskClass.BATCH])
def test_a_prompt_of_a_flood_stretches_the_rows_of_who_had_less_only_a_little(ask_class: AskClass) -> None:
    polite = running(ask_class, account="polite", context=400)
    rows = [polite, *(running(ask_class, account="flood", context=400) for _ in range(7))]
    prompt = job(ask_class, account="flood", prompt=500)
    clock = FairClock()
    clock.charge("flood", 1_000.0)
    alone_ms = planned(rows, clock=clock).predicted_ms
    chosen = planned([*rows, prompt], clock=clock)
    slices = {id(part.job): part.count for part in chosen.slices}
    assert slices.keys() == {id(one) for one in (*rows, prompt)}
    assert chosen.predicted_ms <= 1.5 * alone_ms or slices[id(prompt)] <= 4
    for free in (planned([*rows, prompt]), planned([*rows[1:], prompt], clock=clock)):  # nobody had less
        (whole,) = [part.count for part in free.slices if part.job is prompt]
        assert whole > 2 * slices[id(prompt)]
    clock.charge("polite", 2_000.0)  # now it is the one that had more
    assert max(part.count for part in planned([*rows, prompt], clock=clock).slices) > 2 * slices[id(prompt)]


def test_however_long_it_waited_an_interactive_prompt_of_a_flood_stretches_who_had_less_only_a_little() -> None:
    rules = Rules(stall_target_ms=10.0)  # a slow machine: the rows alone take longer
    polite = running(account="polite", context=400)
    prompt = job(account="flood", prompt=500)
    clock = FairClock()
    clock.charge("flood", 1_000.0)
    counts = []
    for behind in (clock, FairClock()):
        chosen = planned([polite, prompt], now=60_000.0, rules=rules, clock=behind)
        counts.append(next(part.count for part in chosen.slices if part.job is prompt))
    assert 0 < counts[0] < counts[1]


def test_a_prompt_that_would_hold_up_who_had_less_still_gets_on() -> None:
    row = running(AskClass.AGENT, account="polite", context=10)
    deep = job(AskClass.AGENT, account="flood", prompt=30_000, computed=29_000)
    clock = FairClock()
    clock.charge("flood", 1_000.0)
    (part,) = [part for part in planned([row, deep], clock=clock).slices if part.job is deep]
    assert part.count >= 3


def test_a_crowd_on_a_slow_machine_all_begin_soon() -> None:
    """Eight prompts at once where eight rows alone come near the target: the last begins in a few times what all the
    prompts take alone, not when the first answers end."""
    slow = StepTime.prior(weight_bytes=600_000_000, kv_bytes_per_token=12_288)
    assert RULES.stall_target_ms > slow.predict(6, 6 * 128) > 0.6 * RULES.stall_target_ms
    crowd = [job(prompt=128) for _ in range(8)]
    alone_ms = 8 * slow.predict(128, 128 * 64)
    now, begun = 0.0, dict[int, float]()
    while len(begun) < len(crowd):
        chosen = plan(crowd, slow, FairClock(), RULES, now)
        now += chosen.predicted_ms
        for part in chosen.slices:
            part.job.computed += part.count
            if part.samples:
                part.job.running = True
                part.job.tokens.append(0)
                begun.setdefault(id(part.job), now)
    assert now < 1.6 * alone_ms


def test_prompts_become_live_no_earlier_than_they_can_be_computed() -> None:
    live = [job(AskClass.BATCH, prompt=RULES.max_rows, account="flood")]
    assert not may_live(job(AskClass.BATCH, account="flood"), live, COSTS, RULES)
    assert may_live(job(AskClass.BATCH, account="polite"), live, COSTS, RULES)
    assert may_live(job(AskClass.INTERACTIVE, account="flood"), live, COSTS, RULES), "lower classes do not count"
    live[0].running = True
    assert may_live(job(AskClass.BATCH, account="flood"), live, COSTS, RULES)


def test_among_equals_the_account_that_holds_nothing_is_first() -> None:
    jobs = [job(account="flood"), job(account="polite")]
    order = admission_order(jobs, FairClock(), RULES, 0.0, [running(account="flood")])
    assert order[0].account == "polite"


def test_twice_the_weight_is_twice_the_computing_while_both_have_work() -> None:
    clock = FairClock()
    weights = {"light": 1.0, "heavy": 2.0}
    served = dict.fromkeys(weights, 0)
    for account in weights:
        clock.arrive(account, [])
    for _ in range(300):
        account = min(weights, key=clock.virtual)
        clock.charge(account, 10.0, weight=weights[account])
        served[account] += 1
    assert served == {"light": 100, "heavy": 200}


def test_a_weight_cannot_switch_fairness_off() -> None:
    for weight, bounded in ((0.0, 0.01), (-3.0, 0.01), (1e9, 100.0), (2.5, 2.5)):
        assert weight_of(Ask(id="ask_1", account="a", model="m", weight=weight)) == bounded


def test_the_level_of_a_process_grows_as_its_work_doubles_and_sinks_as_it_waits() -> None:
    clock, work = FairClock(), job(AskClass.AGENT, process="p")
    levels = []
    for _ in range(6):
        levels.append(clock.level(work, RULES, 0.0))
        clock.charge("a", 400.0, process="p")
    assert levels == [0, 0, 1, 2, 2, 3], "at 0, 400, 800, 1200, 1600 and 2000 ms"
    assert clock.level(work, RULES, 2 * RULES.age_ms) == 1
    assert clock.level(work, RULES, 90 * RULES.age_ms) == 0
    assert clock.level(job(AskClass.AGENT, process="q"), RULES, 0.0) == 0
    assert clock.level(job(AskClass.AGENT), RULES, 0.0) == 0


def test_among_an_accounts_jobs_those_of_short_runs_go_first_until_the_others_are_old() -> None:
    clock = FairClock()
    clock.charge("a", 20_000.0, process="long")
    long, short = (job(AskClass.AGENT, process=name, prompt=400) for name in ("long", "short"))
    assert admission_order([long, short], clock, RULES, 0.0) == [short, long]
    assert planned([long, short], clock=clock).slices[0].job is short
    fifo = dataclasses.replace(RULES, fair=False)
    assert admission_order([long, short], clock, fifo, 0.0) == [long, short]
    later = 6 * RULES.age_ms
    short.arrived_ms = later
    assert admission_order([long, short], clock, RULES, later) == [long, short], "it has waited long enough"


def test_a_run_of_another_account_is_not_overtaken_for_being_long() -> None:
    clock = FairClock()
    clock.charge("a", 20_000.0, process="long")
    clock.charge("b", 30_000.0, process="other")
    mine, theirs = job(AskClass.AGENT, process="long", account="a"), job(AskClass.AGENT, process="new", account="b")
    assert admission_order([theirs, mine], clock, RULES, 0.0) == [mine, theirs]


def test_the_table_of_processes_is_bounded() -> None:
    clock = FairClock()
    for number in range(3000):
        clock.charge("a", 600.0, process=f"process {number}")
    clock.charge("a", 600.0, process="process 0")
    clock.forget_idle({"a"})
    assert clock.level(job(process="process 0"), RULES, 0.0) == 2
    assert clock.level(job(process="process 1"), RULES, 0.0) == 0


@dataclasses.dataclass
class Run:
    """A program: each call brings `prompt` tokens more and wants `answer` tokens, then its tool takes `tool_ms`."""

    began: float
    calls: list[tuple[int, int, float]]
    context: int = 512
    took: float = 0.0


def runs(count: int, *, gap_ms: float) -> list[Run]:
    """70, 20 and 10 % of them with 2, 8 and 30 calls."""
    dice, now, made = random.Random(7), 0.0, []
    for _ in range(count):
        now += dice.expovariate(1 / gap_ms)
        many = dice.choices((2, 8, 30), (70, 20, 10))[0]
        calls = [
            (
                max(4, int(dice.lognormvariate(4.2, 0.6))),
                max(2, int(dice.lognormvariate(3.3, 0.6))),
                dice.expovariate(0.002),
            )
            for _ in range(many)
        ]
        made.append(Run(now, calls))
    return made


def simulate(work: list[Run], rules: Rules) -> None:
    """On a machine whose clock is the cost model, with as many places as `rules.live_jobs`."""
    clock, now = FairClock(), 0.0
    coming = [(run.began, number, 0) for number, run in enumerate(work)]
    heapq.heapify(coming)
    live: list[Job] = []
    waiting: list[Job] = []
    whose: dict[int, tuple[int, int]] = {}
    left: dict[int, int] = {}
    while coming or live or waiting:
        while coming and (coming[0][0] <= now or not (live or waiting)):
            now, number, call = max(now, coming[0][0]), *heapq.heappop(coming)[1:]
            prompt, answer, _ = work[number].calls[call]
            context = work[number].context
            new = job(AskClass.AGENT, prompt=context + prompt, computed=context, arrived=now, process=f"{number}")
            waiting.append(new)
            whose[id(new)], left[id(new)] = (number, call), answer
        for each in admission_order(waiting, clock, rules, now, live):
            if may_live(each, live, COSTS, rules):
                waiting.remove(each)
                live.append(each)
        chosen = planned(live, now=now, rules=rules, clock=clock)
        now += chosen.predicted_ms
        for part in chosen.slices:
            each = part.job
            clock.charge("a", chosen.predicted_ms * part.count / chosen.rows, process=each.process)
            clock.served("a", each.ask_class, now)
            each.computed += part.count
            each.served_ms = now
            if not part.samples:
                continue
            each.running = True
            each.tokens.append(0)
            left[id(each)] -= 1
            if left[id(each)] == 0:
                live.remove(each)
                number, call = whose[id(each)]
                work[number].context = each.computed
                work[number].took = now - work[number].began
                if call + 1 < len(work[number].calls):
                    heapq.heappush(coming, (now + work[number].calls[call][2], number, call + 1))


def test_short_programs_among_long_ones_are_done_sooner_and_the_long_ones_hardly_later() -> None:
    took: dict[bool, list[Run]] = {}
    for fair in (False, True):
        took[fair] = runs(100, gap_ms=5_000)
        simulate(took[fair], dataclasses.replace(RULES, live_jobs=4, fair=fair))

    def mean(fair: bool, calls: int | None = None) -> float:
        return statistics.fmean(run.took for run in took[fair] if calls in (None, len(run.calls)))

    def last(fair: bool) -> float:
        return max(run.began + run.took for run in took[fair])

    assert mean(False, 2) > 1.5 * mean(True, 2)
    assert mean(False) > mean(True)
    assert max(run.took for run in took[True]) < 1.3 * max(run.took for run in took[False])
    assert last(True) < 1.02 * last(False), "the machine did as much"
