"""What one ask has used, counted where it is computed and written to its row of the meter file before it is told.

The branches of an ask share one tally, since they share a prompt. What is billed of the prompt is a height: positions
[0, reached) were found in memory or computed, once; computing a position below it again (for another branch, after
giving way, after an engine's death) is `recomputed`. Numbers are collected here during a step and written by `write`,
which must come before anything of that step is posted. Read `meterfile.py` for the row.

After an engine's death the row knows what was counted and the ask what was received; what was counted and never
received is sampled again, so `resume` moves it to what is not billed. An ask that goes on with another's answer bills
nothing of what that one has paid for: its height begins there, and its first tokens of output may be paid for, too,
in whichever branch they come. A branch that ends tells its tokens less those of all that nobody has told yet.
"""

from __future__ import annotations

from nimbos.meterfile import Row
from nimbos.types import Usage


class Tally:
    """`open_branches`: those that have not ended yet; the last one tells what was computed again. `paid_prompt` and
    `paid_output`: tokens that an earlier ask has paid for."""

    __slots__ = (
        "_again",
        "_paid_output",
        "_paid_prompt",
        "_pending",
        "_row",
        "_told_again",
        "cached",
        "open_branches",
        "prompt_tokens",
        "reached",
        "recomputed",
    )

    def __init__(
        self,
        prompt_tokens: int,
        row: Row | None,
        *,
        open_branches: int = 1,
        paid_prompt: int = 0,
        paid_output: int = 0,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.open_branches = open_branches
        self.reached = self._paid_prompt = min(paid_prompt, prompt_tokens)
        self.cached = self.recomputed = 0
        self._paid_output = paid_output
        self._again = (0, 0)  # of this ask's output and thinking, what was paid for
        self._told_again = (0, 0)  # of that, what branches that ended have left out
        self._row = row
        self._pending = [0] * 8

    def resume(
        self, *, output: int, thinking: int, cached: int | None, ended_output: int = 0, ended_thinking: int = 0
    ) -> None:
        """Goes on where an earlier engine stopped. `output` and `thinking`: tokens that the server has received, and
        `ended_…` those of them that are of branches that have ended; `cached`: prompt tokens that were found then, None
        if it had not begun (used where there is no row)."""
        again, thought_again = self._take_paid(output, thinking)
        self._told_again = min(ended_output, again), min(ended_thinking, thought_again)
        if self._row is None:
            if cached is not None:
                self.reached, self.cached = self.prompt_tokens, cached
            return
        told = self._row.counts().usage()
        self.reached, self.cached = self._paid_prompt + told.input, told.cached
        lost, lost_thinking = told.output - (output - again), told.thinking - (thinking - thought_again)
        self.recomputed = told.recomputed + lost
        self._row.add(output=-lost, thinking=-lost_thinking, recomputed_output=lost, recomputed_thinking=lost_thinking)

    def found(self, matched: int) -> None:
        """A branch begins with `matched` tokens that are in memory."""
        more = min(matched, self.prompt_tokens) - self.reached
        if more > 0:
            self.reached += more
            self.cached += more
            self._pending[1] += more

    def computed(self, start: int, count: int, *, known: int = 0, milliseconds: float = 0.0) -> int:
        """Positions [start, start + count) were computed. `known`: of those behind the prompt, the ones below it had
        been computed before. Returns: how many were computed again."""
        end = start + count
        fresh = max(0, min(end, self.prompt_tokens) - max(start, self.reached))
        again = max(0, min(end, self.prompt_tokens) - start) - fresh
        again += max(0, min(end, known) - max(start, self.prompt_tokens))
        self.reached += fresh
        self.recomputed += again
        self._pending[0] += fresh
        self._pending[4] += again
        self._pending[7] += round(milliseconds * 1e3)
        return again

    def answered(self, output: int, thinking: int) -> None:
        """`thinking` may be below zero: a token thought to be thinking turned out to be in the closing mark."""
        again, thought_again = self._take_paid(output, thinking)
        self.recomputed += again
        self._pending[2] += output - again
        self._pending[3] += thinking - thought_again
        self._pending[5] += again
        self._pending[6] += thought_again

    def write(self) -> None:
        if self._row is not None:
            self._row.add_all(self._pending)
        self._pending = [0] * 8

    def usage(self, *, first: bool, output: int, thinking: int) -> Usage:
        """Of one branch that ends; the prompt is told by the first, and what was computed again by the last."""
        self.open_branches -= 1
        told, told_thinking = self._told_again
        again = min(output, self._again[0] - told)
        thought_again = min(thinking, self._again[1] - told_thinking)
        self._told_again = told + again, told_thinking + thought_again
        return Usage(
            input=self.reached - self._paid_prompt if first else 0,
            cached=self.cached if first else 0,
            output=output - again,
            thinking=thinking - thought_again,
            recomputed=self.recomputed if self.open_branches == 0 else 0,
        )

    def _take_paid(self, output: int, thinking: int) -> tuple[int, int]:
        """Of the next tokens of output, and of thinking among them, those that are paid for."""
        again = min(output, self._paid_output)
        thought_again = thinking if again == output else min(max(0, thinking), again)
        self._paid_output -= again
        self._again = (self._again[0] + again, self._again[1] + thought_again)
        return again, thought_again
