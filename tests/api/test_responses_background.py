"""Responses in the background: polled, streamed, resumed, cancelled, and finished by the next server."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path
from typing import Any

import openai
import pytest

from nimbos.accounts import Accounts, keys
from nimbos.accounts.words import LOCAL, Changed, Key
from nimbos.api import responses_items
from nimbos.config import Settings
from nimbos.db import Database, Transaction
from nimbos.responses import background, nodes
from tests.api.responses_events import ENDS, events_of, whole
from tests.api.test_up import up
from tests.conftest import DEMO
from tests.ledger.books import METERS
from tests.live import PATIENCE_S, Live, error_of, serving, write_script

WORDS = 40
SLOW = {"default": {"text": " ".join(f"word{number}" for number in range(WORDS)), "tokens_per_second": 10}}


def begin(live: Live, text: str = "count", **fields: Any) -> Any:
    return live.client.responses.create(model="demo", input=text, background=True, **fields)


def ended(live: Live, response_id: str) -> Any:
    """The response once it is over: its stream ends then."""
    for _ in live.client.responses.retrieve(response_id, stream=True):
        pass
    return live.client.responses.retrieve(response_id)


def test_it_is_queued_and_then_there(live: Live) -> None:
    response = begin(live)
    assert (response.status, response.background, response.output) == ("queued", True, [])
    finished = ended(live, response.id)
    assert (finished.status, finished.output_text) == ("completed", "one, two, three, four")
    assert finished.usage.output_tokens == 7
    assert finished.created_at == response.created_at


def test_its_events_are_those_of_any_answer(live: Live) -> None:
    fields = {"model": "demo", "input": "please think", "reasoning": {"effort": "low"}}
    plain = events_of(live.post("/v1/responses", {**fields, "stream": True}))
    behind = events_of(live.post("/v1/responses", {**fields, "stream": True, "background": True}))
    kinds = [event["type"] for event in behind]
    assert kinds.pop(1) == "response.queued"
    assert kinds == [event["type"] for event in plain]
    again = events_of(live.http.get(f"/v1/responses/{behind[0]['response']['id']}?stream=true"))
    assert again == behind
    assert whole(live.http.get(f"/v1/responses/{behind[0]['response']['id']}")) == behind[-1]["response"]


def test_a_stream_that_broke_off_goes_on_where_it_was(live: Live) -> None:
    stream = begin(live, "endless", stream=True, max_output_tokens=100)
    seen = [event for event, _ in zip(stream, range(30), strict=False)]
    stream.close()
    rest = list(
        live.client.responses.retrieve(seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number)
    )
    numbers = [event.sequence_number for event in (*seen, *rest)]
    assert numbers == list(range(len(numbers)))
    said = "".join(event.delta for event in (*seen, *rest) if event.type == "response.output_text.delta")
    last = rest[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == said == ("on and " * 50).strip()


def test_it_can_be_cancelled_once_and_stays_so(live: Live) -> None:
    source = live.sources["demo"]
    while source.ended.acquire(blocking=False):
        pass
    response = begin(live, "endless")
    stream = live.client.responses.retrieve(response.id, stream=True)
    for event in stream:
        if event.type == "response.output_text.delta":
            break
    cancelled = live.client.responses.cancel(response.id)
    assert cancelled.status == "cancelled"
    assert source.ended.acquire(timeout=PATIENCE_S)  # the ask itself has ended
    last = list(stream)[-1]
    assert last.type == "response.incomplete"
    assert last.response.status == "cancelled"
    assert live.client.responses.cancel(response.id).status == "cancelled"
    assert live.client.responses.retrieve(response.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="no answer"):
        live.client.responses.create(model="demo", input="hi", previous_response_id=response.id)


def test_cancel_and_completion_that_race_end_in_one_of_the_two(live: Live) -> None:
    for _ in range(20):
        response = begin(live)
        status = live.client.responses.cancel(response.id).status
        assert status in ("cancelled", "completed")
        assert ended(live, response.id).status == status


def test_what_is_over_is_not_cancelled_and_what_had_a_connection_cannot_be(live: Live) -> None:
    done = ended(live, begin(live).id)
    assert live.client.responses.cancel(done.id).status == "completed"
    plain = live.client.responses.create(model="demo", input="hi")
    assert error_of(live.post(f"/v1/responses/{plain.id}/cancel", None), 400)["param"] == "response_id"
    assert error_of(live.http.get(f"/v1/responses/{plain.id}?stream=true"), 400)["param"] == "stream"


def test_a_deleted_one_is_stopped_and_its_readers_end(live: Live) -> None:
    source = live.sources["demo"]
    while source.ended.acquire(blocking=False):
        pass
    response = begin(live, "endless")
    stream = live.client.responses.retrieve(response.id, stream=True)
    next(event for event in stream if event.type == "response.output_text.delta")
    live.client.responses.delete(response.id)
    assert source.ended.acquire(timeout=PATIENCE_S)
    assert not [event for event in stream if event.type in ENDS]
    with pytest.raises(openai.NotFoundError):
        live.client.responses.retrieve(response.id)


def test_a_past_that_is_still_being_made_cannot_be_gone_on_from(live: Live) -> None:
    response = begin(live, "endless")
    with pytest.raises(openai.ConflictError, match="wait for its end"):
        live.client.responses.create(model="demo", input="hi", previous_response_id=response.id)
    live.client.responses.cancel(response.id)


def test_a_failure_is_an_end_with_its_reason(live: Live) -> None:
    response = begin(live, "word " * 40_000)
    failed = ended(live, response.id)
    assert failed.status == "failed"
    assert failed.error.code == "invalid_prompt"
    assert "40000" in failed.error.message
    events = events_of(live.http.get(f"/v1/responses/{response.id}?stream=true"))
    assert [event["type"] for event in events] == ["response.created", "response.queued", "response.failed"]


def test_chains_and_conversations_go_on_behind_it(live: Live) -> None:
    conversation = live.client.conversations.create(items=[{"role": "user", "content": "earlier"}])
    response = ended(live, begin(live, conversation=conversation.id).id)
    said = [item.content[0].text for item in live.client.conversations.items.list(conversation.id, order="asc")]  # type: ignore[union-attr,index]
    assert said == ["earlier", "count", "one, two, three, four"]
    second = ended(live, begin(live, "json", previous_response_id=response.id).id)
    assert second.output_text == '{"answer": 42}'
    assert len(list(live.client.responses.input_items.list(second.id))) == 4


def test_a_conversation_that_is_answered_without_an_input_has_each_item_once(live: Live) -> None:
    conversation = live.client.conversations.create()
    for word in ("count", "json"):
        live.client.conversations.items.create(conversation.id, items=[{"role": "user", "content": word}])
        response = live.client.responses.create(model="demo", conversation=conversation.id, background=True)
        ended(live, response.id)
    said = [item.content[0].text for item in live.client.conversations.items.list(conversation.id, order="asc")]  # type: ignore[union-attr,index]
    assert said == ["count", "one, two, three, four", "json", '{"answer": 42}']


def test_many_at_once_each_end_once(live: Live) -> None:
    begun = [begin(live) for _ in range(40)]
    assert {ended(live, response.id).output_text for response in begun} == {"one, two, three, four"}


def test_a_project_that_queues_much_keeps_no_other_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_PLACES", 2)
    home = tmp_path / "home"
    home.mkdir()
    (home / "keys.toml").write_text('[keys.other]\nkey = "nb-other"\naccount = "other"\n')
    with (
        serving(home, {"demo": DEMO}) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="nb-other", max_retries=0, timeout=PATIENCE_S) as other,
    ):
        running = [begin(live, "endless") for _ in range(2)]
        for response in running:
            with live.client.responses.retrieve(response.id, stream=True) as stream:
                next(event for event in stream if event.type == "response.output_text.delta")
        waiting = [begin(live, "endless") for _ in range(2)]
        theirs = other.responses.create(model="demo", input="count", background=True)
        live.client.responses.cancel(running[0].id)
        for _ in other.responses.retrieve(theirs.id, stream=True):
            pass
        first, second, third, *_ = [ask.account for ask in live.sources["demo"].asks]
        assert first == second != third
        for response in (running[1], *waiting):
            live.client.responses.cancel(response.id)


def test_one_that_a_server_did_not_finish_is_finished_by_the_next(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with serving(home, {"demo": SLOW}, database_url="") as live:
        stream = begin(live, stream=True)
        seen = []
        for event in stream:
            seen.append(event)
            if len(seen) == 12:
                break
        threading.Thread(target=stream.close).start()
    response_id = seen[0].response.id
    with serving(home, {"demo": {"default": {"text": SLOW["default"]["text"]}}}, database_url="") as live:
        rest = list(live.client.responses.retrieve(response_id, stream=True, starting_after=11))
        assert [event.sequence_number for event in (*seen, *rest)] == list(range(len(seen) + len(rest)))
        final = live.client.responses.retrieve(response_id)
        assert final.status == "completed"
        assert final.output_text == SLOW["default"]["text"]
        said = "".join(event.delta for event in (*seen, *rest) if event.type == "response.output_text.delta")
        assert said == final.output_text
        asked = [ask.id for ask in live.sources["demo"].asks]
        settings = live.settings
    assert final.usage.output_tokens == WORDS
    check_paid(settings, final.usage, asked)


def test_one_whose_key_was_revoked_meanwhile_is_asked_no_more(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with serving(home, {"demo": SLOW}, database_url="") as live:
        made = live.post("/v1/organization/projects/proj_default/api_keys", {"name": "laptop"}).json()
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key=made["value"], max_retries=0) as client:
            response = client.responses.create(model="demo", input="hi", background=True)
            with client.responses.retrieve(response.id, stream=True) as stream:
                next(event for event in stream if event.type == "response.output_text.delta")
        settings = live.settings
    asyncio.run(revoke(settings, made["id"]))
    with serving(home, {"demo": SLOW}, database_url="") as live:
        failed = ended(live, response.id)
        assert (failed.status, failed.output_text) == ("failed", "")
        assert "revoked" in failed.error.message
        assert live.sources["demo"].asks == []


async def revoke(settings: Settings, key_id: str) -> None:
    def change() -> Transaction[Changed[Key]]:
        return (yield from keys.revoke_key((yield from keys.key_of(None, key_id))))

    database = await Database.open(settings)
    try:
        accounts = await Accounts.open(database)
        await accounts.change(LOCAL, change)
        await accounts.close()
    finally:
        await database.close()


def test_an_answer_that_fills_its_context_is_kept_and_the_next_turn_refused(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (nodes, responses_items):
        monkeypatch.setattr(module, "ITEMS_MAX", 2)
    full = [{"role": "user", "content": "earlier"}, {"role": "user", "content": "count"}]
    response = live.client.responses.create(model="demo", input=full, background=True)  # type: ignore[arg-type]
    finished = ended(live, response.id)
    assert (finished.status, finished.output_text) == ("completed", "one, two, three, four")
    plain = live.client.responses.create(model="demo", input=full)  # type: ignore[arg-type]
    asked = len(live.sources["demo"].asks)
    for before in (response.id, plain.id):
        with pytest.raises(openai.BadRequestError, match="2 items"):
            live.client.responses.create(model="demo", input="more", previous_response_id=before)
    assert len(live.sources["demo"].asks) == asked


def test_items_of_a_conversation_that_grew_beyond_the_bound_can_be_taken_away(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [{"type": "message", "role": "user", "content": word} for word in ("one", "two", "three", "four")]
    conversation = live.client.conversations.create(items=said)  # type: ignore[arg-type]
    monkeypatch.setattr(nodes, "ITEMS_MAX", 2)
    first, *_ = live.client.conversations.items.list(conversation.id)
    live.client.conversations.items.delete(first.id, conversation_id=conversation.id)
    assert len(list(live.client.conversations.items.list(conversation.id))) == 3


@pytest.mark.long  # the dead server's lease has to run out
def test_one_whose_server_was_killed_is_finished_by_the_next(tmp_path: Path) -> None:
    arguments = ("--model", f"scripted:{write_script(tmp_path, 'demo', SLOW)}")
    with up(tmp_path / "home", *arguments, NIMBOS_API_KEY="nb-test") as first:
        client = openai.OpenAI(base_url=f"{first.url}/v1", api_key="nb-test", max_retries=0)
        response = client.responses.create(model="demo", input="hi", background=True)
        stream = client.responses.retrieve(response.id, stream=True)
        next(event for event in stream if event.type == "response.output_text.delta")
        assert first.stop(signal.SIGKILL) == -signal.SIGKILL
        stream.close()
    with up(tmp_path / "home", *arguments, NIMBOS_API_KEY="nb-test") as second:
        client = openai.OpenAI(base_url=f"{second.url}/v1", api_key="nb-test", max_retries=0)
        events = list(client.responses.retrieve(response.id, stream=True))
        assert [event.type for event in events if event.type in ENDS] == ["response.completed"]
        final = client.responses.retrieve(response.id)
        assert final.output_text == SLOW["default"]["text"]
    check_paid(Settings(home=str(tmp_path / "home")), final.usage, [])


def check_paid(settings: Settings, told: Any, last: list[str]) -> None:
    """The answer was begun twice, and was paid for once: what is told is what both asks have paid together."""
    rows = asyncio.run(meters_of(settings))
    used: dict[str, dict[str, int]] = {}
    for row in rows:
        used.setdefault(row["ask"], {})[row["meter"]] = row["quantity"]
    assert len(used) == 2
    both = {meter: sum(meters.get(meter, 0) for meters in used.values()) for meter in ("input", "output", "recomputed")}
    assert (both["input"], both["output"]) == (told.input_tokens, told.output_tokens)
    first = min(used)
    assert used[first]["output"] > 0
    assert both["recomputed"] >= used[first]["output"]
    assert not last or set(last) == used.keys() - {first}


async def meters_of(settings: Settings) -> list[Any]:
    database = await Database.open(settings)
    try:
        return list(await database.read(METERS()))
    finally:
        await database.close()
