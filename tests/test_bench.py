"""The arithmetic behind the benchmarks: a wrong ratio is worse than none."""

from __future__ import annotations

import asyncio
import math
from itertools import pairwise

import pytest

from bench.abba import Arm, interleave, medians
from bench.fairness import jain
from bench.limits import STEP_TOKENS, step_times
from bench.load import Answer, Question, Words, _take, percentile
from bench.report import Finding
from bench.resume import CELLS, DISK, GONE, MEMORY, Place, Resumption, believe
from bench.resume import Work as Parked
from bench.server import parse_counters, total
from bench.short_programs import Work as Mixed
from bench.short_programs import programs_of
from bench.sweep import MOST_RUNS, Flags, best_flags


def test_step_times_meet_the_measured_points_and_go_on_between_and_beyond_them() -> None:
    times = step_times([(1, 0, 10), (4, 0, 16), (512, 0, 1000), (1, 2048, 12), (4, 2048, 24), (512, 2048, 2000)])
    assert times.at(1, 0) == 10
    assert times.at(4, 2048) == 24
    assert times.at(2, 0) == pytest.approx(12)
    assert times.at(4, 1024) == pytest.approx(20)
    assert times.at(4, 4096) == pytest.approx(32)
    assert times.at(1028, 0) == pytest.approx(2 * 1000 + 16)


def test_limits_compute_each_shared_token_once() -> None:
    flat = step_times([(1, 0, 10), (16, 0, 160), (512, 0, 512)])  # a prompt token costs one millisecond
    assert flat.prefill_ms(2048) == pytest.approx(2048)
    assert flat.fan_out_ms(shared=2048, branches=16, own=64, out=64) == pytest.approx(2048 + 16 * 64 + 63 * 160)
    assert flat.alone_ms(cached=4096, new=STEP_TOKENS, out=3) == pytest.approx(STEP_TOKENS + 2 * 10)


def test_a_percentile_is_a_value_that_occurred() -> None:
    values = [float(number) for number in range(1, 21)]
    assert percentile(values, 95) == 19
    assert percentile(values, 50) == 10
    assert percentile(values, 99) == 20
    assert percentile([7.0], 1) == 7
    assert math.isnan(percentile([], 50))


def test_jain_is_one_for_equal_shares_and_a_half_when_one_of_two_has_all() -> None:
    assert jain([5, 5]) == pytest.approx(1)
    assert jain([5, 0]) == pytest.approx(0.5)


def test_counters_are_summed_over_labels_by_how_their_name_ends() -> None:
    text = '# HELP a b\nnimbos_cells_used{model="a b"} 3\nnimbos_cells_used{model="c"} 4\nother_cells_used 9\n'
    assert total(parse_counters(text), "cells_used") == 7
    assert total(parse_counters(text), "steps") is None


def test_an_answer_is_read_from_events_of_either_side() -> None:
    answer = Answer(question=Question(prompt=(1, 2, 3), out_tokens=2), asked_s=0.0)
    assert _take(answer, '{"choices": [{"text": "a"}]}')
    assert _take(answer, '{"choices": [{"text": ""}]}')
    assert _take(answer, '{"choices": [{"text": "b"}], "usage": null}')
    usage = '{"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}'
    assert _take(answer, f'{{"choices": [], "usage": {usage}}}')
    with pytest.raises(RuntimeError):
        answer.require()
    assert not _take(answer, "[DONE]")
    assert answer.require() is answer
    assert (len(answer.arrivals), answer.computed_tokens, answer.received_tokens()) == (2, 2, 2)


def test_prompts_repeat_by_seed_and_stay_in_range() -> None:
    words = Words(low=300, high=400)
    assert words.prompt(50, seed=(1, 2)) == words.prompt(50, seed=(1, 2)) != words.prompt(50, seed=(1, 3))
    assert all(300 <= id < 400 for id in words.prompt(500, seed=(0,)))


async def test_arms_run_in_mirrored_order() -> None:
    order: list[str] = []

    def arm(name: str) -> Arm:
        async def run() -> dict[str, float]:
            order.append(name)
            return {"value": float(len(order))}

        return Arm(name=name, run=run)

    runs = await interleave([arm("a"), arm("b"), arm("c")], repeats=1, limit_s=5)
    assert order == ["a", "b", "c", "c", "b", "a"]
    assert {name: measures["value"] for name, measures in medians(runs).items()} == {"a": 3.5, "b": 3.5, "c": 3.5}


async def test_a_run_that_takes_too_long_ends_the_measurement() -> None:
    async def run() -> dict[str, float]:
        await asyncio.Event().wait()
        return {}

    with pytest.raises(TimeoutError):
        await interleave([Arm(name="stuck", run=run)], repeats=1, limit_s=0.01)


async def test_the_sweep_varies_one_flag_at_a_time_from_the_best_start_and_stops_after_ten_runs() -> None:
    tried: list[Flags] = []

    async def measure(flags: Flags) -> dict[str, float]:
        tried.append(flags)
        if "-broken" in flags:
            raise RuntimeError("no such flag")
        return {"seconds": 10.0 - 4 * ("2" in flags) - 2 * ("-fast" in flags) - ("-faster" in flags)}

    starts = [("-np", str(count)) for count in (1, 2, 4)]
    variants = [("-fast",), ("-broken",), ("-faster",), *((f"-other{number}",) for number in range(9))]
    found = await best_flags(starts, variants, measure=measure, score=lambda m: m["seconds"], limit_s=5)
    assert len(tried) == MOST_RUNS == len(set(tried))
    assert tried[:4] == [*starts, ("-np", "2", "-fast")]
    assert found[0] == (4.0, ("-np", "2", "-fast"))
    assert all("-broken" not in flags for _, flags in found)


@pytest.mark.parametrize(
    ("value", "at_least", "at_most", "verdict"),
    [
        (6, 6, None, "pass"),
        (5.9, 6, None, "miss"),
        (1.1, None, 1, "miss"),
        (3, None, None, "—"),
        (math.nan, 1, None, "miss"),
    ],
)
def test_a_finding_is_judged_by_its_target(
    value: float, at_least: float | None, at_most: float | None, verdict: str
) -> None:
    assert Finding(name="x", value=value, at_least=at_least, at_most=at_most).verdict == verdict


@pytest.mark.parametrize(
    ("place", "cached", "put_back", "fetched_bytes", "right"),
    [
        (CELLS, 4096, 0, 0, True),
        (CELLS, 0, 0, 0, False),
        (CELLS, 4096, 4096, 0, False),
        (MEMORY, 4096, 4096, 0, True),
        (MEMORY, 4096, 0, 0, False),
        (MEMORY, 3000, 3000, 0, False),
        (DISK, 4096, 4096, 50_000_000, True),
        (DISK, 4096, 4096, 0, False),
        (GONE, 1, 0, 0, True),
        (GONE, 4096, 0, 0, False),
    ],
)
def test_a_context_that_came_back_from_elsewhere_is_no_measurement(
    place: Place, cached: int, put_back: int, fetched_bytes: int, right: bool
) -> None:
    one = Resumption(
        first_token_s=0.1,
        cached=cached,
        computed=4097 - cached,
        put_back=put_back,
        stored_bytes=60_000_000 if place.written_out else 0,
        fetched_bytes=fetched_bytes,
    )
    if right:
        believe(one, place, Parked())
    else:
        with pytest.raises(RuntimeError):
            believe(one, place, Parked())


def test_programs_have_exactly_their_shares_and_are_the_same_in_each_run() -> None:
    work = Mixed(programs=20)
    programs = programs_of(work)
    counts = [len(program.calls) for program in programs]
    assert {count: counts.count(count) for count in set(counts)} == {2: 14, 8: 4, 30: 2}
    assert programs == programs_of(work)
    assert counts != sorted(counts), "they begin in any order"
    assert all(one.begins < other.begins for one, other in pairwise(programs))
    longest = max(sum(call.appended + call.generated for call in program.calls) for program in programs)
    assert work.shared + longest <= work.context_tokens
