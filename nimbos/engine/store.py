"""The store: pieces of contexts that nobody uses now, kept in memory outside of the model's cells.

A piece is what libllama wrote for positions [start, end) of a context; it can be put back behind a prefix of that
context that is in the cells and reaches `start`. Pieces of one context chain: the end of one is the start of the next.
When they are too many, the ones that were used least recently go. Knows no model; `residence.py` is the only caller.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nimbos.engine.context import common_length

Bytes = npt.NDArray[np.uint8]
WORTH_RESTORING = 16  # tokens; fewer are computed as fast


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """`tokens`: of its context, at least up to `end`."""

    account: str
    tokens: Sequence[int]
    start: int
    end: int
    state: Bytes


@dataclass(frozen=True, slots=True)
class Found:
    """The tokens asked for agree with the piece up to `end`."""

    piece: Piece
    end: int


class Store:
    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._pieces: OrderedDict[int, Piece] = OrderedDict()  # least recently used first
        self._of_account: dict[str, dict[int, Piece]] = {}

    def __len__(self) -> int:
        return len(self._pieces)

    def put(self, piece: Piece) -> None:
        """Others go for it where there is no room, or it itself when it is larger than all of it."""
        self._pieces[id(piece)] = piece
        self._of_account.setdefault(piece.account, {})[id(piece)] = piece
        self.used_bytes += piece.state.nbytes
        while self.used_bytes > self.budget_bytes:
            self.remove(next(iter(self._pieces.values())))

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
        del self._pieces[id(piece)]
        own = self._of_account[piece.account]
        del own[id(piece)]
        if not own:
            del self._of_account[piece.account]
        self.used_bytes -= piece.state.nbytes
