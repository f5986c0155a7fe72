"""Every field that the official client can send is honoured, taken as a hint, or refused by its name.

The client's own types are the table: a field that a newer client brings is missing here until it is decided on.
"""

from __future__ import annotations

import ast
import inspect
import typing
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import typing_extensions
from openai.types import (
    batch_create_params,
    completion_create_params,
    embedding_create_params,
    file_create_params,
    file_purpose,
    moderation_create_params,
    upload_complete_params,
    upload_create_params,
)
from openai.types.chat import (
    ChatCompletionContentPartRefusalParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageFunctionToolCallParam,
    ChatCompletionMessageParam,
    ChatCompletionStreamOptionsParam,
    chat_completion_message_function_tool_call_param,
)
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.conversations import conversation_create_params, conversation_update_params, item_create_params
from openai.types.responses import (
    FunctionToolParam,
    ResponseFormatTextJSONSchemaConfigParam,
    ResponseIncludable,
    ResponseInputItemParam,
    ResponseTextConfigParam,
    ToolParam,
    input_token_count_params,
    response_compact_params,
    response_create_params,
)
from openai.types.shared_params import FunctionDefinition, Reasoning, response_format_json_schema
from openai.types.shared_params.reasoning_effort import ReasoningEffort

from nimbos.api import (
    batches,
    chat_request,
    fields,
    files,
    messages,
    moderations,
    openai_chat,
    openai_completions,
    openai_embeddings,
    responses,
    responses_answer,
    responses_compact,
    responses_conversations,
    responses_items,
    responses_record,
    responses_request,
    responses_tools,
    uploads,
)
from nimbos.chat.dial import LEVEL_TOKENS
from tests.live import Live, error_of
from tests.test_docs import page

CHAT = (chat_request, fields, openai_chat)
RESPONSES = (responses_request, responses_answer, responses_record, responses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """`read_in`: where what is honoured is read. `elsewhere`: fields that do not stand in the body."""

    theirs: Any
    ours: Any
    read_in: tuple[ModuleType, ...]
    refused: dict[str, str] = field(default_factory=dict)
    hints: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()


REQUESTS = {
    "chat": Request(
        theirs=chat_create_params.CompletionCreateParamsStreaming,
        ours=chat_request.ChatBody,
        read_in=CHAT,
        refused=chat_request.REFUSED,
        hints=frozenset(
            [
                "metadata",
                "prediction",
                "prompt_cache_key",
                "prompt_cache_options",
                "prompt_cache_retention",
                "safety_identifier",
                "user",
            ]
        ),
    ),
    "completions": Request(
        theirs=completion_create_params.CompletionCreateParamsStreaming,
        ours=openai_completions.CompletionsBody,
        read_in=(openai_completions, fields),
        hints=frozenset(["user"]),
    ),
    "embeddings": Request(
        theirs=embedding_create_params.EmbeddingCreateParams,
        ours=openai_embeddings.EmbeddingsBody,
        read_in=(openai_embeddings,),
        hints=frozenset(["user"]),
    ),
    "moderations": Request(
        theirs=moderation_create_params.ModerationCreateParams,
        ours=moderations.ModerationsBody,
        read_in=(moderations,),
    ),
    "responses": Request(
        theirs=response_create_params.ResponseCreateParamsStreaming,
        ours=responses_request.ResponsesBody,
        read_in=RESPONSES,
        refused=responses_request.REFUSED,
        hints=frozenset(["context_management", "prompt_cache_retention"]),
    ),
    "input_tokens": Request(
        theirs=input_token_count_params.InputTokenCountParams,
        ours=responses_request.CountBody,
        read_in=RESPONSES,
        hints=frozenset(["personality"]),
    ),
    "compact": Request(
        theirs=response_compact_params.ResponseCompactParams,
        ours=responses_compact.CompactBody,
        read_in=(responses_compact,),
        refused={"image": responses_request.REFUSED["image"]},
        hints=frozenset(["prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"]),
    ),
    "conversations": Request(
        theirs=conversation_create_params.ConversationCreateParams,
        ours=responses_conversations.CreateBody,
        read_in=(responses_conversations,),
    ),
    "conversation": Request(
        theirs=conversation_update_params.ConversationUpdateParams,
        ours=responses_conversations.UpdateBody,
        read_in=(responses_conversations,),
    ),
    "items": Request(
        theirs=item_create_params.ItemCreateParams,
        ours=responses_conversations.ItemsBody,
        read_in=(responses_conversations,),
        elsewhere=frozenset(["include"]),
    ),
    "batches": Request(theirs=batch_create_params.BatchCreateParams, ours=batches.BatchBody, read_in=(batches,)),
    "uploads": Request(
        theirs=upload_create_params.UploadCreateParams,
        ours=uploads.UploadBody,
        read_in=(uploads,),
        hints=frozenset(["mime_type"]),
    ),
    "upload": Request(
        theirs=upload_complete_params.UploadCompleteParams, ours=uploads.CompleteBody, read_in=(uploads,)
    ),
}

# Objects inside of a request whose other fields are refused with their path.
INNER = [
    (ChatCompletionStreamOptionsParam, fields.StreamOptions),
    (response_format_json_schema.ResponseFormatJSONSchema, chat_request.ResponseFormat),
    (response_format_json_schema.JSONSchema, chat_request._JsonSchema),
    (Reasoning, responses_request.Reasoning),
    (ResponseTextConfigParam, responses_request.TextConfig),
    (ResponseFormatTextJSONSchemaConfigParam, responses_request.TextFormat),
    (response_create_params.StreamOptions, responses_request.StreamOptions),
    (response_create_params.BackgroundOptions, responses_request.BackgroundOptions),
    (response_create_params.PromptCacheOptions, responses_request.CacheOptions),
    (response_create_params.ContextManagement, responses_request.Compaction),
    (batch_create_params.OutputExpiresAfter, batches.ExpiresAfter),
    (upload_create_params.ExpiresAfter, batches.ExpiresAfter),
]

# Objects of which what is not named here is passed over, so that each field of theirs has to be.
LENIENT = [
    (ChatCompletionContentPartTextParam, {"type", "text", "prompt_cache_breakpoint"}),
    (ChatCompletionContentPartRefusalParam, {"type", "refusal"}),
    (ChatCompletionFunctionToolParam, {"type", "function"}),
    (FunctionDefinition, {"name", "description", "parameters", "strict"}),
    (ChatCompletionMessageFunctionToolCallParam, {"id", "type", "function"}),
    (chat_completion_message_function_tool_call_param.Function, {"name", "arguments"}),
]


def keys(theirs: Any) -> set[str]:
    return {*theirs.__required_keys__, *theirs.__optional_keys__}


def read(modules: tuple[ModuleType, ...]) -> set[str]:
    """Names that are read of a body, or looked up by a list of names."""
    found: set[str] = set()
    for module in modules:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
                found |= {node.attr} if name in ("body", "call", "decoded", "fields", "self") else set()
            elif isinstance(node, ast.Tuple):
                found |= {str(one.value) for one in node.elts if isinstance(one, ast.Constant)}
    return found


def words(kind: Any) -> set[str]:
    """All strings of the literals in a type."""
    if isinstance(kind, str):
        return {kind}
    return {word for argument in typing.get_args(kind) for word in words(argument)}


def kinds(union: Any) -> set[str]:
    """Values of `type` in its members."""
    return {
        word
        for member in typing.get_args(union)
        for word in words(typing_extensions.get_type_hints(member).get("type", None))
    }


@pytest.mark.parametrize("name", REQUESTS)
def test_every_field_of_a_request_is_known(name: str) -> None:
    request = REQUESTS[name]
    known = {*request.ours.__struct_fields__, *request.refused, *request.elsewhere}
    assert not keys(request.theirs) - known


@pytest.mark.parametrize("name", REQUESTS)
def test_every_field_that_is_taken_is_honoured_or_a_hint(name: str) -> None:
    request = REQUESTS[name]
    taken = keys(request.theirs) & {*request.ours.__struct_fields__}
    assert request.hints <= taken
    assert not taken - read(request.read_in) - request.hints
    told = page("docs/compatibility.md") + page("docs/responses.md") + page("docs/api.md") + page("docs/batches.md")
    assert not [hint for hint in request.hints if f"`{hint}`" not in told.replace("`prompt_cache_…`", "")]


@pytest.mark.parametrize(("theirs", "ours"), INNER)
def test_every_field_inside_a_request_is_known_or_refused_with_its_path(theirs: Any, ours: Any) -> None:
    assert ours.__struct_config__.forbid_unknown_fields
    assert not keys(theirs) - {*ours.__struct_fields__}


@pytest.mark.parametrize(("theirs", "known"), LENIENT)
def test_every_field_that_could_be_passed_over_is_known(theirs: Any, known: set[str]) -> None:
    assert keys(theirs) == known


def test_messages_items_tools_and_files_are_known_by_their_fields() -> None:
    roles = {key for member in typing.get_args(ChatCompletionMessageParam) for key in keys(member)}
    assert roles - messages._FIELDS - messages._ECHOES == {"audio", "function_call"}  # refused by their paths
    assert kinds(ResponseInputItemParam) <= {*responses_items._FIELDS, *responses_items._FOREIGN}
    tools = {kind.rsplit("_20", 1)[0] for kind in kinds(ToolParam)}  # web_search_2025_08_26
    assert tools <= {"function", *responses_tools._REFUSED}
    passed = {"allowed_callers", "async", "defer_loading", "output_schema"}  # as long as they change nothing
    assert keys(FunctionToolParam) - responses_tools._FIELDS <= passed
    assert keys(file_create_params.FileCreateParams) == {"file", *(name.split("[")[0] for name in files._FIELDS)}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (ReasoningEffort, LEVEL_TOKENS),
        (ResponseIncludable, responses_request.INCLUDES),
        (file_purpose.FilePurpose, files.PURPOSES),
        (
            typing_extensions.get_type_hints(chat_create_params.CompletionCreateParamsStreaming)["service_tier"],
            words(fields.Tier),
        ),
    ],
    ids=["effort", "include", "purpose", "tier"],
)
def test_every_word_of_a_list_is_known(theirs: Any, ours: Any) -> None:
    assert words(theirs)
    assert not words(theirs) - {*ours}


@pytest.mark.parametrize("name", sorted(chat_request.REFUSED))
def test_a_field_of_chat_that_is_refused_is_named_with_the_reason(live: Live, name: str) -> None:
    error = error_of(live.chat(**{name: {"x": 1}}), 400)
    assert (error["code"], error["param"]) == ("unsupported_field", name)
    assert chat_request.REFUSED[name] in error["message"]


LISTS = {
    "/v1/files": {"after": "file_x", "limit": "1", "order": "asc", "purpose": "batch"},
    "/v1/batches": {"after": "batch_x", "limit": "1"},
    "/v1/responses/{response}/input_items": {"include[]": "web_search_call.results", "limit": "1", "order": "asc"},
    "/v1/conversations/{conversation}/items": {"include[]": "web_search_call.results", "limit": "1", "order": "asc"},
    "/v1/responses/{response}": {"include[]": "web_search_call.results", "include_obfuscation": "true"},
}


@pytest.mark.parametrize("path", LISTS)
def test_every_parameter_of_a_list_is_taken_and_no_other(live: Live, path: str) -> None:
    response = live.client.responses.create(model="demo", input="hi").id
    conversation = live.client.conversations.create(items=[{"role": "user", "content": "hi"}]).id
    place = path.format(response=response, conversation=conversation)
    for name, value in LISTS[path].items():
        assert live.http.get(place, params={name: value}).status_code == 200, name
    assert error_of(live.http.get(place, params={"frobnicate": "1"}), 400)["param"] == "frobnicate"
