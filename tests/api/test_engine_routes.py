"""The routes on real engine processes with tiny random models: what the scripted model cannot show."""

from __future__ import annotations

import base64
import json
import math
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from nimbos.config import EngineSettings, ServerSettings
from nimbos.engine import Engine
from tests import tiny_gguf
from tests.live import Live, error_of, serving, user

CHAT, EMBED = "tiny-qwen2-1", "tiny-qwen3-embedding-1"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    models = (tiny_gguf.write("qwen2", folder), tiny_gguf.write("qwen3-embedding", folder))
    engine = EngineSettings(threads=1, cells=4096, sequences=16)
    with serving(folder / "home", models=models, engine=engine) as running:
        yield running


def greedy(live: Live, **fields: Any) -> Any:
    body = {"model": CHAT, "messages": user("hello world"), "temperature": 0, "max_tokens": 12, **fields}
    response = live.post("/v1/chat/completions", body)
    response.raise_for_status()
    return response.json()


def test_logprobs_come_in_the_official_shape_with_bytes(tiny: Live) -> None:
    completion = tiny.client.chat.completions.create(
        model=CHAT, messages=user("hello"), temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 6
    assert bytes(b for token in logprobs.content for b in token.bytes or []).decode(errors="replace")
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob <= 0  # greedy takes the likeliest
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.0001


def test_streamed_logprobs_are_those_of_the_whole_reply(tiny: Live) -> None:
    fields: Any = {
        "model": CHAT,
        "messages": user("hello"),
        "temperature": 0,
        "max_tokens": 6,
        "logprobs": True,
        "top_logprobs": 0,
    }
    whole = tiny.client.chat.completions.create(**fields).choices[0]
    tokens = [
        token.token
        for chunk in tiny.client.chat.completions.create(**fields, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or []
    ]
    assert whole.logprobs is not None
    assert tokens == [token.token for token in whole.logprobs.content or []]


def test_a_shared_prompt_is_counted_as_cached(tiny: Live) -> None:
    messages = user("a long beginning that two asks share " * 8)
    first = greedy(tiny, messages=messages)
    second = greedy(tiny, messages=messages)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["prompt_tokens"] - 1
    assert second["x_nimbos"]["cached_tokens"] > 0
    assert second["choices"][0]["message"]["content"] == first["choices"][0]["message"]["content"]


def test_best_of_gives_the_likeliest(tiny: Live) -> None:
    fields: Any = {"model": CHAT, "prompt": "hello", "max_tokens": 5, "seed": 3, "temperature": 2}
    every = tiny.client.completions.create(**fields, n=6, logprobs=0)
    best = tiny.client.completions.create(**fields, n=1, best_of=6)

    def mean(choice: Any) -> float:
        return float(np.mean(choice.logprobs.token_logprobs))

    assert best.choices[0].text == max(every.choices, key=mean).text
    assert best.choices[0].logprobs is None
    assert best.usage is not None
    assert best.usage.completion_tokens == 30


def test_completions_logprobs_are_parallel_lists(tiny: Live) -> None:
    completion = tiny.client.completions.create(model=CHAT, prompt="hello", max_tokens=4, logprobs=2, temperature=0)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs or []) == len(logprobs.top_logprobs) == 4
    assert (logprobs.text_offset or [1])[0] == 0


def test_token_ids_are_a_prompt(tiny: Live) -> None:
    completion = tiny.client.completions.create(model=CHAT, prompt=[[72, 73], [74]], max_tokens=2)
    assert len(completion.choices) == 2
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 3
    response = tiny.post("/v1/completions", {"model": CHAT, "prompt": [999_999_999], "max_tokens": 2})
    assert "token" in error_of(response, 400)["message"]


def test_fill_in_the_middle_puts_the_marks_around_prompt_and_suffix(tiny: Live) -> None:
    plain = tiny.client.completions.create(model=CHAT, prompt="hello", max_tokens=1)
    filled = tiny.client.completions.create(model=CHAT, prompt="hello", suffix="hello", max_tokens=1)
    assert plain.usage is not None
    assert filled.usage is not None
    assert filled.usage.prompt_tokens == 2 * plain.usage.prompt_tokens + 3


def test_a_schema_shapes_the_answer(tiny: Live) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    reply = greedy(
        tiny, max_tokens=40, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    )
    assert json.loads(reply["choices"][0]["message"]["content"]) in ({"ok": True}, {"ok": False})
    assert reply["choices"][0]["finish_reason"] == "stop"


def test_a_token_that_stops_is_counted_and_not_told(tiny: Live) -> None:
    wanted = {"logit_bias": {"65": 100}, "max_tokens": 4}
    whole = greedy(tiny, **wanted)
    assert whole["usage"]["completion_tokens"] == 4
    stopped = greedy(tiny, **wanted, stop_token_ids=[64, 65])
    assert (stopped["choices"][0]["finish_reason"], stopped["choices"][0]["message"]["content"]) == ("stop", "")
    assert stopped["usage"]["completion_tokens"] == 1
    older = tiny.client.completions.create(
        model=CHAT, prompt="hello", max_tokens=4, logit_bias={"65": 100}, extra_body={"stop_token_ids": [65]}
    )
    assert (older.choices[0].finish_reason, older.choices[0].text) == ("stop", "")


def test_a_required_tool_is_called(tiny: Live) -> None:
    parameters = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    tools = [{"type": "function", "function": {"name": "switch", "parameters": parameters}}]
    reply = greedy(tiny, max_tokens=80, tools=tools, tool_choice="required")
    message = reply["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "switch"
    assert reply["choices"][0]["finish_reason"] in ("tool_calls", "length")


def test_a_broken_grammar_is_a_400(tiny: Live) -> None:
    body = {"model": CHAT, "messages": user("hi"), "guided_regex": "(", "stream": True}
    assert error_of(tiny.post("/v1/chat/completions", body), 400)["type"] == "invalid_request_error"


def test_a_prompt_too_long_says_both_counts(tiny: Live) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        tiny.client.chat.completions.create(model=CHAT, messages=user("xyz " * 9000))
    assert caught.value.code == "context_length_exceeded"


def test_an_engine_killed_in_the_middle_of_a_stream_goes_on_with_it(tiny: Live) -> None:
    undisturbed = greedy(tiny, max_tokens=60)["choices"][0]["message"]["content"]
    stream = tiny.client.chat.completions.create(
        model=CHAT, messages=user("hello world"), temperature=0, max_tokens=60, stream=True
    )
    text = ""
    for number, chunk in enumerate(stream):
        if number == 5:
            pid = tiny.runtime.service.engine_pid(CHAT)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        text += chunk.choices[0].delta.content or ""
        if chunk.choices[0].finish_reason:
            assert (chunk.model_extra or {})["x_nimbos"]["restarts"] == 1
    assert text == undisturbed
    assert 'nimbos_engine_restarts_total{model="tiny-qwen2-1"} 1.0' in tiny.http.get("/metrics").text


def test_embeddings_are_of_length_one_in_the_order_of_the_inputs(tiny: Live) -> None:
    together = tiny.client.embeddings.create(model=EMBED, input=["hello world", "like", "hello world"])
    assert [item.index for item in together.data] == [0, 1, 2]
    vectors = np.array([item.embedding for item in together.data])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    assert np.allclose(vectors[0], vectors[2], atol=1e-3)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-2)
    assert together.usage.prompt_tokens == together.usage.total_tokens > 0


def test_both_encodings_give_the_same_floats(tiny: Live) -> None:
    body = {"model": EMBED, "input": "hello"}
    floats = tiny.post("/v1/embeddings", {**body, "encoding_format": "float"}).json()["data"][0]["embedding"]
    packed = tiny.post("/v1/embeddings", {**body, "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(packed), dtype="<f4"), floats, atol=1e-3)


def test_fewer_dimensions_are_cut_and_brought_to_length_one(tiny: Live) -> None:
    whole = np.array(tiny.client.embeddings.create(model=EMBED, input="hello").data[0].embedding)
    cut = np.array(tiny.client.embeddings.create(model=EMBED, input="hello", dimensions=8).data[0].embedding)
    assert cut.shape == (8,)
    assert np.allclose(cut, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"dimensions": 65}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"model": CHAT}, "model"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", 1]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimension": 3}, "dimension"),
    ],
)
def test_an_embedding_that_cannot_be_is_refused_by_name(tiny: Live, fields: dict[str, Any], param: str) -> None:
    response = tiny.post("/v1/embeddings", {"model": EMBED, "input": "hello", **fields})
    assert error_of(response, 400)["param"] == param


def test_an_embedding_model_does_not_chat(tiny: Live) -> None:
    response = tiny.post("/v1/chat/completions", {"model": EMBED, "messages": user("hi")})
    assert error_of(response, 400)["type"] == "invalid_request_error"


def test_models_tell_what_their_files_say(tiny: Live) -> None:
    listed = {model["id"]: model for model in tiny.http.get("/v1/models").json()["data"]}
    assert listed[CHAT]["x_nimbos"]["architecture"] == "qwen2"
    assert listed[EMBED]["x_nimbos"]["kind"] == "embed"
    assert tiny.http.get("/health").status_code == 200


def test_a_full_inbox_is_a_429_that_says_when_to_come_again(tmp_path: Path) -> None:
    model = tiny_gguf.write("qwen2", tmp_path)
    settings = EngineSettings(threads=1, cells=2048, inbox=1)
    body = {"model": CHAT, "messages": user("hi"), "max_tokens": 4}
    with serving(tmp_path / "home", models=(model,), engine=settings) as live, ThreadPoolExecutor(1) as pool:
        assert live.post("/v1/chat/completions", body).status_code == 200
        engine = live.runtime.service._sources.engines()[CHAT]
        assert isinstance(engine, Engine) and engine.pid is not None
        os.kill(engine.pid, signal.SIGSTOP)  # what comes now waits
        try:
            first = pool.submit(live.post, "/v1/chat/completions", body)
            while not engine._unanswered:
                os.sched_yield()
            response = live.post("/v1/chat/completions", {**body, "stream": True})
            assert error_of(response, 429)["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers["x-should-retry"] == "true"
            with pytest.raises(openai.RateLimitError):
                live.client.chat.completions.create(model=CHAT, messages=user("hi"))
        finally:
            os.kill(engine.pid, signal.SIGCONT)
        assert first.result().status_code == 200


def test_a_broken_model_is_a_clear_error_and_the_server_lives_on(tmp_path: Path) -> None:
    good = tiny_gguf.write("qwen2", tmp_path)
    with serving(tmp_path / "home", models=(good,), engine=EngineSettings(threads=1, cells=2048)) as live:
        content = good.read_bytes()
        good.write_bytes(content[: len(content) // 2])
        error = error_of(live.post("/v1/chat/completions", {"model": CHAT, "messages": user("hi")}), 422)
        assert str(good) in error["message"]
        assert error["code"] == "model_unusable"
        assert live.http.get("/v1/models").status_code == 200
        assert live.http.get("/health").status_code == 503


def test_a_client_cannot_name_a_file_of_this_machine(tmp_path: Path) -> None:
    model = tiny_gguf.write("qwen2", tmp_path)
    with serving(tmp_path / "home", {"demo": {"default": {"text": "x"}}}) as live:
        for name in (str(model), f"../{model.name}", "~/x.gguf", f"hf:a/b/{model.name}"):
            error = error_of(live.post("/v1/chat/completions", {"model": name, "messages": user("hi")}), 404)
            assert error["code"] == "model_not_found"


def test_a_model_that_cannot_fit_is_refused_with_the_numbers(tmp_path: Path) -> None:
    model = tiny_gguf.write("qwen2", tmp_path)
    with serving(tmp_path / "home", models=(model,), server=ServerSettings(memory_mib=1)) as live:
        error = error_of(live.post("/v1/chat/completions", {"model": CHAT, "messages": user("hi")}), 422)
        assert "1 MB" in error["message"]
