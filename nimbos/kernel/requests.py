"""What an agent's model is asked, from its program and what is in view. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nimbos.chat import Dial
from nimbos.kernel.context import Message
from nimbos.kernel.fold import View
from nimbos.kernel.manifest import ModelNeeds
from nimbos.kernel.offer import Offered
from nimbos.kernel.program import Program
from nimbos.kernel.think import ThinkRequest
from nimbos.kernel.words import Verb
from nimbos.types import Grammar, Sampling

TEMPERATURE = 0.7  # where the program names none


def tools_shown(offered: Sequence[Offered], view: View) -> tuple[Offered, ...]:
    """Those the model is told of. `read` alone is kept from it until there is something to read: a small model that is
    offered one tool calls it."""
    if any(tool.verb is not Verb.READ or tool.documents for tool in offered):
        return tuple(offered)
    readable = any(segment.whole for segment in (*view.context, *view.evicted.values()))
    return tuple(offered) if readable else ()


def request_of(
    program: Program, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, corrected: bool
) -> ThinkRequest:
    """`corrected`: only what the answer must be, and no tools beside it."""
    needs, answer, said = program.manifest.model, program.answer, program.manifest.tools
    rounds = rounds_of(messages)
    if corrected or (said.rounds is not None and rounds >= said.rounds):
        tools = ()
    must_call = bool(tools) and said.call_first and rounds == 0
    grammar: Grammar | None = None
    if answer is not None and answer.kind == "regex" and not tools:  # beside tools it is looked at afterwards
        grammar = answer
    return ThinkRequest(
        messages=tuple(messages),
        tools=tuple(tools),
        tool_choice="required" if must_call else "auto",
        parallel_tool_calls=said.parallel,
        response_format=answer.source
        if answer is not None and answer.kind == "json_schema" and not must_call
        else None,
        grammar=grammar,
        thinking=dial_of(needs),
        sampling=sampling_of(needs),
        max_tokens=needs.max_tokens,
        context_tokens=needs.context_tokens,
    )


def rounds_of(messages: Sequence[Message]) -> int:
    """How many answers called tools since somebody last spoke."""
    rounds = 0
    for message in messages:
        if message["role"] == "user":
            rounds = 0
        elif message.get("tool_calls"):
            rounds += 1
    return rounds


def sampling_of(needs: ModelNeeds) -> Sampling:
    return Sampling(
        temperature=TEMPERATURE if needs.temperature is None else needs.temperature,
        top_p=1.0 if needs.top_p is None else needs.top_p,
        seed=needs.seed or 0,
    )


def dial_of(needs: ModelNeeds) -> Dial:
    wanted = needs.thinking
    if wanted is None:
        return Dial()
    if isinstance(wanted, bool):
        return Dial(switch=wanted)
    if isinstance(wanted, int):
        return Dial(budget=wanted)
    return Dial(switch="auto") if wanted == "auto" else Dial(level=wanted)
