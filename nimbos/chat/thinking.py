"""How many tokens a request may think, and how the prompt must end for it.
`dial.py` reads what was asked for; `family.py` knows the model's marks.

Off and "auto": off closes the block in the prompt, so not one token is spent. "auto" scores the request:

    2  words of mathematics, proof, puzzles, debugging or algorithms      1  more than 400 characters
    1  several numbers with operators between them                        1  a block of code
    1  words for several steps, or a numbered list                        1  two or more tools

From 2 points it thinks with the level `medium`, from 4 with `high`, below 2 not at all. A level or budget that came
along with "auto" is used instead when the rule says yes.
"""

from __future__ import annotations

import re

from nimbos.chat.dial import LEVEL_TOKENS, Dial
from nimbos.chat.family import Marks
from nimbos.types import Thinking

_SHORT_BUDGET_TOKENS = 64  # below it the farewell would eat the thinking
_FAREWELL = "\nMy thinking budget is used up, so I answer now with what I have worked out.\n"

_HARD_WORDS = re.compile(
    r"\b(prove|proof|theorem|lemma|integral|derivative|equation|polynomial|probability|combinatori\w*|modulo|matrix"
    r"|calculate|compute|solve|riddle|puzzle|algorithm|complexity|debug|refactor|optimi[sz]e|regex|recursi\w*"
    r"|implement|segfault|deadlock|race condition)\b|证明|计算|求解|方程|概率|算法|推理",
    re.IGNORECASE,
)
_ARITHMETIC = re.compile(r"\d\s{0,3}[-+*/^=×÷<>]\s{0,3}[\d(].{0,80}?\d\s{0,3}[-+*/^=×÷<>]\s{0,3}[\d(?]", re.DOTALL)
_STEPS = re.compile(
    r"\bstep[ -]by[ -]step\b|\bfirst\b.{0,200}?\bthen\b|^\s{0,3}2[.)]\s|分步|一步一步",
    re.IGNORECASE | re.DOTALL | re.MULTILINE,
)
_CODE = re.compile(r"```|^\s{0,8}(def|class|fn|func|function|public|import|#include)\b", re.MULTILINE)
_READ_CHARACTERS = 16_384
_LONG_CHARACTERS = 400


def resolve(
    dial: Dial, *, max_tokens: int | None, context_tokens: int, last_user_text: str = "", tools: int = 0
) -> int | None:
    """Tokens of thinking, 0 for none, always below `max_tokens`; None when nothing was asked for."""
    if not dial.given:
        return None
    ceiling = most_tokens(max_tokens=max_tokens, context_tokens=context_tokens)
    if dial.switch == "auto":
        level = decide(last_user_text, tools=tools)
        if level is None:
            return 0
        dial = Dial(budget=dial.budget, level=dial.level or level)
    if dial.budget is not None:
        return min(dial.budget, ceiling)
    if dial.level is not None:
        tokens = LEVEL_TOKENS[dial.level]
        return ceiling if tokens is None else min(tokens, ceiling)
    return ceiling if dial.switch else 0


def most_tokens(*, max_tokens: int | None, context_tokens: int) -> int:
    """One token is left for the answer."""
    limits = [limit for limit in (max_tokens, context_tokens or None) if limit is not None]
    return max(0, min(limits, default=1) - 1)


def decide(text: str, *, tools: int) -> str | None:
    """The level that the rule above gives a request, or None for no thinking."""
    read = text[:_READ_CHARACTERS]
    score = 2 * bool(_HARD_WORDS.search(read)) + bool(_ARITHMETIC.search(read)) + bool(_STEPS.search(read))
    score += bool(_CODE.search(read)) + (len(text) > _LONG_CHARACTERS) + (tools >= 2)
    if score < 2:
        return None
    return "high" if score >= 4 else "medium"


def describe_thinking(marks: Marks, *, budget_tokens: int, started: bool) -> Thinking:
    words = _FAREWELL if budget_tokens >= _SHORT_BUDGET_TOKENS else "\n"
    return Thinking(
        open=marks.open,
        close=marks.close,
        budget_tokens=budget_tokens,
        started=started,
        farewell=f"{words}{marks.close}\n\n",
    )


def end_open(prompt: str, marks: Marks) -> str:
    """The end of the prompt, changed so that the model goes on inside an open block."""
    bare = prompt.rstrip()
    if bare.endswith(marks.open):
        return prompt
    if bare.endswith(marks.close):  # a template that closes an empty block whatever it is told
        before = bare[: -len(marks.close)].rstrip()
        if before.endswith(marks.open):
            return before[: -len(marks.open)] + marks.opening
    return prompt + marks.opening


def end_closed(prompt: str, marks: Marks) -> str:
    """The end of the prompt, changed so that the thinking is over before it began."""
    bare = prompt.rstrip()
    if bare.endswith(marks.close):
        return prompt
    if bare.endswith(marks.open):
        return bare[: -len(marks.open)] + marks.skipped
    return prompt + marks.skipped


def ends_open(prompt: str, marks: Marks) -> bool:
    return prompt.rstrip().endswith(marks.open)


def ends_closed(prompt: str, marks: Marks) -> bool:
    return prompt.rstrip().endswith(marks.close)
