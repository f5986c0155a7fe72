"""Whose budgets and limits an ask counts for. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from nimbos.types import Account, Origin

OwnerKind = Literal["organisation", "project", "key", "process", "model"]
OWNER_KINDS: tuple[OwnerKind, ...] = get_args(OwnerKind)
DEPTHS: dict[str, int] = {"organisation": 0, "model": 0, "project": 1, "key": 2, "process": 3}
ORGANISATION = "org_default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Owners:
    """The ids for one ask; "" where there is none."""

    organisation: str
    project: str
    key: str
    process: str
    model: str

    @classmethod
    def of(cls, account: Account, origin: Origin, model: str) -> Owners:
        return cls(
            organisation=account.organisation or ORGANISATION,
            project=account.id,
            key=account.key,
            process=origin.process,
            model=model,
        )


def named(kind: str, name: str, owner_id: str) -> str:
    """An owner as messages name it: `key 'laptop'`."""
    return f"{kind} {name or owner_id!r}"
