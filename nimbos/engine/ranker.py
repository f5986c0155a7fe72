"""Reranking: a query and documents in, a score from 0 to 1 for each document out.

A decoder reads instructions, query and then the document, so all prompts of an ask begin alike: the first document's
prompt stays in memory as the ask's *home*, and the others take over what they share with it and compute the rest, many
in a step. An encoder sees all of a prompt at once and shares nothing. Read `ranking.py` for prompts and scores.
"""

from __future__ import annotations

from nimbos.engine.context import common_length
from nimbos.engine.embedder import Embedder, Piece, Work
from nimbos.engine.loop import Hold, Post
from nimbos.engine.model import Model
from nimbos.engine.protocol import Submit
from nimbos.engine.ranking import Ranking
from nimbos.engine.scheduler import Rules
from nimbos.meterfile import Row
from nimbos.types import Chunk, ScoreChunk

HOMES = 8  # asks whose beginning is kept; sequences 0 … 7 are theirs, the next ones the documents'
WORTH_SHARING = 8  # tokens


class Ranker(Embedder):
    def __init__(self, model: Model, ranking: Ranking, rules: Rules, *, post: Post, hold: Hold) -> None:
        super().__init__(model, rules, post=post, hold=hold)
        self._ranking = ranking
        self._homes: dict[int, tuple[Work, int]] = {}  # by sequence: whose, and its tokens; least recently used first
        self.interruptible = False  # what it plans is in its homes before it is computed
        self._used = 0  # of the documents' sequences
        self._unfinished: Piece | None = None  # a prompt longer than a step; nothing comes between its pieces

    def submit(self, submit: Submit, inputs: tuple[tuple[int, ...], ...], row: Row | None = None) -> None:
        super().submit(submit, inputs, row)
        if self.model.shares_prefixes and len(inputs) > 1:
            shared = min(min(common_length(ids, inputs[0], 0), len(ids) - 1) for ids in inputs)
            self._waiting[-1].shared = shared if shared >= WORTH_SHARING else 0

    def cancel(self, ask_id: str) -> None:
        super().cancel(ask_id)
        if self._unfinished is not None and self._unfinished.work.ask.id == ask_id:
            self._unfinished = None

    def _choose(self) -> list[Piece]:
        if self._unfinished is not None:
            rest = self._unfinished
            return [self._cut(rest.work, rest.index, rest.end, rest.sequence)]
        for sequence in range(HOMES, HOMES + self._used):
            self.model.drop(sequence)
        self._used = 0
        for sequence in [s for s, (work, _) in self._homes.items() if work not in self._waiting]:
            self._forget_home(sequence)
        if not self._waiting:
            return []
        work = self._order()[0]
        home = self._home_of(work)
        if work.shared and home is None:
            return [self._begin_home(work)]
        return self._documents(work, home)

    def _documents(self, work: Work, home: int | None) -> list[Piece]:
        """As many of the next documents as fit. A prompt that fits no step goes alone, in pieces."""
        self._free_cells(len(work.inputs[work.done]) - work.shared, keep=home)
        room = min(self._room(), self._free)
        pieces: list[Piece] = []
        for index in range(work.done, len(work.inputs)):
            own = len(work.inputs[index]) - work.shared
            sequence = HOMES + len(pieces)
            if pieces and (own > room or sequence >= self.model.options.sequences or not pieces[0].whole):
                break
            if home is not None:
                self.model.copy(home, sequence, work.shared)
            self._used += 1
            pieces.append(self._cut(work, index, work.shared, sequence))
            room -= own
        return pieces

    def _cut(self, work: Work, index: int, start: int, sequence: int) -> Piece:
        most = self._room() if self.model.causal else self.model.options.step_tokens
        end = min(len(work.inputs[index]), start + most)
        piece = Piece(work, index, start, end, sequence)
        self._unfinished = None if piece.whole else piece
        return piece

    # --- homes

    def _home_of(self, work: Work) -> int | None:
        """Its sequence, which from now on holds only what all prompts share."""
        for sequence, (owner, tokens) in self._homes.items():
            if owner is work:
                del self._homes[sequence]
                self._homes[sequence] = work, work.shared
                if tokens > work.shared:
                    self.model.drop(sequence, work.shared)
                return sequence
        return None

    def _begin_home(self, work: Work) -> Piece:
        """The next document's prompt from its first token on; its score comes with it."""
        length = len(work.inputs[work.done])
        if len(self._homes) == HOMES:
            self._forget_home(next(iter(self._homes)))
        self._free_cells(length, keep=None)
        sequence = next(number for number in range(HOMES) if number not in self._homes)
        self._homes[sequence] = work, length
        return self._cut(work, work.done, 0, sequence)

    @property
    def _free(self) -> int:
        return self.model.cells - sum(tokens for _, tokens in self._homes.values())

    def _free_cells(self, tokens: int, *, keep: int | None) -> None:
        for sequence in [s for s in self._homes if s != keep]:
            if self._free >= tokens:
                return
            self._forget_home(sequence)

    def _forget_home(self, sequence: int) -> None:
        del self._homes[sequence]
        self.model.drop(sequence)

    def _result(self, piece: Piece, row: int) -> Chunk:
        return ScoreChunk(index=piece.index, score=self._ranking.score(piece.sequence, row))
