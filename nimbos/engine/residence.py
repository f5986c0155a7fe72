"""Who is in the model's cells and who waits outside: idle contexts are written out, and put back when they go on.

Every step pays for every cell in use, also for those that no row of it reads, so contexts that nobody uses should not
stay there. What is written out is only what no other context shares, a piece at a time from its end, because a piece
takes as long as its bytes: a step waits for one at most. Put back, a piece is copied behind the prefix that its context
shares with the ones in the cells. Read `store.py` for where pieces are kept and `context.py` for who shares what.

All of it goes through one sequence id that nothing else uses, `scratch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nimbos.engine.context import ContextTree, Match, Operation
from nimbos.engine.model import Model
from nimbos.engine.store import Piece, Store
from nimbos.engine.swapfile import SwapFile

PIECE_BYTES = 16 * 1024 * 1024
PIECE_TOKENS_MIN, PIECE_TOKENS_MAX = 32, 512


class Residence:
    def __init__(
        self,
        model: Model,
        tree: ContextTree,
        *,
        scratch: int,
        budget_bytes: int,
        perform: Callable[[Sequence[Operation]], None],
        swap: SwapFile | None = None,
    ) -> None:
        """`budget_bytes`: of memory. `swap`: for what is more than that. Without either nothing is written out."""
        self._model, self._tree, self._scratch, self._perform = model, tree, scratch, perform
        self._store = Store(budget_bytes, swap)
        per_piece = PIECE_BYTES // max(1, model.kv_bytes_per_token)
        self._piece_tokens = max(PIECE_TOKENS_MIN, min(PIECE_TOKENS_MAX, per_piece))
        self.written_tokens = self.restored_tokens = 0
        self._kept_tokens: list[int] = []  # of the last piece

    @property
    def enabled(self) -> bool:
        return self._store.room_bytes > 0

    @property
    def stored_bytes(self) -> int:
        return self._store.used_bytes + self._store.disk_bytes

    def write_out_one(self, *, keep: Match | None = None) -> bool:
        """The last piece of the context that was used least recently, `keep`'s excepted.

        Returns: False when there is none to write.
        """
        found = self._tree.oldest_idle(keep=keep) if self.enabled else None
        if found is None:
            return False
        end = self._tree.length(found.branch)
        start = max(found.start, end - self._piece_tokens)
        if start - found.start < PIECE_TOKENS_MIN:
            start = found.start  # no short rest: without the first piece the others cannot be put back
        if end - start >= PIECE_TOKENS_MIN:  # what is shorter is not worth its keeping
            self._keep(found.branch, max(0, start - PIECE_TOKENS_MIN), end)
        self._perform(self._tree.cut(found.branch, start))
        return True

    def _keep(self, branch: int, start: int, end: int) -> None:
        """Pieces overlap a little, so that a short rest before one, which was not kept, does not bar the way to it."""
        self._model.copy(branch, self._scratch, end, start=start)
        state = self._model.save(self._scratch)
        self._model.drop(self._scratch)
        self._store.put(Piece(self._tree.account(branch), self._tokens(branch), start, end, state))
        self.written_tokens += end - start

    def _tokens(self, branch: int) -> list[int]:
        """The pieces of a context, which are written one after another from its end on, have one list of all its
        tokens; of a list for each, long contexts would take much memory that nobody counts."""
        tokens = self._tree.tokens(branch)
        if self._kept_tokens[: len(tokens)] != tokens:
            self._kept_tokens = tokens
        return self._kept_tokens

    def piece_cells(self, account: str, tokens: Sequence[int], at: int) -> int:
        """How many cells putting back needs at most at a time, when [0, at) are there; 0 when nothing is kept. A piece
        comes whole: with what it overlaps, and with what these tokens do not have."""
        found = self._store.find(account, tokens, at)
        return found.piece.end - found.piece.start if found is not None else 0

    def put_back(self, branch: int, account: str, tokens: Sequence[int], at: int, *, pieces: int = 1 << 30) -> int:
        """Adds to a live branch that holds `tokens[:at]` what is kept of the others, as far as cells are free, and at
        most so many `pieces`.

        Returns: how many of the tokens it holds now.
        """
        for _ in range(pieces):
            found = self._store.find(account, tokens, at)
            if found is None:
                break
            piece = found.piece
            if piece.end - piece.start > self._tree.free_cells:
                break
            state = self._store.state(piece)
            if state is None or found.end == piece.end:
                self._store.remove(piece)
            if state is None:
                continue
            if not self._model.load(self._scratch, state):
                break
            self._model.copy(self._scratch, branch, found.end, start=at)
            self._model.drop(self._scratch)
            self._tree.extend(branch, tokens[at : found.end])
            self.restored_tokens += found.end - at
            at = found.end
        return at
