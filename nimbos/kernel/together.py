"""The calls of one answer, several at once where one cannot be in another's way.

    look look read ask ask │ pay │ send │ look look        │: what is before it has its outcome, or the process parks

What only looks runs beside its neighbours; what waits for somebody may begin with them, and nothing but another wait
begins behind it, as a model that writes `sleep` and then `look` wants to look later. Whatever changes something, here
or outside, runs alone and in its turn. In view the results stand in the order of the calls (`folding/shown.py`).
"""

from __future__ import annotations

from functools import partial

from nimbos.errors import BrokenProgram
from nimbos.kernel.branches import at_once
from nimbos.kernel.drivers.builtin import WAITING
from nimbos.kernel.events import CallWanted
from nimbos.kernel.gate import CALLS_AT_ONCE, Gate
from nimbos.kernel.holding import Holding
from nimbos.kernel.offer import Offered
from nimbos.kernel.syscall import Also, Wait
from nimbos.kernel.tools import WorkerDied
from nimbos.kernel.words import Effect


async def perform(gate: Gate, holding: Holding, *, also: Also) -> None:
    """The next calls that the model wants, and no more than may run at once. Raises: Parked, when what is left of them
    waits, and the others have their outcomes; what `Gate.call` raises."""
    left = await _leading(gate, holding)
    waits: dict[str, Wait] = {}
    while left:
        works = [partial(gate.wanted, holding, wanted, also=also) for wanted in left]
        for wanted, done in zip(left, await at_once(holding, works, most=CALLS_AT_ONCE), strict=True):
            if isinstance(done, Wait):
                waits[wanted.call_id] = done
        begun = left
        # What was held back, as others held the rest of the budget: they may have given some of it back.
        left = [wanted for wanted in begun if wanted in holding.view.wanted]
        if len(left) == len(begun):
            break
        for wanted in left:
            waits.pop(wanted.call_id, None)
    if waits:
        await gate.park(holding, list(waits.values()))


async def _leading(gate: Gate, holding: Holding) -> list[CallWanted]:
    """Raises: StorageUnavailable."""
    wanted = list(holding.view.wanted)
    if len(wanted) == 1:
        return wanted
    try:
        offered = {tool.name: tool for tool in await gate.tools(holding)}
    except (BrokenProgram, WorkerDied):  # each is told so by itself
        return wanted[:1]
    return leading(wanted, offered)


def leading(wanted: list[CallWanted], offered: dict[str, Offered]) -> list[CallWanted]:
    """Those at the beginning that may run at once: at least the first. Pure. What does not exist is refused beside the
    others."""
    group: list[CallWanted] = []
    waits = False
    for call in wanted:
        tool = offered.get(call.name)
        waiting = tool is not None and tool.verb in WAITING
        if (tool is not None and tool.effect is not Effect.PURE) or (waits and not waiting):
            break
        waits = waits or waiting
        group.append(call)
    return group or wanted[:1]
