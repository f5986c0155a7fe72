"""Map over children: the results of a child for each input. Steps like any others, so a function that parks or crashes
in the middle starts no child twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nimbos.adk.steps import Budget, Child, ChildFunction, StepFailed, spawn, wait

OVERLOADED = "overloaded"  # the code of a spawn where as many children live as may


async def each(
    program: str | ChildFunction, inputs: Sequence[Any], *, budget: Budget | None = None, model: str = ""
) -> list[Any]:
    """The results of a child for each input, in their order: the map of map-reduce, and with the same input n times the
    n of best-of-n (`max(await each(draft, [topic] * 5), key=score)`). As many live at a time as its program may have;
    the others begin as those end. Raises: StepFailed for the first that failed."""
    children: list[Child] = []
    living: list[Child] = []
    most = len(inputs)
    for item in inputs:
        while True:
            if len(living) >= most:
                living = await _left_of(living)
            try:
                children.append(await spawn(program, item, budget=budget, model=model))
                break
            except StepFailed as failed:
                if failed.code != OVERLOADED or not living:
                    raise
                most = len(living)
        living.append(children[-1])
    return [ended.value() for ended in await wait(*children)]


async def _left_of(children: list[Child]) -> list[Child]:
    """Once any of them is over."""
    over = {ended.pid for ended in await wait(*children, any_of=True)}
    return [one for one in children if one.pid not in over]
