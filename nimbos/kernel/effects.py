"""Effect classes as a table: what may be done with a call whose outcome nobody knows. Pure.

    effect      after a crash between intent and outcome       promise
    internal    there is no such moment                        exactly once
    pure        run it again                                   at least once, harmless
    idempotent  run it again, with the same key                effectively once
    checkable   ask the driver; run it again if it did not     effectively once
    opaque      a person decides                               at most once

The key of an effect is a function of process and call: the same at each try, another in a fork. `gate.py` performs what
is decided here.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Final

from nimbos.kernel.words import Effect


class Recovery(StrEnum):
    """What to do with a call that has an intent and no outcome."""

    AGAIN = "again"
    VERIFY = "verify"
    ASK = "ask"


RECOVERY: Final[dict[Effect, Recovery]] = {
    Effect.INTERNAL: Recovery.AGAIN,  # only a wait has an intent that stands alone, and looking again is no effect
    Effect.PURE: Recovery.AGAIN,
    Effect.IDEMPOTENT: Recovery.AGAIN,
    Effect.CHECKABLE: Recovery.VERIFY,
    Effect.OPAQUE: Recovery.ASK,
}

HARMLESS: Final = frozenset({Effect.INTERNAL, Effect.PURE})  # what a fork may do; everything else is withheld


def effect_key(pid: str, call_id: str) -> str:
    """64 hexadecimal digits, for the tool to hand on to whoever must see a second try as the same one."""
    return hashlib.sha256(f"{pid}\n{call_id}".encode()).hexdigest()


def bound_hash(definition_hash: str, canonical_arguments: bytes) -> str:
    """What an approval is for: a changed definition or argument is another call."""
    return hashlib.sha256(definition_hash.encode() + b"\n" + canonical_arguments).hexdigest()
