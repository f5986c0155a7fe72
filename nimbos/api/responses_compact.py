"""`POST /v1/responses/compact`: a context told in short by the model itself, to go on from instead of the whole.

The answer is one item of the type `compaction`. What instructs the model is in it word for word. Nothing is stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any, Literal

import msgspec

from nimbos.api import body as bodies
from nimbos.api import openai_wire as wire
from nimbos.api import responses_request as requests
from nimbos.api.dialogue import Asked, Said, Told, answer, understand
from nimbos.api.exchange import ask_headers
from nimbos.api.fields import SamplingFields, Tier, class_of, sampling_of
from nimbos.api.responses_answer import Responder
from nimbos.api.responses_items import Item, check_context, item_id, seal, unseal
from nimbos.api.responses_messages import messages_of
from nimbos.api.responses_record import items_of
from nimbos.api.responses_wire import Compacted, Extension, UsageBody
from nimbos.chat import ChatRequest, ContentDelta, Dial
from nimbos.errors import AnswerFailed
from nimbos.service import Service
from nimbos.types import Account, ModelCard, Origin, new_id

ROUTE = "/v1/responses/compact"
_SUMMARY_TOKENS = 2_048
_SUMMARY_SHARE = 4  # of the window at most
_ASKED = (
    "Write down what matters of our conversation so far, for somebody who goes on with it and has not read it: what "
    "was wanted, what was found out and decided, names, numbers and results, and what is still open. Answer with that "
    "alone."
)
_INSTRUCTING = ("system", "developer")
_IN_SHORT = "What was said before, in short:\n"


class CompactBody(msgspec.Struct, kw_only=True):
    """`prompt_cache_…` are hints."""

    model: str
    input: str | list[Any] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: requests.CacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    service_tier: Tier | None = None


class Compactor:
    def __init__(self, service: Service, responder: Responder) -> None:
        self._service = service
        self._responder = responder

    async def compact(
        self, account: Account, content: bytes, *, header_class: str | None
    ) -> tuple[Compacted, dict[str, str]]:
        """Also the headers of its ask. Raises: what a response raises; AnswerFailed for a model that said nothing."""
        body = bodies.decode(content, CompactBody, refused={"image": requests.REFUSED["image"]})
        context = requests.ContextFields(
            model=body.model, input=body.input, previous_response_id=body.previous_response_id
        )
        requests.check_context_fields(context)
        past = await self._responder.past(account, context)
        items = [*items_of(past.pieces), *await self._responder.own_items(account, context)]
        check_context(items)
        card = await self._service.card(body.model, account)
        limit = min(_SUMMARY_TOKENS, max(1, card.context_tokens // _SUMMARY_SHARE))
        asked = Asked(
            model=body.model,
            request=_request(items, body.instructions, limit),
            sampling=sampling_of(SamplingFields(temperature=0), logprobs=None),
            ask_class=class_of(body.service_tier, None, header_class, account),
            limit_tokens=limit,
            origin=Origin(route=ROUTE),
        )
        question = await understand(self._service, account, asked)
        words: list[str] = []
        told: Told | None = None
        async with aclosing(answer(self._service, question)) as events:
            async for event in events:
                if isinstance(event, Said) and isinstance(event.delta, ContentDelta):
                    words.append(event.delta.text)
                elif isinstance(event, Told):
                    told = event
        summary = "".join(words).strip()
        if told is None or not summary:
            raise AnswerFailed(f"The model {question.card.id} wrote no summary. Try again, or another model.")
        compacted = Compacted(
            id=(made := new_id("resp")),
            created_at=int(time.time()),
            output=[_compaction(made, items, summary)],
            usage=UsageBody.of(told.usage),
            x_nimbos=Extension(receipt=wire.receipt([question.ask], list(told.finals), question.card)),
        )
        return compacted, ask_headers(question)


def _request(items: list[Item], instructions: str | None, limit: int) -> Callable[[ModelCard], ChatRequest]:
    def request(card: ModelCard) -> ChatRequest:
        messages = [*messages_of(items, instructions=instructions), {"role": "user", "content": _ASKED}]
        thinking = Dial.read({"enable_thinking": False})
        return ChatRequest(messages=messages, thinking=thinking, max_tokens=limit, context_tokens=card.context_tokens)

    return request


def _compaction(response_id: str, items: list[Item], summary: str) -> Item:
    """What instructs the model stays word for word."""
    told = "\n\n".join([*_instructions(items), f"{_IN_SHORT}{summary}"])
    return {"id": item_id(response_id, 0, "compaction"), "type": "compaction", "encrypted_content": seal(told)}


def _instructions(items: list[Item]) -> Iterator[str]:
    """Those of an earlier compaction, too, which stand in front of its summary."""
    for item in items:
        if item["type"] == "compaction":
            words, _, _ = unseal(item["encrypted_content"], "encrypted_content").rpartition(f"\n\n{_IN_SHORT}")
            if words:
                yield words
        elif item["type"] == "message" and item["role"] in _INSTRUCTING:
            yield from (message["content"] for message in messages_of([item], instructions=None))
