"""What a running program may call: the kernel's own tools that its manifest lists, and the tools of its `tools.py`.

The capability place of the gate: until capabilities come, a program's grants are its manifest's tools.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nimbos.kernel.drivers.builtin import BUILTINS, Builtin
from nimbos.kernel.words import Effect, Verb

if TYPE_CHECKING:
    from nimbos.kernel.events import CallIntent
    from nimbos.kernel.holding import Holding
    from nimbos.kernel.syscall import Syscall
    from nimbos.kernel.tools import ToolSpec, ToolWorkers


_RESOURCES: Final = {Verb.SPAWN: "program", Verb.SEND: "to", Verb.READ: "handle"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """`definition_hash`: what an approval of a call binds to."""

    name: str
    verb: Verb
    effect: Effect
    description: str
    parameters: Mapping[str, Any]
    definition_hash: str
    deadline_s: float
    documents: tuple[str, ...] = ()  # files of the program that `read` reads

    @property
    def wire(self) -> dict[str, Any]:
        """As a request for an answer names it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class NotOffered(Exception):
    """Never leaves the gate, which makes it a `call.denied`. Says what is wrong, for a model."""


async def offers(holding: Holding, workers: ToolWorkers) -> dict[str, Offered]:
    """By name, in an order that never changes: it is part of every prompt. A tool of the kernel hides one of the
    program with the same name. Raises: BrokenProgram, StorageUnavailable, WorkerDied."""
    manifest = holding.program.manifest
    own: dict[str, Offered] = {name: _builtin(name, BUILTINS[name], holding) for name in sorted(manifest.tools.builtin)}
    brought = {spec.name: _brought(spec, holding) for spec in await workers.specs(holding)}
    return {**own, **{name: offered for name, offered in brought.items() if name not in own}}


async def find(holding: Holding, workers: ToolWorkers, syscall: Syscall) -> Offered:
    """Raises: NotOffered, BrokenProgram, StorageUnavailable, WorkerDied."""
    if syscall.step and syscall.verb is not Verb.TOOL and syscall.verb.value in BUILTINS:
        return _builtin(syscall.verb.value, BUILTINS[syscall.verb.value], holding)
    name = syscall.resource if syscall.verb is Verb.TOOL else syscall.verb.value
    found = await offers(holding, workers)
    offered = found.get(name)
    if offered is None or offered.verb is not syscall.verb:
        known = ", ".join(found) or "none"
        raise NotOffered(f"There is no tool {name[:80]!r}. The tools are: {known[:2_000]}.")
    return offered


def verb_of(holding: Holding, name: str) -> Verb:
    """Of a tool by the name that a model called."""
    return BUILTINS[name].verb if name in holding.program.manifest.tools.builtin else Verb.TOOL


def needs_approval(holding: Holding, intent: CallIntent) -> bool:
    """Whether a person says yes to each call of this."""
    name = intent.resource if intent.verb is Verb.TOOL else intent.verb.value
    return name in holding.program.manifest.tools.confirm


def resource_of(offered: Offered, arguments: Mapping[str, Any]) -> str:
    """What the call is to, for whoever reads the log."""
    if offered.verb is Verb.TOOL:
        return offered.name
    return str(arguments.get(_RESOURCES.get(offered.verb, ""), ""))


def _builtin(name: str, builtin: Builtin, holding: Holding) -> Offered:
    documents = holding.program.documents if builtin.verb is Verb.READ else ()
    files = f" Or in one of your files, with its path as the handle: {', '.join(documents)}." if documents else ""
    return Offered(
        name=name,
        verb=builtin.verb,
        effect=builtin.effect,
        description=f"{builtin.description}{files}",
        parameters=builtin.parameters,
        definition_hash=f"builtin:{name}",
        deadline_s=holding.program.manifest.limits.tool_deadline_s,
        documents=documents,
    )


def _brought(spec: ToolSpec, holding: Holding) -> Offered:
    manifest = holding.program.manifest
    return Offered(
        name=spec.name,
        verb=Verb.TOOL,
        effect=spec.effect,
        description=spec.description,
        parameters=spec.parameters,
        definition_hash=spec.definition_hash,
        deadline_s=spec.deadline_s or manifest.limits.tool_deadline_s,
    )
