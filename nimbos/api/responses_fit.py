"""`truncation: "auto"`: the oldest items are left out until the prompt fits, and the response says which.

What instructs the model (system and developer messages, and what was compacted, which holds them) stays. A cut is only
made where a turn begins, so that no result of a call stands there without its call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import msgspec

from nimbos.api import responses_request as requests
from nimbos.api.dialogue import Asked, Question, understand
from nimbos.api.responses_items import Item
from nimbos.api.responses_wire import Truncated
from nimbos.chat import MAX_PROMPT_CHARACTERS
from nimbos.errors import InvalidRequest, PromptTooLong
from nimbos.service import Service

_TEXT_BYTES = MAX_PROMPT_CHARACTERS * 3 // 4  # of items; what tools and the template write comes besides
_ROOM_SHARE = 4  # of the window is kept for an answer that has no limit
_INSTRUCTING = ("system", "developer")


async def fit(
    service: Service,
    asked: Asked,
    question: Question,
    body: requests.ResponsesBody,
    items: Sequence[Item],
    error: PromptTooLong,
) -> tuple[Question, Truncated]:
    """The question with as much of the context as fits beside its answer.

    Raises: `error` when even the last turn alone is too long.
    """
    room = min(body.max_output_tokens or error.limit // _ROOM_SHARE, error.limit // 2)
    most = error.limit - room
    found: tuple[Question, int] | None = None
    starts = cuts(items)
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        shorter, count = await _counted(service, asked, question, body, kept(items, starts[middle]))
        if shorter is not None and count <= most:
            found = shorter, starts[middle]
            high = middle
        else:
            low = middle + 1
    if found is None:
        raise error
    shorter, start = found
    dropped = dropped_of(items, kept(items, start))
    return shorter, Truncated(dropped_items=dropped, prompt_tokens=error.have, limit_tokens=error.limit)


def dropped_of(items: Sequence[Item], left: Sequence[Item]) -> list[str]:
    ids = {item["id"] for item in left}
    return [item["id"] for item in items if item["id"] not in ids]


def writable(items: Sequence[Item], sizes: Sequence[int]) -> Sequence[Item]:
    """The items without the oldest turns of a context that no template can write, however large the model's window is.
    `sizes`: their bytes."""
    if sum(sizes) <= _TEXT_BYTES:
        return items
    left = list(accumulate(reversed(sizes)))[::-1]
    stays = list(accumulate((size * _instructs(item) for item, size in zip(items, sizes, strict=True)), initial=0))
    start = next((start for start in cuts(items) if stays[start] + left[start] <= _TEXT_BYTES), None)
    return kept(items, start) if start is not None else items


def cuts(items: Sequence[Item]) -> list[int]:
    """Where the context may begin instead: at a user's message, or behind the results of calls."""
    return [
        number
        for number in range(1, len(items))
        if _speaks(items[number])
        or (items[number - 1]["type"] == "function_call_output" and items[number]["type"] != "function_call_output")
    ]


def kept(items: Sequence[Item], start: int) -> list[Item]:
    return [item for number, item in enumerate(items) if number >= start or _instructs(item)]


def _speaks(item: Item) -> bool:
    return bool(item["type"] == "message" and item["role"] == "user")


def _instructs(item: Item) -> bool:
    return bool(item["type"] == "compaction" or (item["type"] == "message" and item["role"] in _INSTRUCTING))


async def _counted(
    service: Service, asked: Asked, question: Question, body: requests.ResponsesBody, items: list[Item]
) -> tuple[Question | None, int]:
    """None for a context that the model's template does not take, or that is still too long."""
    try:
        wanted = replace(asked, request=requests.request_of(body, items))
        shorter = await understand(service, question.account, wanted, journal=question.journal)
        ask = msgspec.structs.replace(shorter.ask, id=question.ask.id)  # the longer one was never let in
        shorter = replace(shorter, ask=ask, admission=question.admission)
        return shorter, await service.count(question.account, ask)
    except PromptTooLong as error:
        return None, error.have
    except InvalidRequest:
        return None, 0
