"""What a process and its tree spent, from the ledger. The tree is that of its budget: its children and theirs, and
forks, which draw on the process they were forked from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nimbos.db import Database
from nimbos.kernel import heads
from nimbos.kernel.words import Reason, State
from nimbos.ledger import ProcessUse, family_use


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """One of its budgets, in the unit of its meter. `limit` None: nothing of its own limits it. `used` and `reserved`
    are of all that draw on it."""

    meter: str
    limit: int | None
    used: int
    reserved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one process used itself, by meter; what is zero is left out. `parent`: whose budget it draws on."""

    pid: str
    parent: str | None
    name: str
    state: State
    reason: Reason
    used: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """`used`: by the process itself; `total`: with all below. By meter: `asks`; tokens by kind (`input` as computed,
    `cached`, `output` without thinking, `thinking`, `recomputed`, which is never billed); `cost_micros`; `seconds_ms`
    of computing and of tools; `calls` of tools. `processes`: parents before children, the process itself first."""

    pid: str
    used: Mapping[str, int]
    total: Mapping[str, int]
    budgets: tuple[Left, ...]
    processes: tuple[Share, ...]


async def cost_of(database: Database, pid: str) -> Cost:
    """Of a process that exists. Raises: StorageUnavailable."""
    family = await family_use(database, pid)
    shares = tuple([await _share(database, use) for use in family])
    return Cost(
        pid=pid,
        used=shares[0].used if shares else {},
        total=total(share.used for share in shares),
        budgets=tuple(_left(family[0])) if family else (),
        processes=shares,
    )


def total(every: Iterable[Mapping[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for used in every:
        for meter, amount in used.items():
            found[meter] = found.get(meter, 0) + amount
    return found


def _left(use: ProcessUse) -> list[Left]:
    return [
        Left(meter=meter, limit=budget.limit, used=budget.used, reserved=budget.reserved)
        for meter, budget in use.budgets.items()
    ]


async def _share(database: Database, use: ProcessUse) -> Share:
    rows = await database.read(heads.one(use.process))
    head = rows[0] if rows else {"name": "", "state": State.DONE.value, "reason": ""}
    return Share(
        pid=use.process,
        parent=use.parent,
        name=head["name"],
        state=State(head["state"]),
        reason=Reason(head["reason"]),
        used=use.used,
    )
