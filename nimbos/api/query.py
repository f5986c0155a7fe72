"""What stands behind the `?` of a list: pages, orders, filters. An unknown name is refused, as in a body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from starlette.requests import Request

from nimbos.errors import InvalidRequest

_SHOWN_CHARACTERS = 60


def only(request: Request, *names: str) -> Mapping[str, str]:
    """Raises: InvalidRequest for a parameter that is not among `names`, or is there twice."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in names:
            raise InvalidRequest(
                f"There is no parameter {name[:_SHOWN_CHARACTERS]!r} here.", param=name[:_SHOWN_CHARACTERS]
            )
        if name in found:
            raise InvalidRequest(f"`{name}` is there twice.", param=name)
        if "\0" in value:
            raise InvalidRequest(f"`{name}` has a NUL.", param=name)
        found[name] = value
    return found


def limit_of(query: Mapping[str, str], *, default: int, most: int) -> int:
    text = query.get("limit")
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10) or not 1 <= int(text) <= most:
        raise InvalidRequest(f"`limit` must be from 1 to {most}.", param="limit")
    return int(text)


def choice_of(query: Mapping[str, str], name: str, choices: Sequence[str]) -> str:
    """The first choice where nothing is said."""
    chosen = query.get(name, choices[0])
    if chosen not in choices:
        raise InvalidRequest(f"`{name}` must be one of {', '.join(choices)}.", param=name)
    return chosen
