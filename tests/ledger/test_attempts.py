"""What is known of the asks behind one answer: none that may have paid is forgotten for being one of many."""

from __future__ import annotations

from nimbos.ledger import Attempts


def test_each_of_many_prompts_keeps_its_own_asks() -> None:
    known = Attempts()
    for attempt in range(3):
        for number in range(128):
            known = known.with_ask(number, f"ask_{attempt}_{number}")
    assert len(known.open) == 3 * 128
    assert known.with_ask(0, "ask_0_0") is known


def test_of_one_number_the_oldest_are_forgotten() -> None:
    known = Attempts().with_ask(1, "other")
    for attempt in range(100):
        known = known.with_ask(0, f"ask_{attempt}")
    assert known.open[0] == (1, "other")
    assert [ask for number, ask in known.open if number == 0] == [f"ask_{attempt}" for attempt in range(84, 100)]
