"""One branch of an answer: from token ids to phases, counts and text that may be sent.

Knows nothing of logits or of the engine's memory. The worker's loop for each branch:

    forced = answer.forced()            # ids that need no sampling; else:
    token = answer.instead_of(pick(…, mask=answer.constraint(), banned=answer.banned()).id)
    answer.accept(token, logprob)       # one by one, until answer.finish is set
    chunks = answer.drain()             # to be sent together: a restart must see all or none of them

All state is a function of the ids accepted, so `replay` rebuilds it after an engine's death. A token goes through
    ThinkingBlock (bytes; takes the marks out) → Outbox (UTF-8, stop strings)
and what is certain behind both is released.

    phase     tokens count as   grammar applies   an end-of-generation token            a token of `stop_ids`
    BEFORE    output            no                ends the answer                       ends the answer
    INSIDE    thinking          no                closes the block: see `instead_of`    is as any other
    AFTER     output            yes               ends the answer                       ends the answer
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from nimbos.engine.grammar import Matcher
from nimbos.engine.outbox import Outbox
from nimbos.engine.sampler import RecentCounts, penalizes
from nimbos.engine.text import Phase, ThinkingBlock
from nimbos.engine.vocab import Vocab
from nimbos.errors import AnswerFailed
from nimbos.types import Ask, Channel, ChosenLogprob, FinishReason, Thinking, TokenChunk, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Farewell:
    """The tokens with which the engine ends thinking. `before` counts as thinking, the rest does not."""

    before: tuple[int, ...]
    close: tuple[int, ...]
    after: tuple[int, ...]
    open_mark: int | None  # the marks' tokens, where one token is the whole mark
    close_mark: int | None

    @staticmethod
    def plan(thinking: Thinking, vocab: Vocab) -> Farewell:
        before, _, after = thinking.farewell.partition(thinking.close)
        open_ids = vocab.tokenize(thinking.open.encode(), True)
        close_ids = vocab.tokenize(thinking.close.encode(), True)
        return Farewell(
            before=tuple(vocab.tokenize(before.encode(), False)) if before else (),
            close=tuple(close_ids),
            after=tuple(vocab.tokenize(after.encode(), True)) if after else (),
            open_mark=open_ids[0] if len(open_ids) == 1 else None,
            close_mark=close_ids[0] if len(close_ids) == 1 else None,
        )


class Answer:
    """`finish` is None while tokens are wanted. `stopped_by`: the stop string that ended it. `recent`: for `pick`.

    End-of-generation tokens count as output and have no text. `max_tokens` counts all tokens of the branch, those of
    `replay` too; so does what `allow` allows. An ask with a grammar thinks only if its thinking has `started`.
    `budget_ended`: it ended because nothing more is paid for.
    """

    def __init__(
        self,
        vocab: Vocab,
        ask: Ask,
        branch: int,
        matcher: Matcher | None,
        prompt_tail: Sequence[int],
        max_tokens: int,
    ) -> None:
        self.branch = branch
        self.finish: FinishReason | None = None
        self.stopped_by: str | None = None
        self.budget_ended = False
        self.output_tokens = 0
        self.recent = RecentCounts(window=0)
        if penalizes(ask.sampling):
            self.recent = RecentCounts(prompt_tail, window=ask.sampling.penalty_window)
        self._vocab = vocab
        self._ask = ask
        self._max_tokens = max_tokens
        self._allowance: int | None = None
        self._allowance_last = False
        self._matcher = matcher
        self._mask: NDArray[np.bool_] | None = None
        self._eog = tuple(sorted(vocab.eog))
        self._outbox = Outbox(ask.stop)
        self._queue: deque[int] = deque()  # what is left of a farewell
        self._thinking_tokens = 0
        self._starts: list[int] = []  # offsets of the last thinking tokens, which may turn out to be the close mark
        self._block: ThinkingBlock | None = None
        self._farewell: Farewell | None = None
        thinking = ask.thinking
        if thinking is not None and (thinking.started or matcher is None):
            phase = Phase.INSIDE if thinking.started else Phase.BEFORE
            self._block = ThinkingBlock(thinking.open.encode(), thinking.close.encode(), phase)
            self._farewell = Farewell.plan(thinking, vocab)
        self._conclude()

    @property
    def phase(self) -> Phase:
        return self._block.phase if self._block is not None else Phase.AFTER

    @property
    def thinking_tokens(self) -> int:
        """A part of `output_tokens`, at most the budget (what there is of a close mark is not thinking)."""
        budget = self._ask.thinking.budget_tokens if self._ask.thinking is not None else 0
        return min(self._thinking_tokens, budget)

    @property
    def spent(self) -> bool:
        """Whether it must wait until more is paid for."""
        return self.finish is None and self._allowance is not None and self.output_tokens >= self._allowance

    @property
    def room(self) -> int:
        """How many tokens may come yet: by the limit, and by what is paid for."""
        most = self._max_tokens if self._allowance is None else min(self._max_tokens, self._allowance)
        return 0 if self.finish is not None else max(0, most - self.output_tokens)

    def allow(self, tokens: int | None, *, last: bool) -> None:
        """So many tokens are paid for, None: all. With `last` the answer ends there, if it does not end before."""
        self._allowance, self._allowance_last = tokens, last
        self._conclude()

    def forced(self) -> tuple[int, ...]:
        """Ids that must come next, at most as many as there is room for and are paid for. Accept them one by one while
        not finished."""
        if self._queue:
            return tuple(islice(self._queue, self.room))
        if self._matcher is None or self.phase is not Phase.AFTER or not self.room:
            return ()
        return self._matcher.forced()[: self.room]

    def constraint(self) -> NDArray[np.bool_] | None:
        """Which tokens the grammar allows next, shape (n_vocab,), valid until the next call; None: all.

        Raises: AnswerFailed when the grammar ran into its limits.
        """
        if self._matcher is None or self.phase is not Phase.AFTER:
            return None
        if self._mask is None:
            self._mask = np.empty(len(self._vocab), dtype=np.bool_)
        self._matcher.mask_into(self._mask)
        if self._goes_on:
            self._mask[list(self._barred_ends)] = (
                False  # something else is allowed, or `Matcher.stopped` would have ended it
            )
        return self._mask

    def banned(self) -> tuple[int, ...]:
        """Ids that must not come next although the model may want them: ends that are not wanted yet, and marks of a
        second block of thinking."""
        if self._matcher is not None and self.phase is Phase.AFTER:
            return ()  # `constraint` has taken care of it
        banned: tuple[int, ...] = ()
        if self._goes_on and self.phase is not Phase.INSIDE:
            banned = self._barred_ends
        if self._farewell is not None and self.phase is not Phase.BEFORE:
            marks = (self._farewell.open_mark, self._farewell.close_mark if self.phase is Phase.AFTER else None)
            banned += tuple(mark for mark in marks if mark is not None)
        return banned

    def instead_of(self, token: int) -> int:
        """The id to accept in place of a sampled one: an end of generation inside thinking becomes the close mark, so
        that the model answers instead of reading its own end. (Where the mark is several tokens the end is accepted,
        and the mark is forced after it.)"""
        mark = self._farewell.close_mark if self._farewell is not None else None
        return mark if mark is not None and self.phase is Phase.INSIDE and token in self._vocab.eog else token

    def accept(self, token: int, logprob: ChosenLogprob | None = None) -> None:
        """Raises: AnswerFailed for a token that cannot stand here; the answer is then of no further use."""
        if self.finish is not None or not 0 <= token < len(self._vocab):
            raise AnswerFailed(f"Token {token} cannot stand here (finished: {self.finish}).")
        planned = bool(self._queue)
        if planned and self._queue.popleft() != token:
            raise AnswerFailed(f"Token {token} came where another one was forced.")
        phase = self.phase
        self.output_tokens += 1
        self.recent.append(token)
        self._note(token, logprob)
        if token in self._ask.stop_ids and self._stops_at(phase) and not planned:
            self._end(FinishReason.STOP)
        elif token in self._vocab.eog and not planned:
            self._meet_end(phase)
        else:
            constrained = self._matcher is not None and phase is Phase.AFTER and not planned
            self._read(token, phase, answers=constrained or self._matcher is None)
            if constrained:
                self._advance(token)
        if planned and not self._queue and self._block is not None and self.phase is Phase.INSIDE:
            self._release(self._block.abandon())  # a farewell without a close mark
        self._conclude()

    def replay(self, ids: Iterable[int]) -> None:
        """Takes tokens that were drained before an engine's death; their text is not released again."""
        for token in ids:
            self.accept(token)
        self._outbox.take(self.branch, logprobs=False)

    def drain(self) -> list[TokenChunk]:
        """What became certain since the last call, in order; every accepted id is in exactly one chunk."""
        return self._outbox.take(self.branch, logprobs=self._ask.sampling.logprobs is not None)

    @property
    def _goes_on(self) -> bool:
        return self._ask.ignore_eos or self.output_tokens < self._ask.min_tokens

    @property
    def _barred_ends(self) -> tuple[int, ...]:
        """While it goes on: ends that its asker does not want as such, which one of `stop_ids` is."""
        if self.output_tokens < self._ask.min_tokens:
            return self._eog
        return tuple(token for token in self._eog if token not in self._ask.stop_ids)

    def _note(self, token: int, logprob: ChosenLogprob | None) -> None:
        if self._ask.sampling.logprobs is None:
            logprob = None
        elif logprob is None or logprob.chosen.id != token:  # forced
            logprob = ChosenLogprob(chosen=TokenLogprob(id=token, piece=self._vocab.pieces[token], logprob=0.0))
        self._outbox.note(_channel(self.phase), token, logprob)

    def _stops_at(self, phase: Phase) -> bool:
        return phase is not Phase.INSIDE and self.output_tokens > self._ask.min_tokens

    def _meet_end(self, phase: Phase) -> None:
        if phase is Phase.INSIDE and self._farewell is not None:
            self._thinking_tokens += 1
            self._queue.extend(self._farewell.close + self._farewell.after)
        elif self._matcher is not None or not (self._ask.ignore_eos or self.output_tokens <= self._ask.min_tokens):
            self._end(FinishReason.STOP)

    def _read(self, token: int, phase: Phase, *, answers: bool) -> None:
        """`answers`: text outside of thinking belongs to the answer. With a grammar, what follows the close mark in
        the same token or in the farewell does not."""
        piece = self._vocab.pieces[token]
        hidden = token in self._vocab.control or token in self._vocab.eog
        block = self._block
        if block is None or not block.busy or (phase is Phase.AFTER and self._matcher is not None):
            if answers and not hidden:
                self._release([(Phase.AFTER, piece)])
            return
        start = block.seen
        given, closed_at = block.feed(b"" if hidden and phase is Phase.AFTER else piece, shown=not hidden)
        self._release(given if answers else [part for part in given if part[0] is Phase.INSIDE])
        if phase is Phase.INSIDE:
            self._count_thinking(block, start, closed_at)
        if closed_at is None or self._queue or self._matcher is None or self._farewell is None:
            return
        if block.seen == closed_at + len(block.close):  # a model that closes by itself goes on as after a farewell
            self._queue.extend(self._farewell.after)

    def _count_thinking(self, block: ThinkingBlock, start: int, closed_at: int | None) -> None:
        """Tokens that turn out to lie in the close mark are not thinking."""
        self._thinking_tokens += 1
        self._starts.append(start)
        if closed_at is not None:
            self._thinking_tokens -= sum(at >= closed_at for at in self._starts)
        self._starts = [at for at in self._starts if at >= block.held_from]

    def _release(self, parts: Sequence[tuple[Phase, bytes]]) -> None:
        stops = self.output_tokens >= self._ask.min_tokens
        for phase, raw in parts:
            self._outbox.write(_channel(phase), raw, stops=stops)

    def _advance(self, token: int) -> None:
        assert self._matcher is not None
        if not self._matcher.accept(token):
            kind = (self._matcher.error or "").partition(":")[0]  # what follows may quote the text
            raise AnswerFailed(f"Token {token} cannot stand here: the grammar says {kind!r}.")

    def _conclude(self) -> None:
        """Decides, after each token, whether it was the last one and whether thinking must end."""
        matcher = self._matcher if self.phase is Phase.AFTER and not self._queue else None
        if self.finish is not None:
            return
        if self._outbox.hit is not None or (matcher is not None and matcher.stopped):
            self._end(FinishReason.STOP)
        elif self.output_tokens >= self._max_tokens:
            self._end(FinishReason.LENGTH)
        elif self.spent and self._allowance_last:
            self._end(FinishReason.LENGTH)
            self.budget_ended = self.finish is FinishReason.LENGTH
        elif self.phase is Phase.INSIDE and not self._queue:
            self._plan_farewell()

    def _plan_farewell(self) -> None:
        assert self._farewell is not None and self._block is not None and self._ask.thinking is not None
        budget = self._ask.thinking.budget_tokens
        before = self._farewell.before if len(self._farewell.before) <= budget else ()
        if budget - self._thinking_tokens > len(before):
            return
        self._queue.extend(before + self._farewell.close + self._farewell.after)
        if not self._queue:
            self._release(self._block.abandon())  # a mark that no token writes

    def _end(self, reason: FinishReason) -> None:
        """Releases what is held back; should a stop string come to light in it, that is the reason."""
        if self._block is not None and self._block.busy:
            self._release(self._block.finish())
        self._outbox.flush(stops=self.output_tokens >= self._ask.min_tokens)
        self.stopped_by = self._outbox.hit
        self.finish = FinishReason.STOP if self.stopped_by is not None else reason
        self._queue.clear()


def _channel(phase: Phase) -> Channel:
    return Channel.THINKING if phase is Phase.INSIDE else Channel.TEXT
