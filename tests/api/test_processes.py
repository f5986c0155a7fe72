"""Processes over HTTP: what is told of them, what can be sent to them, and to whom they belong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import openai
import pytest
from sqlalchemy import Text, bindparam, update

from nimbos.accounts import Accounts, Role, people
from nimbos.accounts.words import DEFAULT_PROJECT, LOCAL, Grant
from nimbos.api import process_events as told_events
from nimbos.config import Settings
from nimbos.db import Database, Statement, Transaction
from nimbos.db.tables.kernel import process_events
from nimbos.keys import OwnerKey
from tests.accounts.conftest import make_key, make_user
from tests.live import OWNER_SECRET, Live, error_of, serving
from tests.processing import CURIOUS, PLAIN, WEATHER, Processes, Sent, sent

QUESTION = "Which city?"
LEISURELY = " ".join(f"number{number}" for number in range(25))
SCRIPT = {
    "replies": [
        {"match": "^Ask", "times": 1, "tool_calls": [{"name": "ask", "arguments": {"question": QUESTION}}]},
        {"match": "Paris", "text": "It is Paris."},
        {"match": "^Mail", "times": 1, "tool_calls": [{"name": "mail", "arguments": {}}]},
        {"match": "slowly", "text": "one two three four five six seven eight nine ten", "tokens_per_second": 60},
        {"match": "at leisure", "text": LEISURELY, "tokens_per_second": 10},
        {"match": "^How warm", "times": 1, "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]},
        {"match": "degrees", "text": "21 degrees."},
        {"match": "for ever", "text": "word " * 2_000, "tokens_per_second": 40},
    ],
    "default": {"text": "Hello to you."},
}

OTHER = {"default": {"text": "21 things."}}
DECIDING = {
    "nimbos.toml": 'name = "deciding"\nentry = "main.py:main"\n',
    "main.py": (
        "from nimbos.adk import ask, think\n\n\n"
        "async def main(input):\n"
        '    first = await think("Say hello.")\n'
        '    city = await ask("Which city?")\n'
        '    return [first, city, await think(f"Where is {city}?")]\n'
    ),
}
LOSING = {
    "nimbos.toml": 'name = "losing"\n',
    "instructions.md": "Mail it.\n",
    "tools.py": (
        "import os\nfrom nimbos.adk import tool\n\n\n"
        '@tool(effect="opaque")\ndef mail() -> str:\n    """Nobody knows."""\n    os._exit(7)\n'
    ),
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("home"), {"demo": SCRIPT, "other": OTHER}) as running:
        yield running


@pytest.fixture(scope="module")
def mine(live: Live) -> Processes:
    return Processes(live.http)


@pytest.fixture(scope="module")
def plain(mine: Processes) -> str:
    return mine.put(PLAIN)


@pytest.fixture(scope="module")
def curious(mine: Processes) -> str:
    return mine.put(CURIOUS)


@pytest.fixture(scope="module")
def others(live: Live) -> Processes:
    """Of another project."""
    admin = openai.OpenAI(base_url=f"{live.url}/v1", admin_api_key=OWNER_SECRET, api_key=OWNER_SECRET, max_retries=0)
    project = admin.admin.organization.projects.create(name="others")
    made = admin.admin.organization.projects.service_accounts.create(project.id, name="robot")
    admin.close()
    assert made.api_key is not None
    return Processes(live.http, made.api_key.value)


# --- what is told


def test_a_process_is_told_with_its_result_and_what_it_used(mine: Processes, plain: str) -> None:
    pid = mine.spawn(plain, "Say hello.", name="greeter")
    told = mine.over(pid)
    assert (told["id"], told["state"], told["reason"]) == (pid, "done", "ok")
    assert (told["name"], told["model"], told["class"], told["program"]) == ("greeter", "demo", "agent", plain)
    assert told["result"] == "Hello to you."
    assert told["usage"]["tokens"] > 0
    assert told["tasks"] == {"a2a": "TASK_STATE_COMPLETED", "mcp": "completed"}
    assert told == mine.process(pid)
    assert "asks" not in told


def test_a_list_is_newest_first_and_holds_what_is_done(mine: Processes, plain: str) -> None:
    first, second = mine.spawn(plain), mine.spawn(plain)
    mine.over(first)
    mine.over(second)
    page = mine.get("processes", limit=2).json()
    assert [one["id"] for one in page["data"]] == [second, first]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (second, first, True)
    for one in page["data"]:
        assert (one["state"], one["reason"], one["result"]) == ("done", "ok", "Hello to you.")
        assert one["usage"]["tokens"] > 0
    behind = mine.get("processes", after=second, limit=1).json()
    assert [one["id"] for one in behind["data"]] == [first]
    assert first not in [one["id"] for one in mine.get("processes", state="open").json()["data"]]
    assert first in [one["id"] for one in mine.get("processes", state="done").json()["data"]]


def test_a_beginning_of_an_id_finds_its_process(mine: Processes, plain: str) -> None:
    pid = mine.spawn(plain)
    assert [one["id"] for one in mine.get("processes", prefix=pid[:-2]).json()["data"]] == [pid]
    assert mine.get("processes", prefix="proc_zz").json()["data"] == []
    assert len(mine.get("processes", prefix="proc_").json()["data"]) > 1


def test_a_program_is_found_by_its_name_too(mine: Processes, plain: str) -> None:
    assert mine.process(mine.spawn("plain"))["program"] == plain


# --- events


def test_the_stream_tells_the_whole_log_with_its_texts_and_then_the_end(mine: Processes, plain: str) -> None:
    pid = mine.spawn(plain, "Say hello.")
    told = list(mine.stream(pid))
    events = [one for one in told if one.id]
    assert [int(one.id) for one in events] == list(range(1, len(events) + 1))
    assert events[0].kind == "proc.created"
    assert events[0].data["texts"][events[0].data["body"]["input"]] == "Say hello."
    assert events[-1].kind == "proc.exited"
    answered = next(one for one in events if one.kind == "model.done")
    message = answered.data["texts"][answered.data["body"]["message"]]
    assert message["content"] == "Hello to you."
    assert [one.kind for one in told if not one.id][-1] == "end"
    assert all(before.data["hash"] == after.data["prev_hash"] for before, after in pairwise(events))


def test_a_stream_goes_on_behind_the_last_event_that_was_seen(mine: Processes, plain: str) -> None:
    pid = mine.spawn(plain)
    mine.over(pid)
    whole = [(one.kind, one.id) for one in mine.stream(pid)]
    for last in (1, 3, len(whole) - 1):
        assert [(one.kind, one.id) for one in mine.stream(pid, last=str(last))] == whole[last:]
    assert [(one.kind, one.id) for one in mine.stream(pid, after=2)] == whole[2:]


def test_words_come_while_they_are_said_and_have_no_number(mine: Processes, plain: str) -> None:
    pid = mine.spawn(plain, "Count slowly.")
    said, intended, done_at = "", False, 0
    for number, one in enumerate(mine.stream(pid)):
        intended = intended or one.kind == "model.intent"
        if one.kind == "delta":
            assert (one.id, one.data["channel"], one.data["pid"]) == ("", "text", pid)
            assert intended and not done_at
            said += one.data["text"]
        elif one.kind == "model.done":
            done_at = number
    assert said
    assert "one two three four five six seven eight nine ten".endswith(said)


def test_pages_of_events_are_the_same_as_the_stream(mine: Processes, plain: str) -> None:
    pid = mine.spawn(plain)
    mine.over(pid)
    streamed = [one.data for one in mine.stream(pid) if one.id]
    after, paged, more = 0, [], True
    while more:
        page = mine.get(f"processes/{pid}/events", stream="false", limit=3, after=after).json()
        paged += page["data"]
        after, more = page["data"][-1]["seq"], page["has_more"]
    assert paged == streamed


def test_a_page_of_events_is_as_long_as_its_texts_allow(
    mine: Processes, plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = mine.spawn(plain, "x" * 1_000)
    mine.over(pid)
    streamed = [one.data for one in mine.stream(pid) if one.id]
    monkeypatch.setattr(told_events, "PAGE_TEXT_BYTES", 500)
    after, paged, sizes, more = 0, [], list[int](), True
    while more:
        page = mine.get(f"processes/{pid}/events", stream="false", limit=500, after=after).json()
        paged += page["data"]
        sizes.append(len(page["data"]))
        after, more = page["data"][-1]["seq"], page["has_more"]
    assert paged == streamed
    assert sizes[0] == 1, "what it was given is more than a page holds"
    assert len(sizes) < len(streamed)


def test_a_segment_that_an_event_names_can_be_fetched(mine: Processes, others: Processes, plain: str) -> None:
    pid = mine.spawn(plain, {"words": "Say hello."})
    first = next(mine.stream(pid))
    hash = first.data["body"]["input"]
    assert mine.get(f"processes/{pid}/segments/{hash}").json() == {"words": "Say hello."}
    error_of(mine.get(f"processes/{pid}/segments/{'0' * 64}"), 404)
    theirs = others.spawn(others.put(PLAIN))
    error_of(others.get(f"processes/{theirs}/segments/{hash}"), 404)


# --- signals


def test_a_question_is_told_and_its_answer_taken_once(mine: Processes, curious: str) -> None:
    pid = mine.spawn(curious, "Ask me.")
    told = mine.until(pid, "asking")
    assert (told["reason"], told["tasks"]["a2a"]) == ("input", "TASK_STATE_INPUT_REQUIRED")
    (asked,) = told["asks"]
    assert (asked["reason"], asked["question"], asked["about"]) == ("input", QUESTION, told["about"][0])
    assert asked["what"]["arguments"]["question"] == QUESTION
    answered = mine.signal(pid, "answer", about=asked["about"], body="Paris")
    assert answered.status_code == 200
    assert answered.json()["process"]["id"] == pid
    assert mine.over(pid)["result"] == "It is Paris."
    late = error_of(mine.signal(pid, "answer", about=asked["about"], body="Oslo"), 409)
    assert "over" in late["message"]


def test_of_two_answers_at_once_one_is_taken(mine: Processes, curious: str) -> None:
    pid = mine.spawn(curious, "Ask me.")
    mine.until(pid, "asking")
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: mine.signal(pid, "answer", body="Paris").status_code, range(8)))
    assert sorted(replies) == [200, *[409] * 7]
    assert mine.over(pid)["result"] == "It is Paris."


def test_the_same_signal_twice_is_one(mine: Processes, curious: str) -> None:
    pid = mine.spawn(curious, "Ask me.")
    mine.until(pid, "asking")
    for _ in range(2):
        reply = mine.signal(pid, "answer", body="Paris", id="reply-1")
        assert (reply.status_code, reply.json()["id"]) == (200, "reply-1")
    mine.over(pid)
    taken = [one for one in mine.stream(pid) if one.kind == "signal.received"]
    assert [one.data["body"]["signal"] for one in taken] == ["answer"]


def test_a_signal_that_is_sent_again_is_the_same_whatever_is_asked_by_then(mine: Processes) -> None:
    careful = {**WEATHER, "nimbos.toml": 'name = "both"\n\n[tools]\nbuiltin = ["ask"]\nconfirm = ["weather"]\n'}
    pid = mine.spawn(mine.put(careful), "Ask me.")
    before = mine.until(pid, "asking")
    assert mine.signal(pid, "answer", body="How warm is it?", id="mine").status_code == 200
    assert mine.until(pid, "asking", last=str(before["events"]))["reason"] == "permission"
    again = mine.signal(pid, "answer", body="How warm is it?", id="mine")
    assert (again.status_code, again.json()["id"]) == (200, "mine")
    assert mine.signal(pid, "answer", body={"approve": True}).status_code == 200
    assert mine.over(pid)["result"] == "21 degrees."


def test_only_what_happened_has_a_result(mine: Processes) -> None:
    pid = mine.spawn(mine.put(LOSING), "Mail it.")
    assert mine.until(pid, "asking")["reason"] == "in_doubt"
    wrong = mine.signal(pid, "answer", body={"verdict": "did_not", "result": "sent"})
    assert error_of(wrong, 400)["param"] == "body.result"
    assert mine.signal(pid, "answer", body={"verdict": "happened", "result": "sent to Paris"}).status_code == 200
    assert mine.over(pid)["result"] == "It is Paris."


def test_of_a_question_with_choices_one_of_them_is_the_answer(mine: Processes) -> None:
    choosing = {**DECIDING, "main.py": DECIDING["main.py"].replace('city?")', 'city?", choices=["Paris", "Oslo"])')}
    pid = mine.spawn(mine.put(choosing))
    (asked,) = mine.until(pid, "asking")["asks"]
    assert asked["what"]["choices"] == ["Paris", "Oslo"]
    for about in ({}, {"about": asked["about"]}):
        refusal = error_of(mine.signal(pid, "answer", body="Rome", **about), 400)
        assert (refusal["param"], "Rome" in refusal["message"], "2 choices" in refusal["message"]) == (
            "body",
            False,
            True,
        )
    assert mine.process(pid)["asks"] == [asked]
    assert mine.signal(pid, "answer", body="Paris").status_code == 200
    assert mine.over(pid)["result"][1] == "Paris"


def test_an_answer_to_what_is_not_asked_is_refused(mine: Processes, plain: str, curious: str) -> None:
    pid = mine.spawn(curious, "Ask me.")
    mine.until(pid, "asking")
    error_of(mine.signal(pid, "answer", about="nothing", body="Paris"), 409)
    busy = mine.spawn(plain, "Talk for ever.")
    error_of(mine.signal(busy, "answer", body="Paris"), 409)
    for process in (pid, busy):
        assert mine.signal(process, "kill").status_code == 200
        assert mine.over(process)["reason"] == "killed"


def test_a_process_is_paused_in_the_middle_of_its_words_and_goes_on(mine: Processes, plain: str) -> None:
    pid = mine.spawn(plain, "Count at leisure.")
    next(one for one in mine.stream(pid) if one.kind == "delta")
    assert mine.signal(pid, "pause").status_code == 200
    paused = mine.until(pid, "paused")
    assert (paused["reason"], paused["result"]) == ("user", None)
    assert mine.signal(pid, "resume").status_code == 200
    assert mine.over(pid)["result"] == LEISURELY


def test_a_budget_that_is_spent_is_asked_for_and_topped_up(mine: Processes, plain: str) -> None:
    pid = mine.spawn(plain, "Count slowly.", budget={"tokens": 12})
    told = mine.until(pid, "asking")
    assert told["reason"] == "budget"
    (asked,) = told["asks"]
    assert asked["what"]["meter"] == "tokens"
    assert "12 tokens" in asked["question"]
    assert "top_up" in error_of(mine.signal(pid, "answer", body="more"), 409)["message"]
    budgets = {one["meter"]: one for one in mine.get(f"processes/{pid}/cost").json()["budgets"]}
    assert (budgets["tokens"]["limit"], budgets["calls"]["limit"]) == (12, None)
    assert 0 <= budgets["tokens"]["left"] <= 12 - budgets["tokens"]["used"]
    assert mine.signal(pid, "top_up", body={"tokens": 1_000}).status_code == 200
    done = mine.over(pid)
    assert (done["reason"], done["result"]) == ("ok", "one two three four five six seven eight nine ten")
    assert done["usage"]["tokens"] <= 1_012


def test_the_budget_of_a_process_stays_as_long_as_that_lives(mine: Processes, plain: str) -> None:
    pid = mine.spawn(plain, "Count slowly.", budget={"tokens": 12})
    mine.until(pid, "asking")
    budget = {"owner_kind": "process", "meter": "tokens", "limit": 12}
    of_nobody, of_it = (
        mine.post("organization/budgets", {**budget, "owner_id": owner}).json()["id"]
        for owner in ("proc_mistyped", pid)
    )
    assert mine.delete(f"organization/budgets/{of_nobody}").status_code == 200
    assert pid in error_of(mine.delete(f"organization/budgets/{of_it}"), 409)["message"]
    mine.signal(pid, "kill")
    mine.over(pid)
    assert mine.delete(f"organization/budgets/{of_it}").status_code == 200


def test_a_call_that_needs_approval_is_shown_and_refused(mine: Processes) -> None:
    careful = {**WEATHER, "nimbos.toml": 'name = "careful"\n\n[tools]\nconfirm = ["weather"]\n'}
    program = mine.put(careful)
    pid = mine.spawn(program, "How warm is it?")
    told = mine.until(pid, "asking")
    (asked,) = told["asks"]
    assert (told["reason"], asked["what"]["resource"]) == ("permission", "weather")
    assert asked["what"]["arguments"] == {"city": "Oslo"}
    assert error_of(mine.signal(pid, "answer", body="yes please"), 400)["param"] == "body"
    assert mine.signal(pid, "answer", body={"approve": False, "why": "Not today."}).status_code == 200
    mine.over(pid)
    denied = next(one for one in mine.stream(pid) if one.kind == "call.denied")
    assert "Not today." in denied.data["body"]["why"]
    approved = mine.spawn(program, "How warm is it?")
    mine.until(approved, "asking")
    assert mine.signal(approved, "answer", body={"approve": True}).status_code == 200
    assert mine.over(approved)["result"] == "21 degrees."


# --- families, forks, proofs


def test_a_log_is_verified_and_a_changed_row_found(live: Live, mine: Processes, plain: str) -> None:
    pid = mine.spawn(plain)
    events = mine.over(pid)["events"]
    good = mine.get(f"processes/{pid}/verify").json()
    assert (good["events"], good["broken_at"]) == (events, None)
    assert good["hash"] == [one for one in mine.stream(pid) if one.id][-1].data["hash"]
    asyncio.run(change_actor(live.settings, pid, seq=2))
    assert mine.get(f"processes/{pid}/verify").json()["broken_at"] == 2


async def change_actor(settings: Settings, pid: str, *, seq: int) -> None:
    """By somebody who can write to the database."""
    change = Statement(
        update(process_events)
        .where(process_events.c.pid == bindparam("of", type_=Text), process_events.c.seq == bindparam("at"))
        .values(actor="user:somebody else")
    )

    def begin() -> Transaction[None]:
        yield change(of=pid, at=seq)

    database = await Database.open(settings)
    await database.run(begin)
    await database.close()


def test_cost_and_tree_name_the_process(mine: Processes, plain: str) -> None:
    pid = mine.spawn(plain)
    told = mine.over(pid)
    assert [one["id"] for one in mine.get(f"processes/{pid}/tree").json()["data"]] == [pid]
    cost = mine.get(f"processes/{pid}/cost").json()
    assert [one["id"] for one in cost["processes"]] == [pid]
    tokens = sum(cost["total"].get(meter, 0) for meter in ("input", "cached", "output", "thinking"))
    assert tokens == told["usage"]["tokens"]
    assert cost["used"] == cost["total"]


def test_a_tree_is_told_in_pages(mine: Processes) -> None:
    code = (
        "from nimbos.adk import child, each\n\n\n@child\nasync def kid(n):\n    return n\n\n\n"
        "async def main(input):\n    return await each(kid, [1, 2, 3, 4])\n"
    )
    pid = mine.spawn(mine.put({"nimbos.toml": 'name = "parent"\nentry = "main.py:main"\n', "main.py": code}))
    assert mine.over(pid)["result"] == [1, 2, 3, 4]
    whole = mine.get(f"processes/{pid}/tree").json()
    ids = [one["id"] for one in whole["data"]]
    assert (len(ids), ids[0], whole["has_more"]) == (5, pid, False)
    first = mine.get(f"processes/{pid}/tree", limit=3).json()
    rest = mine.get(f"processes/{pid}/tree", limit=2, after=first["last_id"]).json()
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert first["data"] + rest["data"] == whole["data"]
    assert error_of(mine.get(f"processes/{pid}/tree", limit=0), 400)["param"] == "limit"


def test_forks_share_the_past_and_are_adopted_or_dropped(mine: Processes, curious: str) -> None:
    pid = mine.spawn(curious, "Ask me.")
    mine.until(pid, "asking")
    forks = mine.post(f"processes/{pid}/fork", {"n": 2}).json()["data"]
    assert [one["forked_from"]["id"] for one in forks] == [pid, pid]
    assert all(one["withheld"] for one in forks)
    kept, dropped = (one["id"] for one in forks)
    for fork in (kept, dropped):
        mine.until(fork, "asking", last=str(forks[0]["forked_from"]["at"]))
    assert mine.post(f"processes/{kept}/adopt").status_code == 200
    assert not mine.process(kept)["withheld"]
    assert mine.delete(f"processes/{dropped}").status_code == 200
    assert mine.over(dropped)["reason"] == "killed"
    error_of(mine.delete(f"processes/{pid}"), 409)
    error_of(mine.post(f"processes/{pid}/adopt"), 409)
    for process in (pid, kept):
        assert mine.signal(process, "answer", body="Paris").status_code == 200
        assert mine.over(process)["result"] == "It is Paris."
    error_of(mine.post(f"processes/{pid}/fork", {"at": 10_000}), 400)


def test_the_same_key_makes_the_same_forks(mine: Processes, curious: str) -> None:
    pid = mine.spawn(curious, "Ask me.")
    mine.until(pid, "asking")
    body = {"n": 2, "key": "once"}
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: mine.post(f"processes/{pid}/fork", body), range(4)))
    made = {tuple(one["id"] for one in reply.json()["data"]) for reply in replies}
    assert (len(made), {reply.status_code for reply in replies}) == (1, {200})
    refusal = error_of(mine.post(f"processes/{pid}/fork", {"n": 1, "key": "once"}), 409)
    assert (refusal["code"], refusal["param"]) == ("conflict", "key")
    assert error_of(mine.post(f"processes/{pid}/fork", {"key": "two\nlines"}), 400)["param"] == "key"
    for one in (pid, *made.pop()):
        mine.signal(one, "kill")


def test_a_function_is_forked_and_only_what_is_behind_the_fork_is_done_anew(mine: Processes) -> None:
    pid = mine.spawn(mine.put(DECIDING))
    asking = mine.until(pid, "asking")
    assert mine.signal(pid, "answer", body="Paris").status_code == 200
    assert mine.over(pid)["result"] == ["Hello to you.", "Paris", "It is Paris."]
    (before, *_) = mine.post(f"processes/{pid}/fork", {"at": asking["events"]}).json()["data"]
    (last, *_) = mine.post(f"processes/{pid}/fork").json()["data"]
    mine.until(before["id"], "asking", last=str(asking["events"]))
    assert mine.signal(before["id"], "answer", body="Paris, again").status_code == 200
    assert mine.over(before["id"])["result"] == ["Hello to you.", "Paris, again", "It is Paris."]
    assert mine.over(last["id"])["result"] == ["Hello to you.", "Paris", "It is Paris."]
    for fork in (before["id"], last["id"]):
        asked = [one for one in mine.stream(fork) if one.kind == "model.intent" and one.data["pid"] == fork]
        assert len(asked) == 1, "the first answer is its past's"


def test_a_replay_folds_the_log_and_asks_another_model_the_same(live: Live, mine: Processes) -> None:
    pid = mine.spawn(mine.put(WEATHER), "How warm is it?")
    done = mine.over(pid)
    *answers, end = replayed(mine, pid, {})
    assert (end.kind, end.data["agrees"], end.data["state"]) == ("end", True, "done")
    assert end.data["events"] == done["events"]
    assert [one.data["then"]["text"] for one in answers] == ["", "21 degrees."]
    assert [call["name"] for call in answers[0].data["then"]["calls"]] == ["weather"]
    assert [one.data["now"] for one in answers] == [None, None]
    *again, _ = replayed(mine, pid, {"model": "demo"})
    assert [one.data["same"] for one in again] == [True, True]
    *others, _ = replayed(mine, pid, {"model": "other"})
    assert [one.data["same"] for one in others] == [False, False]
    assert others[1].data["now"]["text"] == "21 things."
    assert others[1].data["common_characters"] == len("21 ")
    assert mine.process(pid) == done
    error_of(mine.post(f"processes/{pid}/replay", {"model": "nowhere"}), 404)


def replayed(mine: Processes, pid: str, body: dict[str, Any]) -> list[Sent]:
    with mine.http.stream("POST", f"/v1/processes/{pid}/replay", json=body, headers=mine.headers) as reply:
        assert reply.status_code == 200
        return list(sent(reply.iter_lines()))


# --- who may


def test_another_project_finds_no_such_process(mine: Processes, others: Processes, plain: str, curious: str) -> None:
    pid = mine.spawn(plain)
    assert pid not in [one["id"] for one in others.get("processes").json()["data"]]
    assert others.get("processes", prefix=pid).json()["data"] == []
    for part in ("", "/events", "/tree", "/cost", "/verify", f"/segments/{'0' * 64}"):
        assert "no process" in error_of(others.get(f"processes/{pid}{part}"), 404)["message"]
    for part, body in (
        ("signals", {"signal": "kill"}),
        ("fork", {}),
        ("adopt", {}),
        ("replay", {}),
    ):
        error_of(others.post(f"processes/{pid}/{part}", body), 404)
    error_of(others.delete(f"processes/{pid}"), 404)
    error_of(others.post("processes", {"program": curious, "input": ""}), 404)
    assert mine.over(pid)["reason"] == "ok"


def test_a_reader_looks_and_changes_nothing(live: Live, mine: Processes, curious: str) -> None:
    reader = Processes(live.http, asyncio.run(reader_key(live.settings)))
    pid = mine.spawn(curious, "Ask me.")
    mine.until(pid, "asking")
    assert reader.process(pid)["asks"][0]["question"] == QUESTION
    assert reader.get(f"processes/{pid}/events", stream="false").status_code == 200
    for part in ("tree", "cost", "verify"):
        assert reader.get(f"processes/{pid}/{part}").status_code == 200
    assert "reader" in error_of(reader.signal(pid, "answer", body="Paris"), 403)["message"]
    for part in ("fork", "adopt", "replay"):
        error_of(reader.post(f"processes/{pid}/{part}"), 403)
    error_of(reader.delete(f"processes/{pid}"), 403)
    error_of(reader.post("processes", {"program": curious}), 403)
    assert mine.process(pid)["state"] == "asking"
    mine.signal(pid, "kill")


async def reader_key(settings: Settings) -> str:
    """Of somebody who was an admin when the key was made."""
    database = await Database.open(settings)
    accounts = await Accounts.open(database, owner=OwnerKey(secret=OWNER_SECRET, file=None))
    bob = await make_user(accounts, "bob@example.org", Role.ADMIN, project_id=DEFAULT_PROJECT)
    secret, _ = await make_key(accounts, owner_id=bob.id, grant=Grant(scopes=("admin",)))
    await accounts.change(LOCAL, lambda: people.update_user(bob.id, role=Role.READER))
    await accounts.close()
    await database.close()
    return secret


def test_what_a_watched_process_asks_is_interactive(live: Live, mine: Processes, curious: str) -> None:
    pid = mine.spawn(curious, "Ask me.")
    mine.until(pid, "asking")
    source = live.sources["demo"]
    assert source.asks[-1].ask_class == "agent"
    for one in mine.stream(pid, watch="true"):
        if one.kind == "proc.state" and one.data["body"]["to"] == "asking":
            assert mine.signal(pid, "answer", body="Paris").status_code == 200
    assert source.asks[-1].ask_class == "interactive"


# --- what is wrong is said


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"program": "nowhere"}, 404, "program"),
        ({"program": "plain", "model": "nowhere"}, 404, "model"),
        ({"program": "plain", "class": "idle"}, 400, "class"),
        ({"program": "plain", "budget": {"tokens": -1}}, 400, "budget.tokens"),
        ({"program": "plain", "budget": {"dollars": 1}}, 400, "budget"),
        ({"program": "plain", "name": "n" * 1_000}, 400, "name"),
        ({"program": "plain", "key": "k" * 1_000}, 400, "key"),
        ({"program": "plain", "inputs": "x"}, 400, "inputs"),
        ({"program": 7}, 400, "program"),
        ({}, 400, None),
    ],
)
def test_a_spawn_that_cannot_be_is_named(
    mine: Processes, plain: str, fields: dict[str, Any], status: int, param: str | None
) -> None:
    before = mine.get("processes", limit=1).json()["first_id"]
    assert error_of(mine.post("processes", fields), status)["param"] == param
    assert mine.get("processes", limit=1).json()["first_id"] == before


def test_the_same_key_spawns_one_process(mine: Processes, plain: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: mine.spawn(plain, key="once"), range(8)))
    assert len(made) == 1


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"signal": "child_exit"}, 400, "signal"),
        ({"signal": "message"}, 400, "body"),
        ({"signal": "pause", "body": 1}, 400, "body"),
        ({"signal": "top_up", "body": {}}, 400, "body"),
        ({"signal": "top_up", "body": {"tokens": 0}}, 400, "body"),
        ({"signal": "top_up", "body": {"tokens": "many"}}, 400, "body.tokens"),
        ({"signal": "kill", "id": ""}, 400, "id"),
        ({"signal": "kill", "id": "two\nlines"}, 400, "id"),
        ({"signal": "answer", "body": 1, "about": "a" * 1_000}, 400, "about"),
        ({}, 400, None),
    ],
)
def test_a_signal_that_cannot_be_is_named(
    mine: Processes, curious: str, fields: dict[str, Any], status: int, param: str | None
) -> None:
    pid = mine.spawn(curious, "Ask me.")
    mine.until(pid, "asking")
    assert error_of(mine.post(f"processes/{pid}/signals", fields), status)["param"] == param
    assert mine.process(pid)["state"] == "asking"
    mine.signal(pid, "kill")


@pytest.mark.parametrize(
    ("path", "query", "param"),
    [
        ("processes", {"limit": 0}, "limit"),
        ("processes", {"state": "asleep"}, "state"),
        ("processes", {"colour": "red"}, "colour"),
        ("processes/{pid}/events", {"after": "x"}, "after"),
        ("processes/{pid}/events", {"stream": "maybe"}, "stream"),
        ("processes/{pid}/events", {"stream": "false", "limit": 5_000}, "limit"),
    ],
)
def test_a_query_that_cannot_be_is_named(
    mine: Processes, plain: str, path: str, query: dict[str, Any], param: str
) -> None:
    pid = mine.spawn(plain)
    assert error_of(mine.get(path.replace("{pid}", pid), **query), 400)["param"] == param


def test_what_is_no_event_number_is_no_place_to_go_on_from(mine: Processes, plain: str) -> None:
    pid = mine.spawn(plain)
    reply = mine.http.get(f"/v1/processes/{pid}/events", headers={**mine.headers, "last-event-id": "abc"})
    assert error_of(reply, 400)["param"] == "Last-Event-ID"
    error_of(mine.get("processes/proc_nowhere"), 404)
    error_of(mine.get("processes/proc_nowhere/events"), 404)
