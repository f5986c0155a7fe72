"""`cache_control`: up to where a request wants its prompt to be kept.

The last marker counts, since what is kept up to it holds what is kept up to the others. Templates write the system
prompt and the tools together, so a marker on either is one in front of the first message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nimbos.api.anthropic_content import blocks_of
from nimbos.errors import InvalidRequest

if TYPE_CHECKING:
    from nimbos.api.anthropic_body import MessagesBody

MARKS_MAX = 4
_TTLS = (None, "5m", "1h")
_SENTINEL = "\x02"


@dataclass(frozen=True, slots=True)
class Mark:
    """Behind block number `block` of message number `message`; None: in front of its first."""

    message: int
    block: int | None

    def with_sentinel(self, messages: list[Any]) -> list[Any]:
        """The same messages with a character behind the mark that stands nowhere else: where the prompts of both
        begin to differ, the marked prefix ends."""
        changed = dict(messages[self.message])
        blocks = _blocks(changed.get("content"))
        sentinel = {"type": "text", "text": _SENTINEL}
        if self.block is None:
            blocks.insert(0, sentinel)
        elif blocks and blocks[self.block].get("type") == "tool_result":
            result = blocks[self.block]
            blocks[self.block] = {**result, "content": [*_blocks(result.get("content")), sentinel]}
        elif blocks and blocks[self.block].get("type") == "tool_use":
            call = blocks[self.block]
            blocks[self.block] = {**call, "input": {**(call.get("input") or {}), _SENTINEL: 1}}
        else:
            blocks.insert(self.block + 1, sentinel)
        changed["content"] = blocks
        return [*messages[: self.message], changed, *messages[self.message + 1 :]]


def last_mark(body: MessagesBody) -> Mark | None:
    """Raises: InvalidRequest for more than four markers, or one that is none."""
    heads = [*_marked(body.tools, "tools"), *_marked(body.system, "system")]
    found = [mark for number, message in enumerate(body.messages) for mark in _marks_in(number, message)]
    count = len(heads) + len(found)
    if body.cache_control is not None:
        _check(body.cache_control, "cache_control")
        count += 1
        last = body.messages[-1] if body.messages else None
        blocks = blocks_of(last.get("content")) if isinstance(last, dict) else []
        found.append(Mark(len(body.messages) - 1, max(0, len(blocks) - 1)))
    if count > MARKS_MAX:
        raise InvalidRequest(
            f"There may be {MARKS_MAX} blocks with `cache_control`; here are {count}.", param="cache_control"
        )
    if found:
        return found[-1]
    return Mark(0, None) if heads else None


def _marks_in(number: int, message: Any) -> Iterator[Mark]:
    content = message.get("content") if isinstance(message, dict) else None
    at = f"messages[{number}].content"
    for place, block in enumerate(content if isinstance(content, list) else ()):
        inner = _marked(block.get("content"), f"{at}[{place}].content") if isinstance(block, dict) else []
        for _ in [*_marked([block], at), *inner]:
            yield Mark(number, place)


def _marked(blocks: Any, at: str) -> list[Mapping[str, Any]]:
    """The blocks that have a marker."""
    found = [block for block in blocks_of(blocks) if block.get("cache_control") is not None]
    for block in found:
        _check(block["cache_control"], f"{at}[].cache_control")
    return found


def _check(marker: Any, at: str) -> None:
    if not isinstance(marker, dict) or marker.get("type") != "ephemeral" or marker.get("ttl") not in _TTLS:
        raise InvalidRequest(f'`{at}` must be {{"type": "ephemeral"}}, with `ttl` "5m" or "1h" if any.', param=at)


def _blocks(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
