"""The kernel: agents as durable processes. Read `words.py` and `events.py` first, `fold.py` and `runner.py` next.
What is asked for is loaded then: a command that packs a program needs no database."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nimbos.kernel.asking import Asked, asks_of
    from nimbos.kernel.bells import Delta
    from nimbos.kernel.cost import Cost, Left
    from nimbos.kernel.events import Event
    from nimbos.kernel.kernel import Kernel
    from nimbos.kernel.mapping import A2aState, McpState, a2a_state, mcp_state
    from nimbos.kernel.package import pack, read_folder, unpack
    from nimbos.kernel.processes import Head
    from nimbos.kernel.programs import Listed, Program, Programs
    from nimbos.kernel.recovery import release_dead
    from nimbos.kernel.replay import Folded, Replayed, Said
    from nimbos.kernel.words import Reason, SignalKind, State, Verdict
    from nimbos.ledger import Allowance

__all__ = [
    "A2aState",
    "Allowance",
    "Asked",
    "Cost",
    "Delta",
    "Event",
    "Folded",
    "Head",
    "Kernel",
    "Left",
    "Listed",
    "McpState",
    "Program",
    "Programs",
    "Reason",
    "Replayed",
    "Said",
    "SignalKind",
    "State",
    "Verdict",
    "a2a_state",
    "asks_of",
    "mcp_state",
    "pack",
    "read_folder",
    "release_dead",
    "unpack",
]

_HOMES = {
    "A2aState": "nimbos.kernel.mapping",
    "Allowance": "nimbos.ledger",
    "Asked": "nimbos.kernel.asking",
    "Cost": "nimbos.kernel.cost",
    "Delta": "nimbos.kernel.bells",
    "Event": "nimbos.kernel.events",
    "Folded": "nimbos.kernel.replay",
    "Head": "nimbos.kernel.processes",
    "Kernel": "nimbos.kernel.kernel",
    "Left": "nimbos.kernel.cost",
    "Listed": "nimbos.kernel.programs",
    "McpState": "nimbos.kernel.mapping",
    "Program": "nimbos.kernel.programs",
    "Programs": "nimbos.kernel.programs",
    "Reason": "nimbos.kernel.words",
    "Replayed": "nimbos.kernel.replay",
    "Said": "nimbos.kernel.replay",
    "SignalKind": "nimbos.kernel.words",
    "State": "nimbos.kernel.words",
    "Verdict": "nimbos.kernel.words",
    "a2a_state": "nimbos.kernel.mapping",
    "asks_of": "nimbos.kernel.asking",
    "mcp_state": "nimbos.kernel.mapping",
    "pack": "nimbos.kernel.package",
    "read_folder": "nimbos.kernel.package",
    "release_dead": "nimbos.kernel.recovery",
    "unpack": "nimbos.kernel.package",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"nimbos.kernel has no {name!r}")
    return getattr(import_module(_HOMES[name]), name)
