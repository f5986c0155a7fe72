"""Ollama's own package against our server, with a key on the main port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import ollama
import pytest

from nimbos.api.ollama import routes
from nimbos.api.ollama_embed import EmbedCall, EmbeddingsCall
from nimbos.api.ollama_models import Named
from nimbos.api.ollama_request import REFUSED_GENERATE, REFUSED_OPTIONS, ChatCall, GenerateCall, Options
from tests.live import OWNER_SECRET, Live, user

HEADERS = {"authorization": f"Bearer {OWNER_SECRET}"}
LINES = ["/api/chat", "/api/generate"]
ROUTES = [*LINES, "/api/embed", "/api/embeddings", "/api/show", "/api/pull"]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[ollama.Client]:
    """The package, told where we are and with a key, as its users do it."""
    with ollama.Client(host=live.url, headers=HEADERS, timeout=60) as official:
        yield official


def refusal(response: httpx2.Response, status: int) -> str:
    """The message of an error in Ollama's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    message: str = body["error"]
    return message


def lines_of(response: httpx2.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("application/x-ndjson")
    assert response.text.endswith("\n")
    return [json.loads(line) for line in response.text.splitlines()]


# --- chat


def test_a_chat_is_answered_whole(client: ollama.Client) -> None:
    response = client.chat("demo", messages=user("hi"))
    assert response.message.role == "assistant"
    assert response.message.content == "Hello there, friend!"
    assert response.message.thinking is None
    assert (response.done, response.done_reason, response.model) == (True, "stop", "demo")
    assert (response.prompt_eval_count, response.eval_count) == (1, 5)
    assert response.total_duration is not None
    assert response.created_at is not None
    assert response.created_at.endswith("Z")
    parts = (response.load_duration, response.prompt_eval_duration, response.eval_duration)
    assert all(part is not None and part >= 0 for part in parts)
    assert sum(part or 0 for part in parts) == response.total_duration


def test_a_chat_is_streamed_without_being_asked(live: Live) -> None:
    response = live.post("/api/chat", {"model": "demo", "messages": user("count")})
    *pieces, last = lines_of(response)
    assert "".join(piece["message"]["content"] for piece in pieces) == "one, two, three, four"
    assert all(piece["done"] is False and "done_reason" not in piece for piece in pieces)
    assert (last["done"], last["done_reason"], last["message"]["content"]) == (True, "stop", "")
    assert last["x_nimbos"]["ask_id"] == response.headers["x-nimbos-ask-id"]


@pytest.mark.parametrize("think", [True, "low", "high"])
def test_thinking_is_apart_streamed_and_whole(client: ollama.Client, think: Any) -> None:
    whole = client.chat("demo", messages=user("please think"), think=think)
    assert (whole.message.thinking, whole.message.content) == ("Let me see, yes.", "Done thinking.")
    pieces = list(client.chat("demo", messages=user("please think"), think=think, stream=True))
    assert "".join(piece.message.thinking or "" for piece in pieces) == whole.message.thinking
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content


def test_thinking_can_be_switched_off(client: ollama.Client) -> None:
    assert client.chat("demo", messages=user("please think"), think=False).message.thinking is None


def test_tools_are_called_with_objects_and_their_results_need_no_ids(client: ollama.Client) -> None:
    messages: list[Any] = user("the weather?")
    response = client.chat("demo", messages=messages, tools=[TOOL])
    (call,) = response.message.tool_calls or []
    assert (call.function.name, dict(call.function.arguments)) == ("get_weather", {"city": "Paris", "days": 2})
    messages += [response.message, {"role": "tool", "tool_name": "get_weather", "content": "21 degrees"}]
    assert client.chat("demo", messages=messages, tools=[TOOL]).message.content == "It is 21 degrees."


def test_streamed_calls_come_whole_and_after_the_words_before_them(client: ollama.Client) -> None:
    pieces = list(client.chat("demo", messages=user("two calls"), tools=[TOOL, CLOCK], stream=True))
    calls = [call.function for piece in pieces for call in piece.message.tool_calls or []]
    assert [(call.name, dict(call.arguments)) for call in calls] == [
        ("get_weather", {"city": "Paris", "days": 2}),
        ("get_time", {}),
    ]
    assert "".join(piece.message.content or "" for piece in pieces) == "Both."
    whole = client.chat("demo", messages=user("two calls"), tools=[TOOL, CLOCK]).message
    assert [call.function.name for call in whole.tool_calls or []] == ["get_weather", "get_time"]


def test_a_call_that_is_cut_off_is_text(live: Live) -> None:
    body = {"model": "demo", "messages": user("two calls"), "tools": [TOOL, CLOCK], "stream": False}
    cut_off = []
    for limit in range(1, 40):
        answer = live.post("/api/chat", {**body, "options": {"num_predict": limit}}).json()
        for call in answer["message"].get("tool_calls", []):
            assert call["function"]["arguments"] in ({"city": "Paris", "days": 2}, {})
        if answer["done_reason"] == "length" and "get_weather(" in answer["message"]["content"]:
            cut_off.append(limit)
    assert cut_off


def test_a_format_shapes_the_answer(live: Live) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}}
    grammars = []
    for shape in ("json", schema, ""):
        response = live.post("/api/chat", {"model": "demo", "messages": user("json"), "format": shape, "stream": False})
        assert response.json()["message"]["content"] == '{"answer": 42}'
        grammar = live.sources["demo"].asks[-1].grammar
        grammars.append(None if grammar is None else json.loads(grammar.source))
    assert grammars == [{"type": "object"}, schema, None]


# --- generate


def test_a_prompt_is_answered_with_its_system_words(client: ollama.Client, live: Live) -> None:
    response = client.generate("demo", "count", system="Be brief.")
    assert (response.response, response.done_reason) == ("one, two, three, four", "stop")
    assert "Be brief." in prompt_of(live)
    pieces = list(client.generate("demo", "please think", think=True, stream=True))
    assert "".join(piece.response or "" for piece in pieces) == "Done thinking."
    assert "".join(piece.thinking or "" for piece in pieces) == "Let me see, yes."


def test_a_raw_prompt_has_no_template(client: ollama.Client, live: Live) -> None:
    assert client.generate("demo", "count", raw=True).response == "one, two, three, four"
    assert prompt_of(live) == "count"
    client.generate("demo", "json", raw=True, format="json", options={"repeat_last_n": 7})
    ask = live.sources["demo"].asks[-1]
    assert ask.grammar is not None
    assert ask.sampling.penalty_window == 7


def test_a_suffix_needs_a_model_with_marks_for_it(live: Live) -> None:
    body = {"model": "demo", "prompt": "def f(", "suffix": "return 1"}
    assert "suffix" in refusal(live.post("/api/generate", body), 400)


@pytest.mark.parametrize("more", [{"system": "x"}, {"think": True}])
def test_a_raw_prompt_takes_nothing_that_a_template_would_place(live: Live, more: dict[str, Any]) -> None:
    body = {"model": "demo", "prompt": "hi", "raw": True, **more}
    assert next(iter(more)) in refusal(live.post("/api/generate", body), 400)


# --- loading


@pytest.mark.parametrize("route", LINES)
def test_without_a_prompt_the_model_is_only_loaded(live: Live, route: str) -> None:
    before = len(live.sources["demo"].asks)
    for keep_alive, reason in ((None, "load"), (-1, "load"), ("5m", "load"), (0, "unload")):
        answer = live.post(route, {"model": "demo", "keep_alive": keep_alive}).json()
        assert (answer["done"], answer["done_reason"]) == (True, reason)
    assert len(live.sources["demo"].asks) == before
    assert "none" in refusal(live.post(route, {"model": "none"}), 404)


# --- options


def test_options_reach_the_engine(client: ollama.Client, live: Live) -> None:
    options = {
        "temperature": 0.25,
        "top_k": 9,
        "top_p": 0.5,
        "min_p": 0.125,
        "typical_p": 0.75,
        "seed": 7,
        "stop": ["friend"],
        "num_predict": 3,
        "num_ctx": 4096,
        "repeat_penalty": 1.5,
        "repeat_last_n": 32,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
    }
    assert client.chat("demo", messages=user("hi"), options=options).done_reason == "length"
    ask = live.sources["demo"].asks[-1]
    sampling = ask.sampling
    chosen = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.typical_p, sampling.seed)
    assert chosen == (0.25, 9, 0.5, 0.125, 0.75, 7)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, 0.5, 0.25)
    assert (sampling.penalty_window, ask.limit_tokens, ask.stop) == (32, 3, ("friend",))


@pytest.mark.parametrize("limit", [-1, -2])
def test_without_a_limit_the_answer_ends_by_itself(client: ollama.Client, live: Live, limit: int) -> None:
    assert client.chat("demo", messages=user("count"), options={"num_predict": limit}).done_reason == "stop"
    assert live.sources["demo"].asks[-1].limit_tokens is None


@pytest.mark.parametrize(("last", "penalty", "window"), [(0, 1.0, 256), (-1, 1.5, 32_768), (8, 1.5, 8)])
def test_penalties_look_at_the_last_tokens_that_were_named(
    client: ollama.Client, live: Live, last: int, penalty: float, window: int
) -> None:
    client.chat("demo", messages=user("hi"), options={"repeat_last_n": last, "repeat_penalty": 1.5})
    sampling = live.sources["demo"].asks[-1].sampling
    assert (sampling.repetition_penalty, sampling.penalty_window) == (penalty, window)


@pytest.mark.parametrize("route", LINES)
def test_a_window_beyond_the_models_is_refused_and_nothing_is_ever_cut(live: Live, route: str) -> None:
    body = {"model": "demo", "messages": user("hi"), "prompt": "hi", "options": {"num_ctx": 100_000}}
    message = refusal(live.post(route, body), 400)
    assert "100000" in message
    assert "32768" in message
    long = "word " * 40_000
    message = refusal(live.post(route, {"model": "demo", "messages": user(long), "prompt": long}), 400)
    assert "40000" in message
    small = {"model": "demo", "messages": user(long[:40_000]), "prompt": long[:40_000], "options": {"num_ctx": 2048}}
    response = live.post(route, {**small, "truncate": True, "stream": False})
    assert response.json()["prompt_eval_count"] == 8_000
    assert "truncate" in response.headers["x-nimbos-ignored"].split(", ")


def test_what_only_loads_a_model_elsewhere_is_ignored_by_name(live: Live) -> None:
    options = {"num_gpu": 1, "numa": False, "num_thread": 4, "use_mmap": True, "mirostat": 0, "tfs_z": 1.0}
    response = live.post("/api/chat", {"model": "demo", "messages": user("hi"), "options": options, "shape": 1})
    assert response.status_code == 200
    assert set(response.headers["x-nimbos-ignored"].split(", ")) == {
        "options.num_gpu",
        "options.numa",
        "options.num_thread",
        "options.use_mmap",
        "shape",
    }


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mirostat": 2}, "options.mirostat"),
        ({"tfs_z": 0.5}, "options.tfs_z"),
        ({"temperature": "hot"}, "options.temperature"),
        ({"temperature": -1}, "temperature"),
        ({"num_predict": -3}, "options.num_predict"),
        ({"num_ctx": 0}, "options.num_ctx"),
        ({"repeat_last_n": -2}, "options.repeat_last_n"),
        ({"stop": [5]}, "options.stop"),
        ({"stop": [""]}, "stop"),
        ({"seed": 1.5}, "options.seed"),
        ({"top_p": 7}, "top_p"),
    ],
    ids=str,
)
@pytest.mark.parametrize("route", LINES)
def test_an_option_that_would_change_the_answer_is_refused_by_name(
    live: Live, route: str, options: dict[str, Any], named: str
) -> None:
    body = {"model": "demo", "messages": user("hi"), "prompt": "hi", "options": options}
    assert named in refusal(live.post(route, body), 400)


@pytest.mark.parametrize(
    ("route", "more", "named"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": "a", "images": ["aGk="]}]}, "messages[0].images"),
        ("/api/generate", {"images": ["aGk="]}, "images"),
        ("/api/generate", {"template": "{{ .Prompt }}"}, "template"),
        ("/api/generate", {"context": [1, 2, 3]}, "context"),
        ("/api/generate", {"width": 512}, "width"),
        ("/api/chat", {"format": "xml"}, "format"),
        ("/api/chat", {"format": 5}, "format"),
        ("/api/chat", {"think": "hard"}, "think"),
        ("/api/chat", {"think": 5}, "think"),
        ("/api/chat", {"logprobs": True}, "logprobs"),
        ("/api/chat", {"stream": "yes"}, "stream"),
        ("/api/chat", {"tools": [{"type": "function"}]}, "tools[0]"),
        ("/api/chat", {"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
        ("/api/chat", {"messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages[0].tool_calls[0]"),
        ("/api/chat", {"messages": [{"role": "tool", "content": "a"}]}, "tool_call_id"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(live: Live, route: str, more: dict[str, Any], named: str) -> None:
    message = refusal(live.post(route, {"model": "demo", "messages": user("hi"), "prompt": "hi", **more}), 400)
    assert named in message


def test_empty_fields_that_clients_always_send_are_taken(client: ollama.Client, live: Live) -> None:
    answer = client.generate("demo", "hi", suffix="", system="", template="", raw=False, images=[], keep_alive="5m")
    assert answer.response == "Hello there, friend!"
    messages = [{"role": "user", "content": "hi", "images": []}]
    assert live.post("/api/chat", {"model": "demo", "messages": messages, "tools": []}).status_code == 200


# --- models


def test_models_are_listed_under_both_names(client: ollama.Client) -> None:
    (model,) = client.list().models
    assert model.model == "demo"
    assert client.chat("demo:latest", messages=user("hi")).model == "demo:latest"


def test_a_scripted_model_is_shown(client: ollama.Client, live: Live) -> None:
    shown = client.show("demo")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert live.post("/api/show", {"name": "demo:latest"}).status_code == 200
    assert "'none'" in refusal(live.post("/api/show", {"model": "none"}), 404)


def test_nothing_is_loaded_when_there_are_only_scripts(client: ollama.Client) -> None:
    assert client.ps().models == []


def test_the_version_is_one_that_clients_can_compare(live: Live) -> None:
    version = live.http.get("/api/version").json()["version"]
    assert [part.isdigit() for part in version.split(".")] == [True] * 3
    assert live.http.head("/api/version").status_code == 200


@pytest.mark.parametrize("path", ["/api/create", "/api/copy", "/api/push", "/api/blobs/sha256:00"])
def test_what_has_no_counterpart_is_refused(live: Live, path: str) -> None:
    assert path in refusal(live.post(path, {"model": "demo"}), 400)


@pytest.mark.parametrize("name", ["/etc/passwd", "./a.gguf", "https://example.com/a.gguf", "nosuchmodel", "../a.gguf"])
def test_only_the_catalog_and_hubs_can_be_pulled_from(live: Live, name: str) -> None:
    refusal(live.post("/api/pull", {"model": name}), 404)


# --- errors


def test_errors_have_ollamas_shape_and_our_statuses(client: ollama.Client, live: Live) -> None:
    with pytest.raises(ollama.ResponseError, match="There is no model 'none' here") as caught:
        client.chat("none", messages=user("hi"))
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError) as caught:
        next(iter(client.chat("none", messages=user("hi"), stream=True)))
    assert caught.value.status_code == 404
    refusal(live.http.get("/api/nothing"), 404)
    refusal(live.http.get("/api/chat"), 405)


@pytest.mark.parametrize("route", ROUTES)
def test_what_the_door_refuses_has_the_same_shape(live: Live, route: str) -> None:
    assert "key" in refusal(httpx2.post(live.url + route, json={}), 401)
    refusal(live.http.post(route, json={}, headers={"origin": "https://evil.example"}), 403)


def test_embeddings_need_a_model_that_makes_them(client: ollama.Client, live: Live) -> None:
    with pytest.raises(ollama.ResponseError, match="'demo'") as caught:
        client.embed("demo", "hi")
    assert caught.value.status_code == 400
    assert "'demo'" in refusal(live.post("/api/embeddings", {"model": "demo", "prompt": "hi"}), 400)
    assert live.post("/api/embed", {"model": "demo", "input": []}).json()["embeddings"] == []


# --- streams


def test_a_client_that_goes_ends_its_ask(client: ollama.Client, live: Live) -> None:
    pieces = client.chat("demo", messages=user("endless"), stream=True)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert live.sources["demo"].ended.acquire(timeout=60)


async def test_the_asynchronous_client_asks_and_streams(live: Live) -> None:
    async with ollama.AsyncClient(host=live.url, headers=HEADERS, timeout=60) as client:
        asked = (client.chat("demo", messages=user("hi")) for _ in range(8))
        answers = await asyncio.gather(*asked)
        assert {answer.message.content for answer in answers} == {"Hello there, friend!"}
        stream = await client.generate("demo", "count", stream=True)
        assert "".join([piece.response or "" async for piece in stream]) == "one, two, three, four"
        assert [model.model for model in (await client.list()).models] == ["demo"]


# --- the page


def test_every_field_and_route_is_described(live: Live) -> None:
    page = (Path(__file__).parents[2] / "docs" / "ollama.md").read_text()
    structs = (ChatCall, GenerateCall, Options, EmbedCall, EmbeddingsCall, Named)
    fields = {name for struct in structs for name in struct.__struct_fields__}
    refused = {*REFUSED_GENERATE, *REFUSED_OPTIONS}
    paths = {
        f"{method} {route.path}" for route in routes(live.runtime) for method in (route.methods or set()) - {"HEAD"}
    }
    assert {name for name in fields | refused | paths if f"`{name}`" not in page} == set()


# --- hostile input


BODIES = {
    "empty": b"",
    "not JSON": b"{model: demo}",
    "an array": b"[1]",
    "NaN": b'{"model": "demo", "options": {"temperature": NaN}}',
    "beyond 64 bits": b'{"model": "demo", "options": {"seed": 99999999999999999999999}}',
    "invalid UTF-8": b'{"model": "\xff\xfe"}',
    "very deep": b'{"model": "demo", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "wrong type of model": b'{"model": 5, "messages": [], "prompt": "a", "input": "a"}',
    "no model": b'{"messages": [], "prompt": "a", "input": "a"}',
    "wrong types": b'{"model": [], "messages": "hi", "prompt": 5, "input": {}}',
}
OPTIONS = {
    "options are a list": {"options": [1]},
    "half a character": {"prompt": "\ud83d", "input": "\ud83d", "messages": user("\ud83d")},
    "messages are text": {"messages": "hi", "prompt": 5, "input": 5},
    "messages are numbers": {"messages": [5], "prompt": [], "input": [5]},
    "a message is empty": {"messages": [{}], "prompt": {}, "input": [""]},
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_broken_body_is_an_error_in_ollamas_shape(live: Live, route: str, body: bytes) -> None:
    response = live.http.post(route, content=body)
    if response.status_code == 404:
        assert route == "/api/pull"  # the name was good enough to be looked for
        return
    assert len(refusal(response, 400)) < 1_000


@pytest.mark.parametrize("route", ["/api/chat", "/api/generate", "/api/embed", "/api/embeddings"])
@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS.keys())
def test_wrong_insides_are_refused(live: Live, route: str, fields: dict[str, Any]) -> None:
    body = {"model": "demo", "messages": user("hi"), "prompt": "hi", "input": "hi", **fields}
    assert len(refusal(live.http.post(route, content=json.dumps(body)), 400)) < 1_000


@pytest.mark.parametrize("role", ["reader", "member"])
def test_a_key_that_administers_fetches_and_removes_no_more_than_its_owner_may(live: Live, role: str) -> None:
    person = {"email": f"{role}-of-models@example.org", "role": role, "project": "proj_default"}
    user_id = live.post("/v1/organization/users", person).json()["id"]
    body = {"name": f"models of a {role}", "user_id": user_id, "scopes": ["admin"]}
    secret = live.post("/v1/organization/projects/proj_default/api_keys", body).json()["value"]
    with httpx2.Client(base_url=live.url, headers={"authorization": f"Bearer {secret}"}) as http:
        for method, path in (("POST", "/api/pull"), ("DELETE", "/api/delete")):
            refused = http.request(method, path, json={"model": "demo"})
            assert (refused.status_code, "admin" in refused.json()["error"]) == (403, True)


@pytest.mark.parametrize("route", ["/api/show", "/api/pull", "/api/chat"])
@pytest.mark.parametrize("name", ["x" * 50_000, "\x00", "https://[", "hf:../../x", "a\nb"])
def test_a_name_that_cannot_be_is_told_shortly(live: Live, route: str, name: str) -> None:
    response = live.post(route, {"model": name, "messages": user("hi")})
    assert response.status_code in (400, 404)
    assert len(refusal(response, response.status_code)) < 1_000


def prompt_of(live: Live) -> str:
    return "".join(getattr(part, "text", "") for part in live.sources["demo"].asks[-1].parts)
