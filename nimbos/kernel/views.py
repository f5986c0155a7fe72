"""Views of processes that parked here lately, so that a wake folds what is new and not the whole log.

A view is never trusted for being here: it counts only if the log still has its last event, under the same hash
(`runner.py` asks). What is thrown away costs a fold. Bounded in bytes, the one parked longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from nimbos.kernel.view import View

BYTES_MAX: Final = 32 * 1024 * 1024
_ONE_SHARE: Final = 4  # so much of it one view may have at most
_VIEW_BYTES: Final = 3_000
_RECORD_BYTES: Final = 600  # of a step, segment, call, child or signal, with its keys
_NAME_BYTES: Final = 200  # of an id that is remembered, so that nothing happens twice
_TOKEN_BYTES: Final = 36


class Views:
    """Used from the server's event loop alone. `bytes_max` 0 keeps none."""

    def __init__(self, bytes_max: int = BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._kept: OrderedDict[str, tuple[View, int]] = OrderedDict()
        self.used_bytes = 0

    def keep(self, pid: str, view: View) -> None:
        """Nobody else may change it any more."""
        self.take(pid)
        size_bytes = size_of(view)
        if size_bytes > self._bytes_max // _ONE_SHARE:
            return
        self._kept[pid] = view, size_bytes
        self.used_bytes += size_bytes
        while self.used_bytes > self._bytes_max:
            _, (_, gone_bytes) = self._kept.popitem(last=False)
            self.used_bytes -= gone_bytes

    def take(self, pid: str) -> View | None:
        """It is here no more: who takes it folds on."""
        view, size_bytes = self._kept.pop(pid, (None, 0))
        self.used_bytes -= size_bytes
        return view


def size_of(view: View) -> int:
    """In memory, about: generous where it is not known, and found without looking at every record."""
    shown, calls, mail = view.shown, view.syscalls, view.mail
    records = (
        *(view.steps, view.calls, calls.turn, calls.wanted, calls.resolved, calls.withheld),
        *(shown.segments, shown.evicted, mail.waiting, mail.children, view.asks.open),
    )
    names = (view.asks.settled, calls.ended, shown.places, mail.heard)
    turns = view.asks.open.values()
    said = sum(_TOKEN_BYTES * len(turn.emitted) + 4 * (len(turn.text) + len(turn.thinking)) for turn in turns)
    wanted = sum(4 * len(call.arguments) for call in calls.turn)
    bytes_of_records = _RECORD_BYTES * sum(len(some) for some in records)
    return _VIEW_BYTES + bytes_of_records + _NAME_BYTES * sum(len(some) for some in names) + said + 2 * wanted
