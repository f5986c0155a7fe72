"""Ollama's and DashScope's routes on real engine processes with tiny random models, and pulls from a hub made here."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ollama
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the package's own
    import dashscope
    from dashscope.api_entities.http_request import close_shared_sync_session

from nimbos.config import EngineSettings
from tests import tiny_gguf
from tests.hub.fake_hub import FakeHub
from tests.hub.fake_hub import running as hub_running
from tests.live import OWNER_SECRET, Live, serving, user

CHAT, EMBED, RANK = "tiny-qwen2-1", "tiny-qwen3-embedding-1", "tiny-qwen3-reranker-1"
DOCUMENTS = ["hello to you", "the man is in the world", "that is what we like", "no"]
GREEDY = {"temperature": 0, "num_predict": 6}
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def site() -> Iterator[FakeHub]:
    with hub_running() as hub:
        yield hub


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, site: FakeHub) -> Iterator[Live]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    models = tuple(tiny_gguf.write(arch, folder) for arch in ("qwen2", "qwen3-embedding", "qwen3-reranker"))
    engine = EngineSettings(threads=1, cells=4096, sequences=16)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_ENDPOINT", site.url)
        patched.delenv("HF_TOKEN", raising=False)
        with serving(folder / "home", models=models, engine=engine) as live:
            yield live


@pytest.fixture(scope="module")
def client(tiny: Live) -> Iterator[ollama.Client]:
    with ollama.Client(host=tiny.url, headers={"authorization": f"Bearer {OWNER_SECRET}"}, timeout=60) as official:
        yield official


@pytest.fixture(autouse=True)
def official(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dashscope, "base_http_api_url", f"{tiny.url}/api/v1")
    monkeypatch.setattr(dashscope, "api_key", OWNER_SECRET)
    yield
    close_shared_sync_session()


def generate(**fields: Any) -> Any:
    return dashscope.Generation.call(model=CHAT, messages=user("hello"), temperature=0, max_tokens=6, **fields)


# --- what both say is what OpenAI's route says


def test_all_dialects_say_the_same(tiny: Live, client: ollama.Client) -> None:
    body = {"model": CHAT, "messages": user("hello"), "temperature": 0, "max_tokens": 6}
    said = tiny.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert said
    assert client.chat(CHAT, messages=user("hello"), options=GREEDY).message.content == said
    assert client.generate(CHAT, "hello", options=GREEDY).response == said
    assert generate().output.text == said


def test_a_prompt_in_memory_counts_whole_and_is_told_as_cached(tiny: Live) -> None:
    body = {"model": CHAT, "messages": user("a beginning that both share " * 10), "options": GREEDY, "stream": False}
    first, second = tiny.post("/api/chat", body).json(), tiny.post("/api/chat", body).json()
    assert first["prompt_eval_count"] == second["prompt_eval_count"] > 20
    assert second["x_nimbos"]["cached_tokens"] > 20
    answer = dashscope.Generation.call(model=CHAT, messages=body["messages"], max_tokens=2, temperature=0)
    assert answer.usage.input_tokens == first["prompt_eval_count"]
    assert answer.usage.prompt_tokens_details["cached_tokens"] > 20


@pytest.mark.parametrize("top", [None, 0, 3])
def test_logprobs_are_the_same_in_both_dialects_streamed_and_whole(client: ollama.Client, top: int | None) -> None:
    fields: dict[str, Any] = {"messages": user("hello"), "options": GREEDY, "logprobs": True, "top_logprobs": top}
    whole = [(one.token, one.logprob) for one in client.chat(CHAT, **fields).logprobs or []]
    assert len(whole) == 6
    assert all(logprob <= 0 for _, logprob in whole)
    pieces = client.chat(CHAT, **fields, stream=True)
    assert [(one.token, one.logprob) for piece in pieces for one in piece.logprobs or []] == whole
    choice = generate(logprobs=True, top_logprobs=top).output.choices[0]
    assert [one["token"] for one in choice["logprobs"]["content"]] == [token for token, _ in whole]
    assert all(len(one["top_logprobs"]) == (top or 0) for one in choice["logprobs"]["content"])
    for incremental in (True, None):
        events = list(generate(logprobs=True, top_logprobs=top, stream=True, incremental_output=incremental))
        told = [event.output.choices[0].get("logprobs") or {"content": []} for event in events]
        content = [one for each in told for one in each["content"]] if incremental else told[-1]["content"]
        assert [one["token"] for one in content] == [token for token, _ in whole]


def test_a_schema_holds_in_both_dialects(client: ollama.Client) -> None:
    options = {"temperature": 0, "num_predict": 40}
    for answer in (
        client.chat(CHAT, messages=user("a colour"), format=SCHEMA, options=options).message.content,
        client.generate(CHAT, "a colour", format=SCHEMA, options=options).response,
        client.generate(CHAT, "a colour", format=SCHEMA, options=options, raw=True).response,
    ):
        assert json.loads(answer or "")["colour"] in ("red", "green")
    shape = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA}}
    answer = dashscope.Generation.call(model=CHAT, prompt="a colour", response_format=shape, max_tokens=40)
    assert json.loads(answer.output.text)["colour"] in ("red", "green")


def test_a_seed_repeats_the_answer(client: ollama.Client) -> None:
    options = {"temperature": 1.5, "num_predict": 8, "seed": 5}
    said = {client.generate(CHAT, "hello", options=options).response for _ in range(2)}
    assert len(said) == 1
    again = {client.generate(CHAT, "hello", options={**options, "seed": -1}).response for _ in range(4)}
    assert len(again) > 1


def test_a_suffix_is_filled_in_before(client: ollama.Client) -> None:
    answer = client.generate(CHAT, "def f(", suffix="return 1", options=GREEDY)
    assert answer.eval_count == 6
    assert answer.prompt_eval_count is not None
    assert answer.prompt_eval_count >= 3 + len("def freturn") / 4


# --- vectors


def test_embeddings_are_those_of_openais_route(tiny: Live, client: ollama.Client) -> None:
    listed = tiny.post("/v1/embeddings", {"model": EMBED, "input": ["one", "two"]}).json()
    vectors = [row["embedding"] for row in listed["data"]]
    made = client.embed(EMBED, ["one", "two"])
    assert [list(vector) for vector in made.embeddings] == [pytest.approx(vector) for vector in vectors]
    assert made.prompt_eval_count == listed["usage"]["prompt_tokens"]
    assert list(client.embeddings(EMBED, "one").embedding) == pytest.approx(vectors[0])
    reply = dashscope.TextEmbedding.call(model=EMBED, input=["one", "two"], text_type="document", output_type="dense")
    assert [row["text_index"] for row in reply.output["embeddings"]] == [0, 1]
    assert [row["embedding"] for row in reply.output["embeddings"]] == [pytest.approx(vector) for vector in vectors]
    assert reply.usage["total_tokens"] == listed["usage"]["prompt_tokens"]
    assert dashscope.TextEmbedding.call(model=EMBED, input="one").output["embeddings"][0]["text_index"] == 0


def test_vectors_can_be_shortened_to_length_one(client: ollama.Client) -> None:
    (short,) = client.embed(EMBED, "one", dimensions=16).embeddings
    assert len(short) == 16
    assert math.isclose(sum(value * value for value in short), 1, rel_tol=1e-4)
    reply = dashscope.TextEmbedding.call(model=EMBED, input="one", dimension=16)
    assert reply.output["embeddings"][0]["embedding"] == pytest.approx(list(short))


def test_vectors_that_cannot_be_made_are_refused(tiny: Live, client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="dimensions"):
        client.embed(EMBED, "one", dimensions=100_000)
    for parameters, named in (
        ({"dimension": 0}, "parameters.dimension"),
        ({"output_type": "sparse"}, "parameters.output_type"),
        ({"instruct": "find"}, "parameters.instruct"),
        ({"text_type": "song"}, "parameters.text_type"),
    ):
        reply = dashscope.TextEmbedding.call(model=EMBED, input="one", **parameters)
        assert (reply.status_code, reply.code) == (400, "InvalidParameter")
        assert named in reply.message
    long = "word " * 5_000
    response = tiny.post("/api/embed", {"model": EMBED, "input": long, "truncate": True})
    assert response.status_code == 400
    assert "10003 tokens" in response.json()["error"]


# --- ranks


def rank(**fields: Any) -> Any:
    return dashscope.TextReRank.call(model=RANK, query="what do we like", documents=DOCUMENTS, **fields)


def test_documents_come_by_how_well_they_answer(tiny: Live) -> None:
    reply = rank()
    results = reply.output.results
    scores = [result.relevance_score for result in results]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert {result.index for result in results} == set(range(len(DOCUMENTS)))
    assert all(result["document"] is None for result in results)
    assert reply.usage["total_tokens"] > 0
    assert reply.request_id == reply.headers["x-nimbos-ask-id"]
    best = rank(top_n=2, return_documents=True).output.results
    assert [result.index for result in best] == [result.index for result in results[:2]]
    assert [result["document"]["text"] for result in best] == [DOCUMENTS[result.index] for result in best]


def test_ranks_that_cannot_be_made_are_refused(client: ollama.Client) -> None:
    for fields, named in (
        ({"top_n": 0}, "parameters.top_n"),
        ({"instruct": "find"}, "parameters.instruct"),
    ):
        reply = rank(**fields)
        assert (reply.status_code, reply.code) == (400, "InvalidParameter")
        assert named in reply.message
    pictures: list[Any] = [{"image": "https://example.com/a.png"}]
    reply = dashscope.TextReRank.call(model=RANK, query="a", documents=pictures)
    assert "input.documents[0]" in reply.message
    assert dashscope.TextReRank.call(model=CHAT, query="a", documents=["b"]).code == "InvalidParameter"
    assert client.show(RANK).capabilities == ["rerank"]


# --- models


def test_a_file_is_shown_with_what_clients_look_for(client: ollama.Client) -> None:
    shown = client.show(CHAT)
    assert shown.capabilities is not None
    assert set(shown.capabilities) >= {"completion", "tools"}
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "qwen2"
    assert shown.modelinfo["qwen2.context_length"] == 4096
    assert shown.template == tiny_gguf.CHATML
    assert shown.details is not None
    assert (shown.details.format, shown.details.family, shown.details.quantization_level) == ("gguf", "qwen2", "F32")
    assert client.show(EMBED).capabilities == ["embedding"]


def test_what_is_loaded_is_listed_and_cannot_be_removed(client: ollama.Client) -> None:
    client.generate(CHAT, "hi", options={"num_predict": 1})
    loaded = {model.model: model for model in client.ps().models}
    assert CHAT in loaded
    assert loaded[CHAT].size
    assert loaded[CHAT].context_length == 4096
    with pytest.raises(ollama.ResponseError, match="is loaded") as caught:
        client.delete(CHAT)
    assert caught.value.status_code == 409


# --- pulls


def test_a_model_is_pulled_with_its_progress_shown_and_removed(
    client: ollama.Client, site: FakeHub, tmp_path: Path
) -> None:
    content = tiny_gguf.write("qwen3", tmp_path).read_bytes()
    source = site.add("owner/repo/model.gguf", content)
    told = list(client.pull(source, stream=True))
    assert told[0].status == "pulling manifest"
    assert told[-1].status == "success"
    counted = [progress for progress in told if progress.total]
    assert counted
    assert {progress.total for progress in counted} == {len(content)}
    assert counted[-1].completed == len(content)
    assert source in {model.model for model in client.list().models}
    assert client.generate(source, "hi", options={"num_predict": 2}).eval_count == 2
    other = site.add("owner/repo/other.gguf", content)
    assert client.pull(other).status == "success"
    assert client.delete(other).status == "success"
    assert other not in {model.model for model in client.list().models}


def test_who_fetched_and_removed_a_model_is_in_the_audit_log(
    tiny: Live, client: ollama.Client, site: FakeHub, tmp_path: Path
) -> None:
    content = tiny_gguf.write("qwen3", tmp_path).read_bytes()
    source = site.add("owner/repo/noted.gguf", content)
    list(client.pull(source, stream=True))
    client.pull(source)  # it is there: that changes nothing
    client.delete(source)
    client.pull(source)
    client.delete(source)
    with pytest.raises(ollama.ResponseError):
        client.delete(source)
    log = tiny.http.get("/v1/organization/audit_logs", params={"resource_ids[]": source}).json()["data"]
    assert [entry["x_nimbos"]["action"] for entry in log] == ["model.removed", "model.pulled"] * 2
    for removed, pulled in (log[:2], log[2:]):
        facts = pulled["x_nimbos"]["after"]
        assert (facts["sha256"], facts["size_bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
        assert removed["x_nimbos"]["before"] == facts
        assert pulled["x_nimbos"]["before"] is removed["x_nimbos"]["after"] is None
        assert {entry["actor"]["api_key"]["id"] for entry in (removed, pulled)} == {"key_owner"}
        assert {entry["type"] for entry in (removed, pulled)} == {"organization.updated"}
    assert tiny.http.get("/v1/organization/audit_logs/verify").json()["problem"] is None


def test_a_pull_that_fails_is_told(client: ollama.Client, site: FakeHub) -> None:
    with pytest.raises(ollama.ResponseError, match=r"none\.gguf \(answered 404\)"):
        list(client.pull("hf:owner/repo/none.gguf", stream=True))
    source = site.add("owner/repo/broken.gguf", b"no model at all, " * 100)
    with pytest.raises(ollama.ResponseError):
        list(client.pull(source, stream=True))
    with pytest.raises(ollama.ResponseError) as caught:
        client.pull(source)
    assert caught.value.status_code == 422
    assert source not in {model.model for model in client.list().models}
