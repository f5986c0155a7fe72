"""Guessing ahead: where a text repeats what stands in it already, what came after it then comes again.

Guessed tokens are computed in the same step as the token before them, each with logits; the loop samples from these one
by one, as it would have step by step, and keeps the cells of the guesses that it sampled. So an answer is the same with
guesses and without, up to rounding, whatever its sampling, grammar or penalties are: only the time differs. That pays
where many guesses come true, since on a processor each row of a step costs time: `worth` decides by predicted times.
Knows no model. `loop.py` computes and samples. Source: prompt lookup decoding (Saxena, 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from nimbos.engine.scheduler import FILL, KERNEL_ROWS, Costs, Plan, Rules

MATCH_TOKENS = 8  # so many last tokens must have stood there before, to try at all
MATCH_TOKENS_TRUSTED = 3  # where guesses came true before
MATCH_TOKENS_MAX = 32  # no longer match is looked for
TRUSTED = 0.75
FORGET = 0.9  # of what came true, with each guess
MARGIN = 1.05  # predicted times are not exact
PAUSE_TOKENS, PAUSE_TOKENS_MAX = 32, 1024  # without guesses after one that did not pay; doubled each time


@dataclass(slots=True, eq=False)
class Guesser:
    """Of one branch. `trust`: how likely the next guessed token is right, if those before it were."""

    _text: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(256, np.int32))
    _length: int = 0
    _right: float = 2.0  # guesses that came true, and
    _wrong: float = 0.5  # those that did not, of late; the start is a prejudice
    _pause: int = PAUSE_TOKENS
    _silent_until: int = 0  # length of the text

    @property
    def trust(self) -> float:
        return self._right / (self._right + self._wrong)

    def guess(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """What may follow `tokens`, which are those of the last call and more; at most `most`."""
        self._append(tokens)
        if most <= 0 or self._length < self._silent_until:
            return ()
        at = self._last_match(MATCH_TOKENS_TRUSTED if self.trust >= TRUSTED and self._right > 2.0 else MATCH_TOKENS)
        if at is None:
            return ()
        came_after = self._text[at + 1 : min(self._length, at + 1 + most)]
        return tuple(np.resize(came_after, most).tolist())  # what goes round in a circle goes on so

    def learn(self, offered: int, right: int) -> None:
        """Of `offered` guesses that were computed, the first `right` came true."""
        self._right = self._right * FORGET + right
        self._wrong = self._wrong * FORGET + (right < offered)
        if right == offered:
            self._pause = PAUSE_TOKENS
        elif right == 0:
            self._silent_until = self._length + self._pause
            self._pause = min(PAUSE_TOKENS_MAX, 2 * self._pause)

    def _append(self, tokens: Sequence[int]) -> None:
        fresh = tokens[self._length :]
        end = self._length + len(fresh)
        if end > len(self._text):
            grown = np.empty(2 * end, np.int32)
            grown[: self._length] = self._text[: self._length]
            self._text = grown
        self._text[self._length : end] = fresh
        self._length = end

    def _last_match(self, least: int) -> int | None:
        """Where the last tokens stood before: the end of the longest such place, the latest of equal ones."""
        if self._length < least:
            return None
        text, end = self._text, self._length - 1
        places = np.flatnonzero(text[:end] == text[end])
        for back in range(1, MATCH_TOKENS_MAX):
            longer = places[places >= back]
            longer = longer[text[longer - back] == text[end - back]]
            if not len(longer):
                return int(places[-1]) if len(places) and back >= least else None
            places = longer
        return int(places[-1])


@dataclass(frozen=True, slots=True)
class Offer:
    """Guesses for one branch of a step."""

    trust: float
    tokens: tuple[int, ...]


def with_guesses(plan: Plan, offers: Sequence[Offer], costs: Costs, rules: Rules, *, most_rows: int) -> Plan:
    """The plan with as many guesses as pay; `offers[i]` is for the plan's slice i."""
    cells = sum(part.job.computed + 1 for part in plan.slices)
    ceiling_ms = FILL * rules.stall_target_ms if plan.has_interactive else float("inf")

    def time_ms(rows: int) -> float:
        predicted = costs.predict(rows, cells * rows // plan.rows)
        return predicted if rows == plan.rows or predicted <= ceiling_ms else float("inf")

    counts = worth(offers, rows=plan.rows, most_rows=most_rows, time_ms=time_ms)
    parts = tuple(
        replace(part, guess=offer.tokens[:count])
        for part, offer, count in zip(plan.slices, offers, counts, strict=True)
    )
    rows = sum(part.rows for part in parts)
    return replace(plan, slices=parts, rows=rows, predicted_ms=time_ms(rows))


def worth(offers: Sequence[Offer], *, rows: int, most_rows: int, time_ms: Callable[[int], float]) -> list[int]:
    """How many guesses of each offer make the step give most tokens a millisecond; 0 where none would.

    The step has `rows` without guesses, each for a token of its own; `time_ms` is of a step of so many rows, infinite
    for one that may not be.
    """
    counts = [0] * len(offers)
    tokens, total = float(rows), rows
    best = tokens / time_ms(rows)
    for index in sorted(range(len(offers)), key=lambda i: -offers[i].trust):
        offer = offers[index]
        most = min(len(offer.tokens), most_rows - total)
        gained = 0.0
        chosen, chosen_gain = 0, 0.0
        for count in range(1, most + 1):
            gained += offer.trust**count
            if (total + count) % KERNEL_ROWS and count < most:
                continue
            rate = (tokens + gained) / time_ms(total + count)
            if rate > best * (1.0 if chosen else MARGIN):
                chosen, chosen_gain, best = count, gained, rate
        counts[index] = chosen
        tokens, total = tokens + chosen_gain, total + chosen
    return counts
