"""What a driver says of a call: it is over, or nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nimbos.db import Transaction
from nimbos.errors import NimbosError
from nimbos.kernel.log import Draft
from nimbos.kernel.words import Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """`value`: a JSON value; with `error`, a code, a sentence for the model. `consumed`: the signals it came of, by
    seq. `drafts`, `also`: what else is written in the outcome's transaction; `also` may raise `Undone`. `child`: of a
    spawn. `shown`: what a model is shown, where that is not the head of the value. `before`: like `also`, but ahead of
    the events, for what locks budgets. `printed`: by a tool, for people. `wrapped`: levels of the value around what
    others were allowed to keep, and nest as deep as any value may."""

    value: Any
    error: str = ""
    consumed: tuple[int, ...] = ()
    drafts: tuple[Draft, ...] = ()
    also: Callable[[], Transaction[None]] | None = None
    before: Callable[[], Transaction[None]] | None = None
    child: str = ""
    shown: str | None = None
    origin: Origin = Origin.TOOL
    printed: str = ""
    wrapped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The driver was given the call, and it cannot be told whether it happened. `error`: a code; `why`: a sentence.
    `suspects`: how many there are of which one cut it off, itself among them; 0: another did."""

    error: str
    why: str
    suspects: int = 0


class Undone(Exception):
    """Raised in a transaction's part, so that nothing of it is written: the call went wrong as `error` says, which the
    gate writes instead."""

    def __init__(self, error: NimbosError) -> None:
        super().__init__(error.message)
        self.error = error


def refused(error: NimbosError) -> Answered:
    """An error of ours, as the outcome of the call that met it."""
    return Answered(value=error.message, error=error.code)
