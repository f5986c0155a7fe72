"""Preparing prompts: an account that brings many does not hold up another that brings one."""

from __future__ import annotations

import threading
from itertools import count

from nimbos.engine.turns import PATIENCE_TURNS, Turns

_keys = count()


def put(turns: Turns[str], account: str, item: str, rank: int = 0) -> None:
    turns.put(item, key=next(_keys), account=account, rank=rank)


def test_accounts_take_turns_and_each_is_served_in_order() -> None:
    turns: Turns[str] = Turns()
    for number in range(5):
        put(turns, "flood", f"flood {number}")
    put(turns, "polite", "polite 0")
    put(turns, "other", "other 0")
    put(turns, "polite", "polite 1")
    order = [turns.get() for _ in range(8)]
    assert order == [
        "flood 0", "polite 0", "other 0", "flood 1", "polite 1", "flood 2", "flood 3", "flood 4",
    ]  # fmt: skip


def test_one_who_comes_back_waits_behind_those_who_are_there() -> None:
    turns: Turns[str] = Turns()
    put(turns, "a", "1")
    assert turns.get() == "1"
    put(turns, "b", "2")
    put(turns, "a", "3")
    assert [turns.get(), turns.get()] == ["2", "3"]


def test_what_is_urgent_goes_before_what_is_not_also_of_the_same_account() -> None:
    turns: Turns[str] = Turns()
    put(turns, "a", "batch", rank=2)
    put(turns, "b", "agent", rank=1)
    put(turns, "a", "interactive")
    put(turns, "c", "interactive too")
    assert [turns.get() for _ in range(4)] == ["interactive", "interactive too", "agent", "batch"]


def test_no_flood_of_urgent_ones_holds_up_the_others_for_ever() -> None:
    turns: Turns[str] = Turns()
    put(turns, "b", "batch", rank=2)
    put(turns, "c", "agent", rank=1)
    served = []
    for number in range(4 * PATIENCE_TURNS):
        put(turns, "flood", f"{number}")
        served.append(turns.get())
    assert served.index("agent") <= PATIENCE_TURNS + 1
    assert served.index("batch") <= PATIENCE_TURNS + 1
    assert [item for item in served if item.isdecimal()] == [f"{n}" for n in range(4 * PATIENCE_TURNS - 2)]


def test_a_rank_that_had_its_turn_is_patient_again() -> None:
    turns: Turns[str] = Turns()
    for number in range(4 * PATIENCE_TURNS):
        put(turns, "flood", "urgent")
        put(turns, "b", f"batch {number}", rank=2)
    served = [turns.get() for _ in range(3 * (PATIENCE_TURNS + 1))]
    assert [at for at, item in enumerate(served) if item != "urgent"] == [
        PATIENCE_TURNS, 2 * PATIENCE_TURNS + 1, 3 * PATIENCE_TURNS + 2,
    ]  # fmt: skip


def test_what_is_dropped_is_never_served_and_leaves_no_empty_turn() -> None:
    turns: Turns[str] = Turns()
    for number in range(4):
        turns.put(f"{number}", key=number, account="a", rank=0)
    turns.put("other", key="other", account="b", rank=1)
    assert turns.drop(0)
    assert turns.drop(2)
    assert not turns.drop(2)
    assert turns.get() == "1"
    assert not turns.drop(1), "it was served"
    assert turns.drop(3)
    assert turns.get() == "other"
    assert not any(turns._ranks)
    assert not turns._places


def test_a_waiting_thread_gets_what_arrives() -> None:
    turns: Turns[str] = Turns()
    got: list[str] = []
    thread = threading.Thread(target=lambda: got.append(turns.get()))
    thread.start()
    put(turns, "a", "7")
    thread.join(60)
    assert got == ["7"]
