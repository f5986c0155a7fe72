"""What DashScope's generation routes take, `{"model", "input", "parameters"}`, in the words of `chat_request.py`.

Read `dashscope_generation.py` for the routes. Parts of a message that are not text are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from starlette.datastructures import Headers

from nimbos.api.chat_request import ChatBody, ResponseFormat
from nimbos.api.lenient import Ignored, object_at, read_known
from nimbos.api.messages import MESSAGES_MAX, ToolChoice
from nimbos.api.pairing import pair_results
from nimbos.errors import InvalidRequest, UnsupportedField

_TEXT_ONLY = "this server's models read and write text only"

REFUSED_PARAMETERS = {
    "audio": _TEXT_ONLY,
    "enable_code_interpreter": "there is no code interpreter in this route",
    "enable_search": "there is no web search in this route",
    "modalities": _TEXT_ONLY,
    "ocr_options": _TEXT_ONLY,
    "preserve_thinking": "the model's own template decides which earlier thinking it sees",
    "translation_options": "there is no translation model",
}
REFUSED_INPUT = {
    "customized_model_id": "name the model in `model`",
    "file_ids": "there are no files in this route",
    "language_type": _TEXT_ONLY,
    "text": "there is no speech model; send `messages`",
    "voice": _TEXT_ONLY,
}
REFUSED_HEADERS = {
    "x-dashscope-async": "ask without it: answers are streamed or whole",
    "x-dashscope-encryptionkey": "send plain JSON, over TLS",
    "x-dashscope-plugin": "there are no plugins; give `tools`",
}
_REFUSED_MESSAGE = {
    "audio": _TEXT_ONLY,
    "images": _TEXT_ONLY,
    "partial": "an answer cannot go on from a beginning",
    "prefix": "an answer cannot go on from a beginning",
}
_BESIDE_TEXT = frozenset({"type", "cache_control"})
_MEDIA = frozenset({"audio", "file", "image", "image_url", "input_audio", "video", "video_url"})


class Parameters(msgspec.Struct, kw_only=True):
    """`stop` is a string, strings or token ids. `typical_p`, `min_p` and `frequency_penalty` are ours besides."""

    result_format: Literal["text", "message"] | None = None
    incremental_output: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: Any = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    enable_thinking: bool | None = None
    thinking_budget: int | None = None
    reasoning_effort: str | None = None
    stream: bool | None = None


class _Message(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[Any] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class _Turn(msgspec.Struct):
    user: str
    bot: str


class _Input(msgspec.Struct, kw_only=True):
    prompt: str | None = None
    history: list[_Turn] | None = None
    messages: list[Any] | None = None


class _Model(msgspec.Struct, kw_only=True):
    model: str


class GenerationBody(_Model, kw_only=True):
    """The whole body, as our description of the API has it; it is read part by part."""

    input: _Input
    parameters: Parameters | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How the answer is written. `text`: `output.text` instead of choices. `parts`: contents are lists of parts."""

    text: bool
    incremental: bool
    parts: bool


def read_model(table: Mapping[str, Any], ignored: Ignored, headers: Headers) -> str:
    """The model that a DashScope body asks for; what stands beside its three fields is ignored.

    Raises: InvalidRequest; UnsupportedField for headers that would change the answer.
    """
    for name, why in REFUSED_HEADERS.items():
        if headers.get(name):
            raise UnsupportedField(name, why=f"not supported here: {why}")
    rest = {name: value for name, value in table.items() if name not in ("input", "parameters")}
    return read_known(rest, _Model, ignored).model


def read_chat(table: Mapping[str, Any], ignored: Ignored, headers: Headers, *, parts: bool) -> tuple[ChatBody, Form]:
    """`parts`: of the multimodal route.

    Raises: InvalidRequest, UnsupportedField with the path.
    """
    model = read_model(table, ignored, headers)
    parameters = read_known(
        object_at(table, "parameters"), Parameters, ignored, at="parameters", refused=REFUSED_PARAMETERS
    )
    stops, stop_ids = _stops(parameters.stop)
    body = ChatBody(
        model=model,
        messages=pair_results(_messages(object_at(table, "input"), ignored)),
        temperature=parameters.temperature,
        top_p=parameters.top_p,
        top_k=parameters.top_k,
        min_p=parameters.min_p,
        typical_p=parameters.typical_p,
        repetition_penalty=parameters.repetition_penalty,
        presence_penalty=parameters.presence_penalty,
        frequency_penalty=parameters.frequency_penalty,
        max_tokens=parameters.max_tokens,
        seed=parameters.seed,
        stop=stops,
        stop_token_ids=stop_ids,
        n=parameters.n,
        logprobs=parameters.logprobs,
        top_logprobs=parameters.top_logprobs if parameters.logprobs else None,
        tools=parameters.tools,
        tool_choice=parameters.tool_choice,
        parallel_tool_calls=parameters.parallel_tool_calls,
        response_format=parameters.response_format,
        enable_thinking=parameters.enable_thinking,
        thinking_budget=parameters.thinking_budget,
        reasoning_effort=parameters.reasoning_effort,
    )
    return body, _form(parameters, parts=parts)


def wants_stream(headers: Headers, table: Mapping[str, Any]) -> bool:
    """By the headers, as the original has it, or by `parameters.stream`."""
    if headers.get("x-dashscope-sse", "").lower() == "enable":
        return True
    parameters = table.get("parameters")
    asked = isinstance(parameters, dict) and parameters.get("stream") is True
    return asked or "text/event-stream" in headers.get("accept", "")


def _form(parameters: Parameters, *, parts: bool) -> Form:
    """Where nobody says, it is text, unless the answer may hold what has no place there."""
    more = {
        "tools": bool(parameters.tools),
        "n": (parameters.n or 1) > 1,
        "logprobs": bool(parameters.logprobs),
    }
    beyond = next((name for name, given in more.items() if given), None)
    if parameters.result_format == "text" and beyond is not None:
        raise InvalidRequest(
            f"`parameters.result_format` is 'text', where `{beyond}` has no place; send 'message'.",
            param="parameters.result_format",
        )
    thinks = bool(parameters.enable_thinking or parameters.thinking_budget)
    text = parameters.result_format == "text" or (parameters.result_format is None and beyond is None and not thinks)
    return Form(text=text and not parts, incremental=bool(parameters.incremental_output), parts=parts)


def _stops(given: Any) -> tuple[str | list[str] | None, list[int] | None]:
    """Strings, or ids of tokens, each also in a list of its own. Raises: UnsupportedField for several ids in a row."""
    if given is None or isinstance(given, str):
        return given, None
    rows = given if isinstance(given, list) else [None]
    stops: list[Any] = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in rows]
    if all(isinstance(stop, str) for stop in stops):
        return stops, None
    if all(isinstance(stop, int) and not isinstance(stop, bool) for stop in stops):
        return None, stops
    if any(isinstance(stop, list) for stop in stops):
        raise UnsupportedField("parameters.stop", why="given as several token ids in a row; give a string")
    raise InvalidRequest(
        "`parameters.stop` must be a string, or a list of strings or of ids of tokens.", param="parameters.stop"
    )


def _messages(table: Mapping[str, Any], ignored: Ignored) -> list[dict[str, Any]]:
    given = read_known(table, _Input, ignored, at="input", refused=REFUSED_INPUT)
    if given.messages is not None and (given.prompt is not None or given.history is not None):
        other = "input.prompt" if given.prompt is not None else "input.history"
        raise InvalidRequest(f"`input.messages` and `{other}` both hold the conversation; give one.", param=other)
    if given.messages is None:
        if given.prompt is None:
            raise InvalidRequest("`input` has neither `messages` nor `prompt`.", param="input")
        turns = given.history or []
        said = [(("user", turn.user), ("assistant", turn.bot)) for turn in turns]
        pairs = [one for turn in said for one in turn]
        return [{"role": role, "content": content} for role, content in (*pairs, ("user", given.prompt))]
    if len(given.messages) > MESSAGES_MAX:
        raise InvalidRequest(f"There may be {MESSAGES_MAX} messages; here are {len(given.messages)}.", param="input")
    return [_message(message, f"input.messages[{number}]", ignored) for number, message in enumerate(given.messages)]


def _message(given: Any, at: str, ignored: Ignored) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InvalidRequest(f"`{at}` is not an object.", param=at)
    message = read_known(given, _Message, ignored, at=at, refused=_REFUSED_MESSAGE)
    plain = {name: value for name, value in msgspec.structs.asdict(message).items() if value is not None}
    if isinstance(message.content, list):
        plain["content"] = [_part(part, f"{at}.content[{i}]", ignored) for i, part in enumerate(message.content)]
    return plain


def _part(part: Any, at: str, ignored: Ignored) -> dict[str, Any]:
    """`{"text": "…"}` or OpenAI's text part, with a mark for the cache (`cache_marks.py`) where there is one."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise InvalidRequest(f"`{at}` is not an object.", param=at)
    kind = part.get("type")
    for name in part:
        if name in _MEDIA or (name == "type" and kind in _MEDIA):
            named = kind if name == "type" else name
            raise UnsupportedField(f"{at}.{named}", why=f"not supported: {_TEXT_ONLY}")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"`{at}` holds no text.", param=at)
    for name in part:
        if name != "text" and name not in _BESIDE_TEXT:
            ignored.add(f"{at}.{name}")
    marker = {"cache_control": part["cache_control"]} if part.get("cache_control") is not None else {}
    return {"type": "text", "text": text, **marker}
