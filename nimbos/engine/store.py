"""The store: pieces of contexts that nobody uses now, kept outside of the model's cells: in memory, and on disk beyond.

A piece is what libllama wrote for positions [start, end) of a context; it can be put back behind a prefix of that
context that is in the cells and reaches `start`. Pieces of one context chain: the end of one is the start of the next.
When they are too many for the memory, the ones that were used least recently go to the swap file, where there is one;
when they are too many for that, they are gone. Knows no model; `residence.py` is the only caller.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nimbos.engine.context import common_length
from nimbos.engine.swapfile import Bytes, Extent, SwapFile

WORTH_RESTORING = 16  # tokens; fewer are computed as fast


@dataclass(slots=True, eq=False)
class Piece:
    """`tokens`: of its context, at least up to `end`. `state`: nothing while it is at `extent` of the swap file."""

    account: str
    tokens: Sequence[int]
    start: int
    end: int
    state: Bytes
    extent: Extent | None = field(default=None)


@dataclass(frozen=True, slots=True)
class Found:
    """The tokens asked for agree with the piece up to `end`."""

    piece: Piece
    end: int


class Store:
    def __init__(self, budget_bytes: int, swap: SwapFile | None = None) -> None:
        """`budget_bytes`: of memory."""
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._swap = swap
        self._pieces: OrderedDict[int, Piece] = OrderedDict()  # in memory, least recently used first
        self._swapped: OrderedDict[int, Piece] = OrderedDict()  # on disk, likewise
        self._of_account: dict[str, dict[int, Piece]] = {}

    def __len__(self) -> int:
        return len(self._pieces) + len(self._swapped)

    @property
    def room_bytes(self) -> int:
        return self.budget_bytes + (self._swap.size_bytes if self._swap is not None else 0)

    @property
    def disk_bytes(self) -> int:
        return self._swap.used_bytes if self._swap is not None else 0

    def put(self, piece: Piece) -> None:
        """Others go for it where there is no room, or it itself when it is larger than all of it."""
        self._pieces[id(piece)] = piece
        self._of_account.setdefault(piece.account, {})[id(piece)] = piece
        self.used_bytes += piece.state.nbytes
        while self.used_bytes > self.budget_bytes:
            self._send_away(next(iter(self._pieces.values())))

    def state(self, piece: Piece) -> Bytes | None:
        """What libllama wrote, from wherever it is; None: it is lost."""
        if piece.extent is None:
            return piece.state
        assert self._swap is not None
        return self._swap.read(piece.extent)

    def find(self, account: str, tokens: Sequence[int], at: int) -> Found | None:
        """The piece that takes `tokens`, of which [0, at) are in the cells, furthest."""
        best: Found | None = None
        for piece in self._of_account.get(account, {}).values():
            if piece.start <= at < piece.end and at < len(tokens) and piece.tokens[at] == tokens[at]:
                common = common_length(tokens[: piece.end], piece.tokens, 0)
                if common - at >= WORTH_RESTORING and (best is None or common > best.end):
                    best = Found(piece, common)
        return best

    def remove(self, piece: Piece) -> None:
        if piece.extent is not None:
            assert self._swap is not None
            self._swap.free(piece.extent)
            del self._swapped[id(piece)]
        else:
            self.used_bytes -= piece.state.nbytes
            del self._pieces[id(piece)]
        own = self._of_account[piece.account]
        del own[id(piece)]
        if not own:
            del self._of_account[piece.account]

    def _send_away(self, piece: Piece) -> None:
        """Out of memory: to the disk, for which others there go, or for ever."""
        extent = self._write(piece.state) if self._swap is not None else None
        if extent is None:
            self.remove(piece)
            return
        self.used_bytes -= piece.state.nbytes
        del self._pieces[id(piece)]
        piece.state, piece.extent = np.empty(0, np.uint8), extent
        self._swapped[id(piece)] = piece

    def _write(self, state: Bytes) -> Extent | None:
        assert self._swap is not None
        if state.nbytes > self._swap.size_bytes:
            return None
        try:
            while (extent := self._swap.write(state)) is None and self._swapped:
                self.remove(next(iter(self._swapped.values())))
        except OSError:
            return None  # the disk is full: what is there stays
        return extent
