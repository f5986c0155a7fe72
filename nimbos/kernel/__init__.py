"""The kernel: agents as durable processes. Read `words.py` and `events.py` first, `fold.py` and `runner.py` next."""

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
