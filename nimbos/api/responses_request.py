"""The body of `POST /v1/responses`, and what it asks of `chat` and of the engine.

Every field of OpenAI's request is here: honoured, or refused by name with the reason. Items are in
`responses_items.py`, tools in `responses_tools.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from nimbos.api import fields as shared
from nimbos.api.dialogue import Asked
from nimbos.api.responses_items import Item
from nimbos.api.responses_messages import messages_of
from nimbos.api.responses_tools import chat_choice, chat_tools
from nimbos.chat import ChatRequest, Dial
from nimbos.errors import InvalidRequest, UnsupportedField
from nimbos.types import Account, Grammar, ModelCard, Origin, Sampling

REFUSED = {
    "access_programs": "there are none here",
    "image": "models here read text only",
    "moderation": "send the text to a moderation route of your own",
    "prompt": "prompt templates are not kept here; send `instructions` and `input`",
}

_PAIRS_MAX, _KEY_CHARACTERS, _VALUE_CHARACTERS = 16, 64, 512
_LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"
# What these would include cannot be there: nothing here reads pictures or runs hosted tools.
_EMPTY_INCLUDES = frozenset(
    [
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
    ]
)
INCLUDES = frozenset([_LOGPROBS, ENCRYPTED, *_EMPTY_INCLUDES])
_DIAL = ("enable_thinking", "thinking_budget", "reasoning_effort", "chat_template_kwargs")
_SCHEMA_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ConversationId(msgspec.Struct, forbid_unknown_fields=True):
    id: str


class Reasoning(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`context` and `mode` have one value each that models here have."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None


class BackgroundOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`continuation_id` groups requests elsewhere; a hint."""

    completion_window: str | None = None
    continuation_id: str | None = None


class CacheOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`mode` and `ttl` are hints: prefixes are shared by themselves, for as long as there is room."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m", "12h"] | None = None
    comparison_response_id: str | None = None
    prewarm: bool | None = None


class Compaction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A hint: nothing is compacted unasked. A context that is too long is a 400, or what `truncation` says."""

    type: Literal["compaction"]
    compact_threshold: int | None = None


class ContextFields(msgspec.Struct, kw_only=True):
    """What makes the prompt; also the body of `POST /v1/responses/input_tokens`."""

    model: str
    input: str | list[Any] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationId | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None

    enable_thinking: Any = None
    thinking_budget: Any = None
    reasoning_effort: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def conversation_id(self) -> str | None:
        return self.conversation.id if isinstance(self.conversation, ConversationId) else self.conversation


class CountBody(ContextFields, kw_only=True):
    """`personality` is a hint; models here have one each."""

    personality: str | None = None


class ResponsesBody(ContextFields, kw_only=True):
    """Hints that cannot change the answer are taken: `user`, `safety_identifier`, `prompt_cache_…`,
    `context_management`. `max_tool_calls` bounds calls of hosted tools, of which there are none."""

    background: bool | None = None
    background_options: BackgroundOptions | None = None
    context_management: list[Compaction] | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: shared.Tier | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_logprobs: int | None = None
    top_p: float | None = None
    user: str | None = None

    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    x_nimbos: shared.NimbosFields | None = None


def check(body: ResponsesBody) -> None:
    """Everything that can be told from the body alone.

    Raises: InvalidRequest, UnsupportedField naming the field.
    """
    check_context_fields(body)
    _check_metadata(body.metadata)
    include = body.include or []
    unknown = next((name for name in include if name not in INCLUDES), None)
    if unknown is not None:
        raise InvalidRequest(
            f"`include` names {unknown[:60]!r}; it may name {', '.join(sorted(INCLUDES))}.", param="include"
        )
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= shared.TOP_LOGPROBS_MAX:
        limit = shared.TOP_LOGPROBS_MAX
        raise InvalidRequest(
            f"`top_logprobs` is {body.top_logprobs}; it must be from 0 to {limit}.", param="top_logprobs"
        )
    if body.top_logprobs and _LOGPROBS not in include:
        raise InvalidRequest(f"`top_logprobs` needs `include: [{_LOGPROBS!r}]`.", param="top_logprobs")
    for name in ("max_output_tokens", "max_tool_calls"):
        value = getattr(body, name)
        if value is not None and not 1 <= value < 2**31:
            raise InvalidRequest(f"`{name}` is {value}; it must be 1 or more.", param=name)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("`stream_options` is only allowed with `stream: true`.", param="stream_options")
    if body.background and body.store is False:
        raise InvalidRequest("`background: true` needs `store`: there is nobody else to give it to.", param="store")
    _check_fixed(body)


def check_context_fields(body: ContextFields) -> None:
    if body.previous_response_id is not None and body.conversation is not None:
        raise InvalidRequest("`previous_response_id` and `conversation` are two pasts; give one.", param="conversation")
    if not body.input and body.previous_response_id is None and body.conversation is None:
        raise InvalidRequest("There is no `input`, and nothing that came before it.", param="input")
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        raise UnsupportedField("text.verbosity", why=f"{body.text.verbosity!r}; these models know only 'medium'")
    reasoning = body.reasoning or Reasoning()
    if reasoning.context not in (None, "auto"):
        raise UnsupportedField("reasoning.context", why="not 'auto': the model's own template decides what it shows")
    if reasoning.mode not in (None, "standard"):
        raise UnsupportedField("reasoning.mode", why="not 'standard', the only one here")
    asked = summary_asked(body)
    if asked not in (None, "auto", "detailed"):
        raise UnsupportedField(
            "reasoning.summary", why=f"{asked[:40]!r}; 'auto' and 'detailed' give the thinking whole"
        )


def _check_fixed(body: ResponsesBody) -> None:
    """Fields of which one value alone is supported."""
    options = body.background_options or BackgroundOptions()
    if options.completion_window not in (None, "soonest"):
        raise UnsupportedField(
            "background_options.completion_window", why="not 'soonest'; `service_tier: 'flex'` makes it wait for others"
        )
    cache = body.prompt_cache_options or CacheOptions()
    if cache.prewarm:
        raise UnsupportedField("prompt_cache_options.prewarm", why="not supported: every response has an answer")
    if cache.comparison_response_id is not None:
        raise UnsupportedField("prompt_cache_options.comparison_response_id", why="not supported: no such diagnosis")


def _check_metadata(metadata: dict[str, str] | None) -> None:
    metadata = metadata or {}
    if len(metadata) > _PAIRS_MAX:
        raise InvalidRequest(f"`metadata` has {len(metadata)} pairs; there may be {_PAIRS_MAX}.", param="metadata")
    for key, value in metadata.items():
        if len(key) > _KEY_CHARACTERS or len(value) > _VALUE_CHARACTERS:
            raise InvalidRequest(
                f"Keys of `metadata` may have {_KEY_CHARACTERS} characters, values {_VALUE_CHARACTERS}.",
                param="metadata",
            )


def metadata_of(metadata: dict[str, str] | None) -> dict[str, str]:
    """Raises: InvalidRequest."""
    _check_metadata(metadata)
    return metadata or {}


def asked(
    body: ResponsesBody,
    items: list[Item],
    account: Account,
    sampling: Sampling,
    *,
    header_class: str | None,
    origin: Origin,
) -> Asked:
    """`items`: the whole context. Raises: InvalidRequest naming the field; Forbidden for a class."""
    extension = body.x_nimbos.ask_class if body.x_nimbos is not None else None
    return Asked(
        model=body.model,
        request=request_of(body, items),
        sampling=sampling,
        ask_class=shared.class_of(body.service_tier, extension, header_class, account),
        limit_tokens=body.max_output_tokens,
        origin=origin,
    )


def request_of(body: ResponsesBody, items: list[Item]) -> Callable[[ModelCard], ChatRequest]:
    return lambda card: chat_request(body, items, card, limit=body.max_output_tokens, grammar=_own_grammar(body))


def sampling_of(body: ResponsesBody) -> Sampling:
    """Raises: InvalidRequest naming the field and its range."""
    fields = shared.SamplingFields(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        typical_p=body.typical_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        seed=body.seed,
    )
    wanted = _LOGPROBS in (body.include or [])
    return shared.sampling_of(fields, logprobs=(body.top_logprobs or 0) if wanted else None)


def chat_request(
    body: ContextFields, items: list[Item], card: ModelCard, *, limit: int | None = None, grammar: Grammar | None = None
) -> ChatRequest:
    """Raises: InvalidRequest, UnsupportedField."""
    tools, choice = chat_choice(chat_tools(body.tools), body.tool_choice)
    shape = format_schema(body)
    if grammar is not None and shape is not None:
        raise InvalidRequest("`text.format` and `x_nimbos.grammar` both say what the answer looks like.", param="text")
    return ChatRequest(
        messages=messages_of(items, instructions=body.instructions),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        response_format=shape,
        grammar=grammar,
        thinking=Dial.read(_dial_fields(body)),
        max_tokens=limit,
        context_tokens=card.context_tokens,
        template_kwargs=body.chat_template_kwargs or {},
    )


def summary_asked(body: ContextFields) -> str | None:
    reasoning = body.reasoning or Reasoning()
    return reasoning.summary or reasoning.generate_summary


def format_schema(body: ContextFields) -> str | None:
    """None, "json_object", or the schema as JSON text."""
    given = body.text.format if body.text is not None else None
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return "json_object"
    if given.schema is None:
        raise InvalidRequest("`text.format.schema` is missing.", param="text.format.schema")
    if given.name is None or not _SCHEMA_NAME.fullmatch(given.name):
        raise InvalidRequest("`text.format.name` must have 1 to 64 letters, digits, _ or -", param="text.format.name")
    schema = msgspec.json.encode(given.schema).decode()
    shared.only_one({"text.format": Grammar(kind="json_schema", source=schema)})
    return schema


def _own_grammar(body: ResponsesBody) -> Grammar | None:
    if body.x_nimbos is None or body.x_nimbos.grammar is None:
        return None
    return shared.only_one({"x_nimbos.grammar": body.x_nimbos.grammar})


def _dial_fields(body: ContextFields) -> dict[str, Any]:
    found = {name: value for name in _DIAL if (value := getattr(body, name)) is not None}
    if body.reasoning is not None and body.reasoning.effort is not None:
        found["reasoning"] = {"effort": body.reasoning.effort}
    return found
