"""The choice of threads, on a simulated machine."""

from __future__ import annotations

from nimbos.engine.threads import ThreadChoice


def run(choice: ThreadChoice, steps: int, *, one: float, full: float, share: float, now: float = 0.0) -> float:
    """Each step takes `one` or `full` × 10 ms; all threads together get `share` of their cores."""
    for _ in range(steps):
        relative = one if choice.threads == 1 else full
        wall = 10 * relative
        cpu = wall * (1.0 if choice.threads == 1 else choice.all_threads * share)
        now += wall
        choice.observe(relative=relative, cpu_ms=cpu, wall_ms=wall, now_ms=now)
    return now


def test_a_quiet_machine_always_computes_with_all_threads() -> None:
    choice = ThreadChoice(2)
    for _ in range(500):
        run(choice, 1, one=1.6, full=1.0, share=0.99)
        assert choice.threads == 2
    assert not choice.contended


def test_on_a_busy_machine_one_thread_takes_over_and_all_come_back_when_it_is_quiet() -> None:
    choice = ThreadChoice(2)
    now = run(choice, 200, one=3.0, full=40.0, share=0.5)
    assert choice.threads == 1
    assert choice.contended
    run(choice, 3000, one=1.6, full=1.0, share=0.99, now=now)
    assert choice.threads == 2
    assert not choice.contended


def test_a_busy_machine_where_all_threads_are_still_faster_keeps_them() -> None:
    choice = ThreadChoice(4)
    steps = []
    now = 0.0
    for _ in range(600):
        now = run(choice, 1, one=4.0, full=1.5, share=0.7, now=now)
        steps.append(choice.threads)
    assert steps.count(4) > 500


def test_one_core_has_no_choice() -> None:
    choice = ThreadChoice(1)
    run(choice, 50, one=1.0, full=1.0, share=0.3)
    assert choice.threads == 1
    assert not choice.contended
