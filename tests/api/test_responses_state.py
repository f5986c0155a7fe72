"""Stored responses and conversations over HTTP, with the official client: chains, pages, owners, deletes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest

from nimbos.config import EngineSettings, ServerSettings
from nimbos.responses import nodes
from tests import tiny_gguf
from tests.api.responses_events import events_of, texts, whole
from tests.conftest import DEMO
from tests.live import PATIENCE_S, Live, error_of, serving

TINY = "tiny-qwen2-1"
OTHER_SECRET = "nb-test-other-project"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that two projects use, with the scripted model and one of the engine's."""
    folder: Path = tmp_path_factory.mktemp("shared")
    home = folder / "home"
    home.mkdir()
    (home / "keys.toml").write_text(f'[keys.other]\nkey = "{OTHER_SECRET}"\naccount = "other"\n')
    engine = EngineSettings(threads=1, cells=4096, sequences=16)
    with serving(home, {"demo": DEMO}, models=(tiny_gguf.write("qwen2", folder),), engine=engine) as running:
        yield running


@pytest.fixture
def other(shared: Live) -> Iterator[openai.OpenAI]:
    """The client of another project."""
    with openai.OpenAI(base_url=f"{shared.url}/v1", api_key=OTHER_SECRET, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def say(live: Live, text: str, **fields: Any) -> Any:
    return live.client.responses.create(model="demo", input=text, **fields)


def test_what_was_answered_can_be_retrieved_as_it_was(live: Live) -> None:
    for fields in (
        {"input": "count"},
        {"input": "please think", "reasoning": {"effort": "low"}, "metadata": {"a": "b"}},
    ):
        told = whole(live.post("/v1/responses", {"model": "demo", **fields}))
        assert whole(live.http.get(f"/v1/responses/{told['id']}")) == told
    streamed = events_of(live.post("/v1/responses", {"model": "demo", "input": "count", "stream": True}))[-1][
        "response"
    ]
    assert whole(live.http.get(f"/v1/responses/{streamed['id']}")) == streamed


def test_the_last_event_comes_when_the_response_is_kept(live: Live) -> None:
    for _ in range(10):
        stream = live.client.responses.create(model="demo", input="count", stream=True)
        for event in stream:
            if event.type == "response.completed":
                assert live.client.responses.retrieve(event.response.id).output_text == "one, two, three, four"


def test_a_chain_remembers(live: Live) -> None:
    first = say(live, "hi")
    second = say(live, "count", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    third = say(live, "json", previous_response_id=second.id)
    items = list(live.client.responses.input_items.list(third.id, order="asc", limit=2))  # in pages of two
    said = [item.content[0].text for item in items]  # type: ignore[union-attr]
    assert said == ["hi", "Hello there, friend!", "count", "one, two, three, four", "json"]
    backwards = [item.id for item in live.client.responses.input_items.list(third.id)]
    assert backwards == [item.id for item in reversed(items)]
    page = live.http.get(f"/v1/responses/{third.id}/input_items?limit=2&order=asc&after={items[0].id}").json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == (items[1].id, items[2].id, True)


def test_the_next_turn_finds_its_past_in_the_engines_cache(shared: Live) -> None:
    fields: Any = {"model": TINY, "temperature": 0, "max_output_tokens": 16, "instructions": "You are a test."}
    response = shared.client.responses.create(**fields, input="hello world and all that is in it")
    for _ in range(3):
        before = response.usage
        response = shared.client.responses.create(**fields, input="go on", previous_response_id=response.id)
        assert response.usage is not None
        assert before is not None
        assert response.usage.input_tokens_details.cached_tokens >= before.input_tokens


def test_what_is_told_is_what_the_ledger_has(shared: Live) -> None:
    yesterday = int(time.time()) - 86_400

    def total() -> dict[str, int]:
        reply = shared.http.get(f"/v1/organization/usage/completions?start_time={yesterday}")
        results = [result for bucket in reply.json()["data"] for result in bucket["results"]]
        names = ("input_tokens", "input_cached_tokens", "output_tokens")
        return {name: sum(result[name] for result in results) for name in names}

    before = total()
    response = shared.client.responses.create(model=TINY, input="hello hello hello", max_output_tokens=9)
    after = total()
    assert response.usage is not None
    assert {name: after[name] - before[name] for name in after} == {
        "input_tokens": response.usage.input_tokens,
        "input_cached_tokens": response.usage.input_tokens_details.cached_tokens,
        "output_tokens": 9,
    }


def test_nothing_is_kept_of_a_response_that_is_not_stored(live: Live) -> None:
    response = say(live, "words that nobody keeps", store=False)
    with pytest.raises(openai.NotFoundError):
        live.client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError):
        say(live, "hi", previous_response_id=response.id)
    written = [file for file in Path(live.settings.home).rglob("*") if file.is_file()]
    assert all(b"words that nobody keeps" not in file.read_bytes() for file in written if not file.is_socket())


def test_what_was_deleted_is_gone(live: Live) -> None:
    first = say(live, "hi")
    second = say(live, "count", previous_response_id=first.id)
    live.client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        live.client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        live.client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        say(live, "hi", previous_response_id=first.id)
    third = say(live, "json", previous_response_id=second.id)  # whose past is its own
    items = list(live.client.responses.input_items.list(third.id))
    assert len(items) == 5


def test_deletes_and_turns_that_race_end_in_one_of_the_two(live: Live) -> None:
    first = say(live, "hi")

    def delete() -> int:
        return live.http.delete(f"/v1/responses/{first.id}").status_code

    def go_on() -> int:
        body = {"model": "demo", "input": "count", "previous_response_id": first.id}
        return live.post("/v1/responses", body).status_code

    with ThreadPoolExecutor(16) as pool:
        deletes = [pool.submit(delete) for _ in range(8)]
        turns = [pool.submit(go_on) for _ in range(8)]
    assert sorted(one.result() for one in deletes) == [200, *[404] * 7]
    assert {one.result() for one in turns} <= {200, 404}


def test_another_project_finds_none_of_it(shared: Live, other: openai.OpenAI) -> None:
    response = say(shared, "mine")
    conversation = shared.client.conversations.create(items=[{"role": "user", "content": "secret"}])
    item = next(iter(shared.client.conversations.items.list(conversation.id)))
    tries = (
        lambda: other.responses.retrieve(response.id),
        lambda: other.responses.delete(response.id),
        lambda: other.responses.cancel(response.id),
        lambda: other.responses.input_items.list(response.id),
        lambda: other.responses.create(model="demo", input="hi", previous_response_id=response.id),
        lambda: other.responses.create(model="demo", input="hi", conversation=conversation.id),
        lambda: other.responses.create(model="demo", input=[{"type": "item_reference", "id": item.id or ""}]),
        lambda: other.responses.compact(model="demo", previous_response_id=response.id),
        lambda: other.responses.input_tokens.count(model="demo", previous_response_id=response.id),
        lambda: other.conversations.retrieve(conversation.id),
        lambda: other.conversations.update(conversation.id, metadata={}),
        lambda: other.conversations.delete(conversation.id),
        lambda: other.conversations.items.list(conversation.id),
        lambda: other.conversations.items.create(conversation.id, items=[{"role": "user", "content": "x"}]),
        lambda: other.conversations.items.retrieve(item.id or "", conversation_id=conversation.id),
        lambda: other.conversations.items.delete(item.id or "", conversation_id=conversation.id),
    )
    for attempt in tries:
        with pytest.raises(openai.NotFoundError):
            attempt()
    assert shared.client.responses.retrieve(response.id).output_text
    assert len(list(shared.client.conversations.items.list(conversation.id))) == 1


def test_a_conversation_collects_what_is_said(live: Live) -> None:
    conversation = live.client.conversations.create(
        items=[{"role": "developer", "content": "Be kind."}], metadata={"topic": "test"}
    )
    assert conversation.metadata == {"topic": "test"}
    response = say(live, "hi", conversation=conversation.id)
    assert response.conversation is not None
    assert response.conversation.id == conversation.id
    say(live, "count", conversation={"id": conversation.id})
    said = [item.content[0].text for item in live.client.conversations.items.list(conversation.id, order="asc")]  # type: ignore[union-attr,index]
    assert said == ["Be kind.", "hi", "Hello there, friend!", "count", "one, two, three, four"]
    live.sources["demo"].asks.clear()
    say(live, "json", conversation=conversation.id)
    (sent,) = live.sources["demo"].asks
    assert all(text in "".join(part.text for part in sent.parts) for text in said)  # type: ignore[union-attr]


def test_conversations_and_their_items_are_made_changed_and_deleted(live: Live) -> None:
    conversations = live.client.conversations
    made = conversations.create()
    assert conversations.retrieve(made.id) == made
    assert conversations.update(made.id, metadata={"a": "b"}).metadata == {"a": "b"}
    added = conversations.items.create(
        made.id,
        items=[{"role": "user", "content": "one"}, {"type": "message", "role": "assistant", "content": "two"}],  # type: ignore[list-item]
    )
    first, second = added.data
    assert first.id is not None
    got = conversations.items.retrieve(first.id, conversation_id=made.id)
    assert got.type == "message"
    assert got.content[0].to_dict() == {"type": "input_text", "text": "one"}
    conversations.items.delete(first.id, conversation_id=made.id)
    assert [item.id for item in conversations.items.list(made.id)] == [second.id]
    with pytest.raises(openai.NotFoundError):
        conversations.items.retrieve(first.id, conversation_id=made.id)
    assert conversations.delete(made.id).deleted
    for attempt in (conversations.retrieve, conversations.delete, conversations.items.list):
        with pytest.raises(openai.NotFoundError):
            attempt(made.id)


def test_an_answer_that_failed_adds_nothing_to_its_conversation(live: Live) -> None:
    conversation = live.client.conversations.create()
    with pytest.raises(openai.BadRequestError):
        say(live, "word " * 40_000, conversation=conversation.id)
    assert list(live.client.conversations.items.list(conversation.id)) == []


def test_a_conversation_goes_on_from_what_was_compacted(live: Live) -> None:
    talk: Any = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "count"}]
    compacted = live.client.responses.compact(model="demo", input=talk)
    assert [item.type for item in compacted.output] == ["compaction"]
    assert compacted.usage.output_tokens > 0
    live.sources["demo"].asks.clear()
    given: Any = [*(item.to_dict() for item in compacted.output), {"role": "user", "content": "json"}]
    response = live.client.responses.create(model="demo", input=given)
    assert response.output_text == '{"answer": 42}'
    (sent,) = live.sources["demo"].asks
    prompt = "".join(part.text for part in sent.parts)  # type: ignore[union-attr]
    assert "Hello there, friend!" in prompt  # the summary, as the scripted model wrote it
    assert "Be kind." in prompt
    assert "count" not in prompt
    chained = live.client.responses.compact(model="demo", previous_response_id=response.id)
    assert chained.object == "response.compaction"
    assert error_of(live.post("/v1/responses/compact", {"model": "demo"}), 400)["param"] == "input"


def test_what_instructs_the_model_stays_word_for_word_however_often_it_is_compacted(live: Live) -> None:
    given: Any = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "count"}]
    for more in ("Be brief.", "Be glad."):
        compacted = live.client.responses.compact(model="demo", input=given)
        given = [*(item.to_dict() for item in compacted.output), {"role": "developer", "content": more}]
        given.append({"role": "user", "content": "json"})
    live.sources["demo"].asks.clear()
    live.client.responses.create(model="demo", input=given)
    (sent,) = live.sources["demo"].asks
    prompt = "".join(part.text for part in sent.parts)  # type: ignore[union-attr]
    assert {prompt.count(text) for text in ("Be kind.", "Be brief.", "Be glad.", "Hello there, friend!")} == {1}


def test_what_cannot_be_kept_is_refused_before_it_is_computed(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = live.client.conversations.create()
    monkeypatch.setattr(nodes, "BYTES_MAX", 200)
    asks = live.sources["demo"].asks
    asks.clear()
    large = "count " * 100
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"stream": True},
        {"background": True},
        {"store": False, "conversation": conversation.id},
    )
    for way in ways:
        reply = live.post("/v1/responses", {"model": "demo", "input": large, **way})
        assert "200 bytes" in error_of(reply, 400)["message"]
    assert asks == []
    assert say(live, large, store=False).output_text == "one, two, three, four"
    kept = say(live, "count")  # whose answer goes beyond
    assert live.client.responses.retrieve(kept.id).output_text == "one, two, three, four"
    with pytest.raises(openai.BadRequestError, match="Start another one"):
        say(live, "more", previous_response_id=kept.id)
    assert len(asks) == 2


def test_a_project_that_keeps_too_much_is_told_what_to_do(tmp_path: Path) -> None:
    with serving(tmp_path / "home", {"demo": DEMO}, server=ServerSettings(responses_bytes=3_000)) as live:
        assert say(live, "count").output_text
        asks = live.sources["demo"].asks
        asks.clear()
        for path, body in (
            ("/v1/responses", {"model": "demo", "input": "count"}),
            ("/v1/responses", {"model": "demo", "input": "count", "background": True}),
            ("/v1/conversations", {}),
        ):
            error = error_of(live.post(path, body), 413)
            assert error["code"] == "payload_too_large"
            assert "Delete some of them" in error["message"]
        assert asks == []
        assert say(live, "count", store=False).output_text


def test_a_project_that_keeps_too_much_is_told_so_also_by_the_next_server(tmp_path: Path) -> None:
    def serve() -> AbstractContextManager[Live]:
        return serving(tmp_path / "home", {"demo": DEMO}, server=ServerSettings(responses_bytes=3_000), database_url="")

    with serve() as live:
        assert say(live, "count").output_text
    with serve() as live:
        error_of(live.post("/v1/responses", {"model": "demo", "input": "count"}), 413)
        assert live.sources["demo"].asks == []


def test_state_outlives_the_server(tmp_path: Path) -> None:
    with serving(tmp_path / "home", {"demo": DEMO}, database_url="") as live:
        told = whole(live.post("/v1/responses", {"model": "demo", "input": "count"}))
        conversation = live.client.conversations.create(items=[{"role": "user", "content": "hi"}])
    with serving(tmp_path / "home", {"demo": DEMO}, database_url="") as live:
        assert whole(live.http.get(f"/v1/responses/{told['id']}")) == told
        assert len(list(live.client.conversations.items.list(conversation.id))) == 1
        body = {"model": "demo", "input": "json", "previous_response_id": told["id"]}
        assert texts(whole(live.post("/v1/responses", body))) == ['{"answer": 42}']
