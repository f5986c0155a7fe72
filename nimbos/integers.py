"""Integers that neither the wire between our processes nor a C library can hold."""

from __future__ import annotations

from typing import Any

_INT64 = 2**63


def beyond_64_bits(value: Any, at: str = "") -> str | None:
    """Where in a JSON value the first such integer stands, as `a[0].b`; None when there is none.

    It calls itself for each level, so the depth of `value` must have been checked.
    """
    if isinstance(value, int):
        return None if -_INT64 <= value < 2 * _INT64 else at
    if isinstance(value, dict):
        children = ((f"{at}.{name}" if at else name, child) for name, child in value.items())
    elif isinstance(value, list | tuple):
        children = ((f"{at}[{index}]", child) for index, child in enumerate(value))
    else:
        return None
    found = (beyond_64_bits(child, place) for place, child in children if not isinstance(child, str | float))
    return next((place for place in found if place is not None), None)
