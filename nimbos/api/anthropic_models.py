"""The list of models as Anthropic's clients read it; they name themselves by the header `anthropic-version`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from nimbos.errors import InvalidRequest, ModelNotFound
from nimbos.sources import Listed

_LIMIT, LIMIT_MAX = 20, 1000


class ModelInfo(msgspec.Struct, kw_only=True, tag_field="type", tag="model"):
    id: str
    display_name: str
    created_at: str
    lifecycle: str = "active"
    max_input_tokens: int | None = None
    max_tokens: int | None = None


class ModelPage(msgspec.Struct, kw_only=True):
    data: list[ModelInfo]
    has_more: bool
    first_id: str | None
    last_id: str | None


def page(models: Sequence[Listed], aliases: Mapping[str, str], query: Mapping[str, str]) -> ModelPage:
    """`query`: `limit`, `after_id`, `before_id`. Aliases come behind the models, each with what it stands for.

    Raises: InvalidRequest.
    """
    found = _all(models, aliases)
    limit = limit_of(query)
    ids = [info.id for info in found]
    start, end = 0, len(found)
    if "after_id" in query:
        start = _place(ids, query["after_id"]) + 1
    if "before_id" in query:
        end = _place(ids, query["before_id"])
        start = max(start, end - limit)
    data = found[start:end][:limit]
    more = start > 0 if "before_id" in query else start + limit < end
    return ModelPage(
        data=data, has_more=more, first_id=data[0].id if data else None, last_id=data[-1].id if data else None
    )


def one(models: Sequence[Listed], aliases: Mapping[str, str], name: str) -> ModelInfo:
    """Raises: ModelNotFound."""
    for info in _all(models, aliases):
        if info.id == name:
            return info
    raise ModelNotFound(name, have=tuple(listed.id for listed in models))


def limit_of(query: Mapping[str, str]) -> int:
    """Of entries on a page. Raises: InvalidRequest."""
    text = query.get("limit", str(_LIMIT))
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= LIMIT_MAX):
        raise InvalidRequest(f"`limit` must be from 1 to {LIMIT_MAX}.", param="limit")
    return int(text)


def _all(models: Sequence[Listed], aliases: Mapping[str, str]) -> list[ModelInfo]:
    own = {listed.id: _info(listed) for listed in models}
    named = [
        msgspec.structs.replace(own[target], id=alias, display_name=f"{alias} ({target})")
        for alias, target in aliases.items()
        if target in own and alias not in own
    ]
    return [*own.values(), *named]


def _info(listed: Listed) -> ModelInfo:
    tokens = listed.model.facts.context_tokens if listed.model is not None else None
    created = datetime.fromtimestamp(listed.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return ModelInfo(
        id=listed.id, display_name=listed.id, created_at=created, max_input_tokens=tokens, max_tokens=tokens
    )


def _place(ids: list[str], wanted: str) -> int:
    if wanted not in ids:
        raise InvalidRequest(f"There is no model {wanted[:100]!r} to list from.", param="after_id")
    return ids.index(wanted)
