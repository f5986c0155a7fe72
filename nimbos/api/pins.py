"""Explicit caching: the part of a prompt that a request wants to be kept for a while.

A dialect makes the chat request a second time, with something else behind its marker; what both prompts begin with is
the marked prefix. `Ask.pin_tokens` is its length in tokens, and the engine keeps it for `PIN_S`.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from nimbos.api.dialogue import Asked, Question, understand
from nimbos.batches import AnswerJournal
from nimbos.chat import ChatRequest
from nimbos.errors import PromptTooLong
from nimbos.service import Service
from nimbos.types import Account, Part, Text, Usage

PIN_S = 300.0


async def understand_pinned(
    service: Service, account: Account, asked: Asked, *, journal: AnswerJournal | None = None
) -> Question:
    """Raises: what `understand` raises."""
    question = await understand(service, account, asked, journal=journal)
    return question if asked.marked is None else await pinned(service, question, asked.marked(question.card))


async def pinned(service: Service, question: Question, marked: ChatRequest) -> Question:
    """`marked`: the question's own chat request, changed behind the marker. A model that cannot share a prefix keeps
    none, and a prompt that does not fit is refused when it is asked."""
    if not question.card.shares_prefixes:
        return question
    chat = await service.chat(question.card.id)
    plan = await chat.plan(msgspec.structs.replace(marked, context_tokens=question.card.context_tokens))
    prefix = common_prefix(question.ask.parts, plan.parts)
    if not prefix:
        return question
    try:
        tokens = await service.count(question.account, msgspec.structs.replace(question.ask, parts=prefix))
    except PromptTooLong:
        return question
    return replace(question, ask=msgspec.structs.replace(question.ask, pin_s=PIN_S, pin_tokens=tokens))


def written_tokens(usage: Usage, pin_tokens: int) -> int:
    """Tokens of the marked prefix that were not in memory before this ask."""
    return max(0, min(pin_tokens, usage.input) - usage.cached)


def common_prefix(some: tuple[Part, ...], other: tuple[Part, ...]) -> tuple[Part, ...]:
    """Whole parts as long as they are the same, then what the texts of the next have in common."""
    prefix: list[Part] = []
    for one, two in zip(some, other, strict=False):
        if one == two:
            prefix.append(one)
            continue
        if isinstance(one, Text) and isinstance(two, Text) and one.special == two.special:
            text = _common_text(one.text, two.text)
            if text:
                prefix.append(Text(text, special=one.special))
        break
    return tuple(prefix)


def _common_text(some: str, other: str) -> str:
    """By halving: prompts are long, and comparing slices is what strings are fast at."""
    low, high = 0, min(len(some), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if some[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return some[:low]
