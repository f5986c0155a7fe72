"""The fold: what a log says a process is. Pure, and the only way to know.

    view = fold(events)            from the start, or on from a view
    view.check(bodies)             raises what these would raise next, and changes nothing

It refuses whatever cannot be: a state that may not follow, an effect begun twice, tokens settled twice, an outcome of
nothing. What it refuses must never be written, so whoever holds a process checks before it appends. The rules for asks,
calls, signals, budgets and the context are in `folding/`. `view.py` has what comes out.
"""

from __future__ import annotations

from collections.abc import Iterable

from nimbos.kernel.events import Event
from nimbos.kernel.faults import FromNewerVersion, Illegal, Unreadable
from nimbos.kernel.view import Call, CallStatus, Child, Received, Recorded, Turn, View

__all__ = [
    "Call",
    "CallStatus",
    "Child",
    "FromNewerVersion",
    "Illegal",
    "Received",
    "Recorded",
    "Turn",
    "Unreadable",
    "View",
    "fold",
]


def fold(events: Iterable[Event], view: View | None = None) -> View:
    """Goes on from `view`, which it changes. Raises: Illegal, FromNewerVersion, Unreadable."""
    folded = View() if view is None else view
    for event in events:
        folded.apply(event)
    return folded
