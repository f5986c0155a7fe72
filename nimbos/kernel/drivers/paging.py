"""`read`: the rest of a large result, or a file of the program, a page at a time. Of results only what the process has
seen the head of can be read: the handle is looked up in its own view, never in the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nimbos.kernel.drivers.answers import Answered
from nimbos.kernel.segments import Segments, text_of

if TYPE_CHECKING:
    from nimbos.kernel.fold import View

HANDLE_CHARACTERS = 16  # of a hash: more than enough among the results of one process, and few tokens
_HANDLE_CHARACTERS_MIN = 8


def head_of(value: Any, *, handle: str, head_bytes: int) -> str:
    """What a model is shown of a result: all of it, or its head and how to read on. Whole characters only."""
    raw = text_of(value).encode("utf-8", "replace")
    if len(raw) <= head_bytes:
        return raw.decode()
    shown = _whole(raw, 0, head_bytes)
    return (
        f"{raw[:shown].decode()}\n\n[bytes 0 to {shown} of {len(raw)}; "
        f'`read` with {{"handle": "{handle}", "offset": {shown}}} reads on]'
    )


async def read_page(view: View, segments: Segments, arguments: Mapping[str, Any], *, page_bytes: int) -> Answered:
    """Raises: NotFound, StorageUnavailable."""
    handle = str(arguments["handle"])
    hash = next((name for name in _readable(view) if _is_named(name, handle)), None)
    if hash is None:
        return Answered(value=f"There is no result with the handle {handle[:80]!r}.", error="not_found")
    raw = text_of(await segments.get(view.account, hash)).encode("utf-8", "replace")
    return page_of(raw, arguments, page_bytes=page_bytes)


def page_of(raw: bytes, arguments: Mapping[str, Any], *, page_bytes: int) -> Answered:
    """Whole characters from byte `offset` of the text on; what follows is said at the end."""
    handle, offset = str(arguments["handle"]), int(arguments.get("offset", 0))
    if offset and offset >= len(raw):
        return Answered(value=f"The result has {len(raw)} bytes; nothing follows at {offset}.", error="beyond_the_end")
    until = _whole(raw, offset, min(page_bytes, int(arguments.get("bytes", page_bytes))))
    page = raw[offset:until].decode("utf-8", "ignore")
    if until >= len(raw):
        return Answered(value=page, shown=page)
    more = f'[bytes {offset} to {until} of {len(raw)}; {{"handle": "{handle}", "offset": {until}}} reads on]'
    text = f"{page}\n\n{more}"
    return Answered(value=text, shown=text)


def _whole(raw: bytes, start: int, size: int) -> int:
    """Where a piece of at most `size` bytes ends that cuts no character, and is not empty."""
    end = min(start + size, len(raw))
    while start < end < len(raw) and raw[end] & 0xC0 == 0x80:
        end -= 1
    return end if end > start else min(start + size, len(raw))


def _readable(view: View) -> Iterator[str]:
    for segment in (*view.context, *view.evicted.values()):
        yield segment.whole or segment.hash
    for recorded in view.steps.values():
        if recorded.result:
            yield recorded.result


def _is_named(hash: str, handle: str) -> bool:
    return len(handle) >= _HANDLE_CHARACTERS_MIN and hash.startswith(handle)
