"""What Ollama's chat and generate take, in the words of `chat_request.py`. Read `ollama_chat.py` for the routes.

`options` that tell Ollama how to load a model mean nothing here and are ignored by name; those that would sample
otherwise are honoured or refused. A prompt is never cut: `num_ctx` is a wish that the model's context must hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from nimbos.api import body as bodies
from nimbos.api.chat_request import ChatBody, ResponseFormat
from nimbos.api.lenient import Ignored, object_at, read_known
from nimbos.api.messages import MESSAGES_MAX
from nimbos.api.pairing import pair_results
from nimbos.errors import InvalidRequest
from nimbos.types import ModelCard, Sampling

LATEST = ":latest"
_TEXT_ONLY = "this server's models read and write text only"

REFUSED_GENERATE = {
    "context": "send the conversation to /api/chat; what is shared is found in memory by itself",
    "height": _TEXT_ONLY,
    "images": _TEXT_ONLY,
    "steps": _TEXT_ONLY,
    "template": "the model's own template is used; `raw` sends a prompt without one",
    "width": _TEXT_ONLY,
}
REFUSED_OPTIONS = {"mirostat": "sample with temperature, top_k, top_p, min_p or typical_p"}
_NEUTRAL_TAIL = 1.0  # of `tfs_z`: it does nothing


class Options(msgspec.Struct, kw_only=True):
    """`num_predict`: -1 and -2 are until the context ends. `seed` below 0: one that is made up.
    `repeat_last_n`: 0 is no penalties, -1 the whole context."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    tfs_z: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    num_predict: int | None = None
    num_ctx: int | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class _Common(msgspec.Struct, kw_only=True):
    model: str
    stream: bool | None = None
    format: Any = None
    think: Any = None
    keep_alive: float | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class ChatCall(_Common, kw_only=True):
    messages: list[Any] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateCall(_Common, kw_only=True):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None


class OllamaChatBody(ChatCall, kw_only=True):
    """With its options, for our description of the API, as the next one."""

    options: Options | None = None


class OllamaGenerateBody(GenerateCall, kw_only=True):
    options: Options | None = None


class _Message(msgspec.Struct, kw_only=True):
    role: str
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[Any] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """`body` holds the chat, `options` what it has no words for. With `keep_alive` 0 the model may go."""

    body: ChatBody
    options: Options
    stream: bool
    model: str  # as the client wrote it
    keep_alive: float | str | None

    def check_window(self, card: ModelCard) -> None:
        """Raises: InvalidRequest with both counts."""
        asked = self.options.num_ctx
        if asked is not None and asked > card.context_tokens:
            raise InvalidRequest(
                f"`options.num_ctx` is {asked}, and the context of {card.id!r} has {card.context_tokens} tokens. "
                "Ask for fewer, or for a model with a larger context.",
                param="options.num_ctx",
            )

    def penalised(self, sampling: Sampling, card: ModelCard) -> Sampling:
        """With the window of tokens that penalties look at."""
        last = self.options.repeat_last_n
        if last is None:
            return sampling
        if last == 0:
            return msgspec.structs.replace(
                sampling, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0
            )
        window = card.context_tokens if last == -1 else last
        return msgspec.structs.replace(sampling, penalty_window=window)


def plain_name(name: str) -> str:
    """Ollama's clients write `:latest` behind a name without a tag; no model of ours is called so."""
    return name.removesuffix(LATEST)


def read_chat(table: Mapping[str, Any], ignored: Ignored) -> Wanted:
    """Raises: InvalidRequest, UnsupportedField with the path."""
    call = read_known(_without_cuts(table, ignored), ChatCall, ignored)
    given = call.messages or []
    if len(given) > MESSAGES_MAX:
        raise InvalidRequest(f"There may be {MESSAGES_MAX} messages; here are {len(given)}.", param="messages")
    messages = pair_results([_message(one, f"messages[{number}]", ignored) for number, one in enumerate(given)])
    return _wanted(call, messages, call.tools or None, object_at(table, "options"), ignored)


def read_generate(table: Mapping[str, Any], ignored: Ignored) -> tuple[Wanted, GenerateCall]:
    """Raises: InvalidRequest, UnsupportedField with the path."""
    call = read_known(_without_cuts(table, ignored), GenerateCall, ignored, refused=REFUSED_GENERATE)
    bare = "raw" if call.raw else "suffix" if call.suffix else None
    beside = "system" if call.system else "think" if call.think else None
    if bare is not None and beside is not None:
        raise InvalidRequest(f"`{bare}` sends the prompt without a template, so `{beside}` has no place.", param=beside)
    messages = [{"role": "system", "content": call.system}] if call.system else []
    messages += [{"role": "user", "content": call.prompt}] if call.prompt else []
    return _wanted(call, messages, None, object_at(table, "options"), ignored), call


def read_options(table: Mapping[str, Any], ignored: Ignored) -> Options:
    options = read_known(table, Options, ignored, at="options", refused=REFUSED_OPTIONS)
    _check_least("num_predict", options.num_predict, -2)
    _check_least("repeat_last_n", options.repeat_last_n, -1)
    _check_least("num_ctx", options.num_ctx, 1)
    if options.tfs_z not in (None, _NEUTRAL_TAIL):
        raise InvalidRequest("`options.tfs_z` is not supported; 1.0 does nothing and is taken.", param="options.tfs_z")
    return options


def _without_cuts(table: Mapping[str, Any], ignored: Ignored) -> dict[str, Any]:
    """`truncate` and `shift` ask for what is never done here; false is what is."""
    for name in ("truncate", "shift"):
        if table.get(name):
            ignored.add(name, known=True)
    return {name: value for name, value in table.items() if name not in ("truncate", "shift", "options")}


def _wanted(
    call: ChatCall | GenerateCall,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    given: Mapping[str, Any],
    ignored: Ignored,
) -> Wanted:
    options = read_options(given, ignored)
    limit = options.num_predict
    body = ChatBody(
        model=plain_name(call.model),
        messages=messages,
        tools=tools,
        response_format=_format(call.format),
        think=call.think,
        logprobs=call.logprobs,
        top_logprobs=call.top_logprobs if call.logprobs else None,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        typical_p=options.typical_p,
        seed=options.seed if options.seed is not None and options.seed >= 0 else None,
        stop=options.stop or None,
        max_tokens=limit if limit is not None and limit > 0 else None,
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
    )
    return Wanted(
        body=body, options=options, stream=call.stream is not False, model=call.model, keep_alive=call.keep_alive
    )


def _format(given: Any) -> ResponseFormat | None:
    if given in (None, ""):
        return None
    if given == "json":
        return ResponseFormat(type="json_object")
    if isinstance(given, dict):
        table = {"type": "json_schema", "json_schema": {"name": "format", "schema": given}}
        return bodies.convert(table, ResponseFormat, at="format")
    raise InvalidRequest('`format` must be "json" or a JSON Schema object.', param="format")


def _message(given: Any, at: str, ignored: Ignored) -> dict[str, Any]:
    """In OpenAI's shape."""
    if not isinstance(given, dict):
        raise InvalidRequest(f"`{at}` is not an object.", param=at)
    message = read_known(given, _Message, ignored, at=at, refused={"images": _TEXT_ONLY})
    plain: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.thinking is not None and message.role == "assistant":
        plain["reasoning_content"] = message.thinking
    if message.tool_calls:
        plain["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.role == "tool":
        plain |= {"name": message.tool_name} if message.tool_name else {}
        plain |= {"tool_call_id": message.tool_call_id} if message.tool_call_id else {}
    return plain


def _call(call: Any) -> Any:
    return {**call, "type": "function"} if isinstance(call, dict) else call


def _check_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise InvalidRequest(f"`options.{name}` is {value}; it must be {least} or more.", param=f"options.{name}")
