"""The chat layer's one verb: a request in messages becomes a plan for one ask.
Knows no token ids and no engine. Read `family.py` for what templates differ in, `splitter.py` for the way back.

    messages ─▶ fit to the template ─▶ break control strings ─▶ render ─▶ cut ─▶ end inside or after the thinking
    tools, format, dial ─▶ grammar, thinking, what the splitter looks for
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from nimbos.chat.call_grammar import CLOSE_TAG, OPEN_TAG, PYTHON_TAG, write_call_grammar
from nimbos.chat.control import ControlGuard, choose_marker, cut, words_to_guard
from nimbos.chat.family import CallForm, Family, choose_template, recognise
from nimbos.chat.isolation import RenderProcess
from nimbos.chat.messages import (
    Message,
    last_user_text,
    normalise,
    with_system_text,
    with_thoughts_apart,
    without_system,
    without_tool_roles,
    write_hermes_call,
)
from nimbos.chat.plan import ChatRequest, Plan
from nimbos.chat.schema import ANY_OBJECT, check_size
from nimbos.chat.template import MAX_PROMPT_CHARACTERS, RenderFailure, RenderJob, RenderResult, TemplateRenderer
from nimbos.chat.thinking import describe_thinking, end_closed, end_open, ends_closed, ends_open, most_tokens, resolve
from nimbos.chat.tools import Tool, ToolUse, choose_tools, introduce, read_tools
from nimbos.errors import InvalidRequest, ModelUnusable, NimbosError
from nimbos.types import Grammar, ModelCard, Text, Thinking

_RESERVED_VARIABLES = frozenset(["messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"])
_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}  # templates know low, medium and high


class Chat:
    """The chat layer of one model. Close it: it may hold a render worker."""

    def __init__(self, card: ModelCard, *, trusted_templates: frozenset[str]) -> None:
        """`trusted_templates`: SHA-256 (hex) of templates that may render in this process."""
        self._card = card
        self._template, self._stop = choose_template(card)
        digest = hashlib.sha256(self._template.encode("utf-8", "surrogatepass")).hexdigest()
        own = not card.chat_template.strip()
        self._in_place = TemplateRenderer() if own or digest in trusted_templates else None
        self._worker = RenderProcess()
        self._guard: ControlGuard | None = None
        self._family: Family | None = None

    async def plan(self, request: ChatRequest) -> Plan:
        """Raises: InvalidRequest (what the template itself refuses too), UnsupportedField; ModelUnusable for a template
        that does not compile, breaks out, or takes more memory or time than it may."""
        messages = normalise(request.messages)
        offered = read_tools(request.tools)
        usable, must = choose_tools(offered, request.tool_choice)
        shown = (
            offered if usable else ()
        )  # with "none" the model is not told of them: what it cannot call, it cannot write
        budget = resolve(
            request.thinking,
            max_tokens=request.max_tokens,
            context_tokens=self._window(request),
            last_user_text=last_user_text(messages),
            tools=len(shown),
        )
        family = await self._recognised()
        variables = _variables(request, _fit(messages, shown, family), shown, family, budget)
        use = self._tool_use(family, usable, must=must, request=request)
        grammar = self._grammar(request, use)
        prompt = await self._render(variables)
        parts, thinking = self._end(prompt, request, family, budget, shaped=grammar is not None)
        return Plan(parts=parts, grammar=grammar, thinking=thinking, stop=self._stop, tools=use)

    async def close(self) -> None:
        await self._worker.close()

    def _window(self, request: ChatRequest) -> int:
        return request.context_tokens or self._card.context_tokens

    async def _recognised(self) -> Family:
        if self._family is None:
            self._family = await recognise(self._card, self._probe)
        return self._family

    async def _probe(self, variables: dict[str, Any]) -> RenderResult:
        result = await self._render_raw({**variables, "add_generation_prompt": True})
        if isinstance(result, RenderFailure) and result.kind not in ("refused", "runtime"):
            raise self._error(result)  # no template for any request
        return result

    async def _render(self, variables: dict[str, Any]) -> tuple[Text, ...]:
        """The prompt's pieces; no piece has a control string that the template did not write."""
        marker = choose_marker([variables, self._template])
        if self._guard is None:
            self._guard = ControlGuard(words_to_guard(self._card, self._template))
        result = await self._render_raw(self._guard.mark(variables, marker))
        if isinstance(result, RenderFailure):
            raise self._error(result)
        return cut(result.text, marker)

    async def _render_raw(self, variables: dict[str, Any]) -> RenderResult:
        tokens = {"bos_token": self._card.bos, "eos_token": self._card.eos}
        job = RenderJob(self._template, {**tokens, **variables})
        return self._in_place.render(job) if self._in_place is not None else await self._worker.render(job)

    def _error(self, failure: RenderFailure) -> NimbosError:
        at = f" at line {failure.line}" if failure.line is not None else ""
        template = f"its chat template{at}"
        match failure.kind:
            case "refused":
                return InvalidRequest(f"The model's chat template says: {failure.message}", param="messages")
            case "runtime":
                return InvalidRequest(
                    f"The chat template of {self._card.id} cannot take these messages{at}: {failure.message}",
                    param="messages",
                )
            case "too_long":
                return InvalidRequest(
                    f"The prompt that the chat template writes is longer than {MAX_PROMPT_CHARACTERS} characters.",
                    param="messages",
                )
            case "syntax":
                return ModelUnusable(self._card.id, reason=f"{template} does not compile: {failure.message}")
            case "unsafe":
                return ModelUnusable(self._card.id, reason=f"{template} reaches for what it may not: {failure.message}")
            case "memory":
                return ModelUnusable(self._card.id, reason=f"{template} takes more memory than it may (512 MiB)")
            case "time":
                return ModelUnusable(self._card.id, reason=f"{template} takes more time than it may (2 s)")
            case "died":
                return ModelUnusable(self._card.id, reason=f"{template} ended the process that renders it")

    def _end(
        self, parts: tuple[Text, ...], request: ChatRequest, family: Family, budget: int | None, *, shaped: bool
    ) -> tuple[tuple[Text, ...], Thinking | None]:
        """Makes the prompt end inside an open block of thinking, or after a closed one.

        Where nobody asked and the template leaves it to the model, so does this, unless a grammar waits for the answer
        (`shaped`): that can only begin after a block whose opening is known.
        """
        marks, tail = family.marks, parts[-1].text if parts else ""
        if marks is None:
            return parts, None
        if budget is None:
            if ends_closed(tail, marks):
                return parts, None
            budget = most_tokens(max_tokens=request.max_tokens, context_tokens=self._window(request))
            if budget and not shaped and not family.habitual and not ends_open(tail, marks):
                return parts, describe_thinking(marks, budget_tokens=budget, started=False)  # its own habit decides
        ended = end_open(tail, marks) if budget else end_closed(tail, marks)
        thinking = describe_thinking(marks, budget_tokens=budget, started=True) if budget else None
        return (*parts[:-1], Text(ended, special=True)), thinking

    def _tool_use(
        self, family: Family, usable: tuple[Tool, ...], *, must: bool, request: ChatRequest
    ) -> ToolUse | None:
        if not usable:
            return None
        hermes = family.form is CallForm.HERMES
        return ToolUse(
            form=family.form,
            tools=usable,
            must=must,
            parallel=request.parallel_tool_calls and hermes,
            hidden_tag=self._hides(OPEN_TAG, CLOSE_TAG) if hermes else PYTHON_TAG in self._card.control,
            bare=not hermes or (not must and request.response_format is None),
        )

    def _hides(self, *tags: str) -> bool:
        """Whether these are control tokens without text; a card that does not tell them apart is taken to show them."""
        card = self._card
        return card.user_defined is not None and all(t in card.control and t not in card.user_defined for t in tags)

    def _grammar(self, request: ChatRequest, use: ToolUse | None) -> Grammar | None:
        if request.grammar is not None:
            if use is not None or request.response_format is not None:
                other = "tools" if use is not None else "response_format"
                raise InvalidRequest(f"A grammar and {other} cannot both shape one answer. Send one.", param=other)
            return request.grammar
        schema = _read_format(request.response_format)
        if use is not None:
            return write_call_grammar(use, schema=schema)
        return Grammar(kind="json_schema", source=json.dumps(schema)) if schema is not None else None


def _fit(messages: list[Message], tools: tuple[Tool, ...], family: Family) -> list[Message]:
    """Says in plain messages what the template cannot say itself."""
    if family.marks is not None:
        messages = with_thoughts_apart(messages, family.marks.open, family.marks.close)
    if not family.takes_history:
        messages = without_tool_roles(messages, write_hermes_call)
    if tools and not family.describes_tools:
        messages = with_system_text(messages, introduce(tools))
    return messages if family.takes_system else without_system(messages)


def _variables(
    request: ChatRequest, messages: list[Message], tools: tuple[Tool, ...], family: Family, budget: int | None
) -> dict[str, Any]:
    reserved = _RESERVED_VARIABLES.intersection(request.template_kwargs)
    if reserved:
        name = f"chat_template_kwargs.{min(reserved)}"
        raise InvalidRequest(f"{name} is set by Nimbos and cannot be overridden.", param=name)
    variables: dict[str, Any] = {
        **request.template_kwargs,
        "messages": messages,
        "tools": [tool.wire for tool in tools] if tools and family.describes_tools else None,
        "add_generation_prompt": True,
    }
    if budget is not None:
        variables["enable_thinking"] = variables["thinking"] = budget > 0
    level = request.thinking.level
    if level is not None and level != "none":
        variables["reasoning_effort"] = _EFFORTS.get(level, level)
    return variables


def _read_format(text: str | None) -> Mapping[str, Any] | None:
    """Raises: InvalidRequest for what is no JSON Schema of an object's size and depth."""
    if text is None or text == "json_object":
        return ANY_OBJECT if text else None
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"The response format's schema is not JSON: {error}", param="response_format") from error
    if not isinstance(schema, dict) or "x-guidance" in schema:
        raise InvalidRequest("The response format's schema must be a JSON Schema object.", param="response_format")
    check_size(schema, where="response_format")
    return schema
