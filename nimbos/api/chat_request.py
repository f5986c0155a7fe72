"""The body of `POST /v1/chat/completions`, and what it asks of `chat` and of the engine.

Every field of OpenAI's request is here: honoured, or refused by name with the reason.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import msgspec

from nimbos.api import fields as shared
from nimbos.api.cache_marks import behind_last_mark
from nimbos.api.dialogue import Asked
from nimbos.api.messages import ToolChoice, allow_tools, check_messages
from nimbos.chat import ChatRequest, Dial
from nimbos.errors import InvalidRequest, UnsupportedField
from nimbos.types import Account, Grammar, ModelCard, Origin

ORIGIN = Origin(route="/v1/chat/completions")

REFUSED = {
    "audio": "this server's models write text only",
    "function_call": "it is deprecated; use `tool_choice`",
    "functions": "it is deprecated; use `tools`",
    "moderation": "there is no moderation model",
    "web_search_options": "there is no web search in this route",
}

_DIAL = (
    "enable_thinking",
    "thinking_budget",
    "thinking_token_budget",
    "thinking_budget_tokens",
    "reasoning_budget_tokens",
    "reasoning_effort",
    "reasoning",
    "thinking",
    "think",
    "output_config",
    "chat_template_kwargs",
)


class _JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    schema: dict[str, Any] = msgspec.field(default_factory=lambda: {"type": "object"})
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class ChatBody(shared.SamplingFields, kw_only=True):
    """Hints that cannot change the answer are taken, not used: `user`, `metadata`, `prediction`, `prompt_cache_*`."""

    model: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    modalities: list[str] | None = None
    store: bool | None = None
    verbosity: Literal["low", "medium", "high"] | None = None

    metadata: dict[str, str] | None = None
    prediction: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    enable_thinking: Any = None
    thinking_budget: Any = None
    thinking_token_budget: Any = None
    thinking_budget_tokens: Any = None
    reasoning_budget_tokens: Any = None
    reasoning_effort: Any = None
    reasoning: Any = None
    thinking: Any = None
    think: Any = None
    output_config: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


def asked(
    body: ChatBody, account: Account, *, header_class: str | None, origin: Origin = ORIGIN, at: str = "messages"
) -> Asked:
    """The body in no dialect's words. `header_class`: of `x-nimbos-class`. `at`: where its messages stood.

    Raises: InvalidRequest naming the field; Forbidden for a class that the key is not for.
    """
    shared.check_stream(body)
    limit = limit_of(body)
    messages = behind_last_mark(body.messages, at=at)
    marked = msgspec.structs.replace(body, messages=messages) if messages is not None else None
    return Asked(
        model=body.model,
        request=lambda card: chat_request(body, card),
        marked=partial(chat_request, marked) if marked is not None else None,
        sampling=shared.sampling_of(body, logprobs=logprobs_of(body)),
        ask_class=shared.class_of(body.service_tier, shared.extension_class(body), header_class, account),
        n=shared.count_of(body),
        limit_tokens=limit,
        min_tokens=shared.min_tokens_of(body, limit),
        stops=shared.stops_of(body),
        stop_ids=shared.stop_ids_of(body),
        ignore_eos=bool(body.ignore_eos),
        origin=origin,
    )


def limit_of(body: ChatBody) -> int | None:
    """`max_completion_tokens`, or its older name."""
    older = shared.limit_of(body)
    newer = body.max_completion_tokens
    if newer is None:
        return older
    if newer < 1:
        raise InvalidRequest(
            f"`max_completion_tokens` is {newer}; it must be 1 or more.", param="max_completion_tokens"
        )
    if older is not None and older != newer:
        raise InvalidRequest(
            f"`max_completion_tokens` ({newer}) and `max_tokens` ({older}) contradict each other.",
            param="max_completion_tokens",
        )
    return newer


def logprobs_of(body: ChatBody) -> int | None:
    if body.top_logprobs is not None:
        if not body.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
        if not 0 <= body.top_logprobs <= shared.TOP_LOGPROBS_MAX:
            raise InvalidRequest(
                f"`top_logprobs` is {body.top_logprobs}; it must be from 0 to {shared.TOP_LOGPROBS_MAX}.",
                param="top_logprobs",
            )
    return (body.top_logprobs or 0) if body.logprobs else None


def chat_request(body: ChatBody, card: ModelCard) -> ChatRequest:
    """Raises: InvalidRequest, UnsupportedField."""
    _check_fixed(body)
    tools, choice = allow_tools(body.tools, body.tool_choice)
    grammar = shared.grammar_of(body)
    response_format = _response_format(body.response_format)
    if grammar is not None and response_format is not None:
        raise InvalidRequest(
            "`response_format` and a guided grammar both say what the answer looks like; give one.",
            param="response_format",
        )
    return ChatRequest(
        messages=check_messages(body.messages),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        response_format=response_format,
        grammar=grammar,
        thinking=Dial.read(_dial_fields(body)),
        max_tokens=limit_of(body),
        context_tokens=card.context_tokens,
        template_kwargs=body.chat_template_kwargs or {},
    )


def _dial_fields(body: ChatBody) -> dict[str, Any]:
    return {name: value for name in _DIAL if (value := getattr(body, name)) is not None}


def _check_fixed(body: ChatBody) -> None:
    """Fields of which one value alone is supported."""
    if body.store:
        raise UnsupportedField("store", why="not supported here: answers are not kept; leave it out or send false")
    if body.verbosity not in (None, "medium"):
        raise UnsupportedField("verbosity", why=f"{body.verbosity!r}; these models know only 'medium'")
    if body.modalities is not None and body.modalities != ["text"]:
        raise UnsupportedField("modalities", why="not ['text'], and this server's models write text only")


def _response_format(given: ResponseFormat | None) -> str | None:
    """None, "json_object", or the schema as JSON text."""
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return "json_object"
    if given.json_schema is None:
        raise InvalidRequest("`response_format.json_schema` is missing.", param="response_format.json_schema")
    schema = msgspec.json.encode(given.json_schema.schema).decode()
    shared.only_one({"response_format": Grammar(kind="json_schema", source=schema)})
    return schema
