"""The body of `POST /v1/messages` and of its token count, and what it asks of `chat` and of the engine.

Unknown fields are left out and named in `x-nimbos-ignored`: clients send beta fields that their users cannot turn off.
A known field that would change the answer and is not supported is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from nimbos.api import body as bodies
from nimbos.api import fields as shared
from nimbos.api.anthropic_cache import last_mark
from nimbos.api.anthropic_content import read_messages, read_system
from nimbos.api.anthropic_tools import read_choice, read_tools
from nimbos.api.dialogue import Asked
from nimbos.api.lenient import Ignored, read_known
from nimbos.chat import ChatRequest, Dial
from nimbos.errors import InvalidRequest, UnsupportedField
from nimbos.types import Account, Grammar, ModelCard, Origin

PATH = "/v1/messages"
ORIGIN = Origin(route=PATH)

REFUSED = {
    "compaction": "conversations are not summarised here; do it with an ask of your own",
    "container": "there is no container here",
    "mcp_servers": "this route connects to no server; give the tools themselves",
}

_THINKING_FIELDS = frozenset({"type", "budget_tokens"})
_THINKING_HINTS = frozenset({"display", "block_binding"})
_OUTPUT_FIELDS = frozenset({"effort", "format"})
_FORMAT_FIELDS = frozenset({"type", "schema", "name", "description", "strict"})


class ThreadsUnsupported(InvalidRequest):
    """The official clients know this code, and go on by sending the whole conversation each time."""

    code = "thread_unsupported_request"

    def __init__(self) -> None:
        super().__init__("Conversations are not kept here: leave out `thread` and send all messages.", param="thread")


class MessagesBody(msgspec.Struct, kw_only=True):
    """The fields of the second group are hints that cannot change the answer: taken, not used."""

    model: str
    messages: list[Any]
    max_tokens: int | None = None
    system: str | list[Any] | None = None
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None
    thread: dict[str, Any] | None = None

    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    speed: Literal["standard", "fast"] | None = None
    context_management: dict[str, Any] | None = None
    diagnostics: dict[str, Any] | None = None
    inference_geo: str | None = None
    fallbacks: Any = None
    fallback_credit_token: Any = None
    billing_policy: dict[str, Any] | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None
    anthropic_version: str | None = None
    anthropic_beta: Any = None
    betas: Any = None


@dataclass(slots=True, eq=False, kw_only=True)
class Wanted:
    """One body, read. `silent`: only the prompt's cache is wanted. `hidden`: the thinking is not shown.
    `prefill`: what the answer begins with, as the client has written it."""

    body: MessagesBody
    asked: Asked
    ignored: Ignored
    hidden: bool
    silent: bool
    prefill: str
    marked: ChatRequest | None = field(default=None)


def read(
    content: bytes, account: Account, *, header_class: str | None, origin: Origin = ORIGIN, counting: bool = False
) -> Wanted:
    """`counting`: only the prompt's tokens are asked for, and `max_tokens` may be absent.

    Raises: InvalidRequest, UnsupportedField; ThreadsUnsupported; Forbidden for a class that the key is not for.
    """
    ignored = Ignored()
    body = read_known(bodies.table_of(content), MessagesBody, ignored, refused=REFUSED)
    if body.thread is not None:
        raise ThreadsUnsupported
    limit = _limit_of(body, counting=counting)
    _check_hints(body)
    request = _chat_request(body, ignored, limit=limit)
    prefill, request = _prefill(request)
    ask_class = shared.class_of(None, None, header_class, account)
    sampling = shared.SamplingFields(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k)
    wanted = Wanted(
        body=body,
        asked=Asked(
            model=body.model,
            request=lambda card: _in_window(request, card),
            sampling=shared.sampling_of(sampling, logprobs=None),
            ask_class=ask_class,
            limit_tokens=limit,
            stops=_stops_of(body),
            origin=origin,
        ),
        ignored=ignored,
        hidden=(body.thinking or {}).get("display") == "omitted",
        silent=body.max_tokens == 0,
        prefill=prefill,
    )
    mark = last_mark(body)
    if mark is not None:
        marked = msgspec.structs.replace(body, messages=mark.with_sentinel(body.messages))
        wanted.marked = _prefill(_chat_request(marked, ignored, limit=limit))[1]
    return wanted


def _chat_request(body: MessagesBody, ignored: Ignored, *, limit: int | None) -> ChatRequest:
    choice, parallel = read_choice(body.tool_choice)
    system = read_system(body.system, ignored)
    messages = read_messages(body.messages, ignored)
    return ChatRequest(
        messages=[{"role": "system", "content": system}, *messages] if system else messages,
        tools=read_tools(body.tools, ignored),
        tool_choice=choice,
        parallel_tool_calls=parallel,
        response_format=_format_of(body, ignored),
        thinking=_dial_of(body, ignored),
        max_tokens=limit,
    )


def _in_window(request: ChatRequest, card: ModelCard) -> ChatRequest:
    return msgspec.structs.replace(request, context_tokens=card.context_tokens)


def _limit_of(body: MessagesBody, *, counting: bool) -> int | None:
    """An ask for the prompt's cache alone (`max_tokens: 0`) still has one token computed: the engine stops after it."""
    if body.max_tokens is None:
        if counting:
            return None
        raise InvalidRequest("`max_tokens` is missing; it is required.", param="max_tokens")
    if not 0 <= body.max_tokens <= 2**31 - 1:
        raise InvalidRequest(f"`max_tokens` is {body.max_tokens}; it must be 0 or more.", param="max_tokens")
    return max(1, body.max_tokens)


def _check_hints(body: MessagesBody) -> None:
    for name, value, high in (
        ("temperature", body.temperature, 1),
        ("top_p", body.top_p, 1),
        ("top_k", body.top_k, 10**6),
    ):
        if value is not None and not 0 <= value <= high:
            raise InvalidRequest(f"`{name}` is {value}; it must be from 0 to {high}.", param=name)
    if (body.billing_policy or {}).get("bill_to", "self") != "self":
        raise UnsupportedField("billing_policy.bill_to", why="not 'self': here each key pays for itself")


def _stops_of(body: MessagesBody) -> tuple[str, ...]:
    stops = tuple(body.stop_sequences or ())
    if len(stops) > shared.STOPS_MAX:
        raise InvalidRequest(
            f"`stop_sequences` has {len(stops)} strings; there may be {shared.STOPS_MAX}.", param="stop_sequences"
        )
    if any(not stop or len(stop) > 1000 for stop in stops):
        raise InvalidRequest("Each string of `stop_sequences` must have 1 to 1000 characters.", param="stop_sequences")
    return stops


def _dial_of(body: MessagesBody, ignored: Ignored) -> Dial:
    """Who does not ask for thinking gets none: clients take the first block of an answer to be its text."""
    thinking = _known(body.thinking, "thinking", _THINKING_FIELDS, _THINKING_HINTS, ignored)
    output = _known(body.output_config, "output_config", _OUTPUT_FIELDS, frozenset(), ignored)
    output.pop("format", None)
    dial = Dial.read({"thinking": thinking or None, "output_config": output or None})
    return dial if dial.given else Dial(switch=False)


def _format_of(body: MessagesBody, ignored: Ignored) -> str | None:
    """The schema as JSON text. `output_format` is the older name of `output_config.format`."""
    newer = (body.output_config or {}).get("format") or {}
    if not isinstance(newer, dict):
        raise InvalidRequest("`output_config.format` must be an object.", param="output_config.format")
    given = newer or body.output_format or {}
    if newer and body.output_format and newer != body.output_format:
        raise InvalidRequest("`output_config.format` and `output_format` differ; send one.", param="output_format")
    if not given:
        return None
    known = _known(given, "output_config.format", _FORMAT_FIELDS, frozenset(), ignored)
    if known.get("type") != "json_schema":
        raise InvalidRequest("`output_config.format.type` must be json_schema.", param="output_config.format.type")
    if not isinstance(known.get("schema"), dict):
        raise InvalidRequest("`output_config.format.schema` must be an object.", param="output_config.format.schema")
    schema = msgspec.json.encode(known["schema"]).decode()
    shared.only_one({"output_config.format.schema": Grammar(kind="json_schema", source=schema)})
    return schema


def _known(
    table: Mapping[str, Any] | None, at: str, known: frozenset[str], hints: frozenset[str], ignored: Ignored
) -> dict[str, Any]:
    for name in (table or {}).keys() - known - hints:
        ignored.add(f"{at}.{name}")
    return {name: value for name, value in (table or {}).items() if name in known and value is not None}


def _prefill(request: ChatRequest) -> tuple[str, ChatRequest]:
    """A last message of the assistant is what the answer begins with; the request without it.

    Raises: InvalidRequest where nothing can go on after it.
    """
    last = request.messages[-1]
    if last["role"] != "assistant":
        return "", request
    text = last["content"]
    at = "The last message, which the answer would go on with,"
    if "tool_calls" in last:
        raise InvalidRequest(f"{at} calls tools; send their results.", param="messages")
    if not text or text != text.rstrip():
        raise InvalidRequest(f"{at} is empty or ends with white space.", param="messages")
    if len(request.messages) == 1 or request.response_format is not None or request.tool_choice not in ("auto", "none"):
        raise InvalidRequest(
            f"{at} does not go with a format, with a tool that must be called, or without a question.", param="messages"
        )
    if request.thinking not in (Dial(switch=False), Dial(level="none"), Dial(budget=0)):
        raise InvalidRequest(f"{at} does not go with thinking, which would come before it.", param="thinking")
    return text, msgspec.structs.replace(request, messages=request.messages[:-1])
