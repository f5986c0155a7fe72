"""What a worker says of a program's tools, judged: it is the program's word, and goes into prompts and grammars."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from nimbos.errors import BrokenProgram, InvalidRequest
from nimbos.kernel.segments import canonical
from nimbos.kernel.words import Effect
from nimbos.toolwire import TOOLS_MAX, ToolWire

DESCRIPTION_CHARACTERS = 4_000
SCHEMA_BYTES_MAX = 64 * 1024  # what a prompt's tools may have, too (`chat/schema.py`)
DEADLINE_S_MAX = 86_400.0
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """`parameters`: a JSON Schema of an object. `definition_hash`: of all this, which an approval binds to.
    `deadline_s` None: the program's."""

    name: str
    description: str
    parameters: dict[str, Any]
    effect: Effect
    definition_hash: str
    deadline_s: float | None = None


def read_specs(wires: tuple[ToolWire, ...], *, file: str) -> tuple[ToolSpec, ...]:
    """Raises: BrokenProgram naming the tool."""
    if len(wires) > TOOLS_MAX:
        raise BrokenProgram(file, why=f"it has {len(wires)} tools and may have {TOOLS_MAX}")
    specs = tuple(_read(wire, file) for wire in wires)
    if len({spec.name for spec in specs}) != len(specs):
        raise BrokenProgram(file, why="two of its tools have the same name")
    return specs


def _read(wire: ToolWire, file: str) -> ToolSpec:
    if not _NAME.fullmatch(wire.name):
        raise BrokenProgram(file, why=f"a tool cannot be called {wire.name[:80]!r}")
    if not wire.description.strip() or len(wire.description) > DESCRIPTION_CHARACTERS:
        why = f"the tool {wire.name} needs a description of 1 to {DESCRIPTION_CHARACTERS} characters"
        raise BrokenProgram(file, why=why)
    if not 0 <= wire.deadline_ms <= DEADLINE_S_MAX * 1000:
        raise BrokenProgram(file, why=f"the tool {wire.name} has a deadline of {wire.deadline_ms} ms")
    try:
        parameters = msgspec.json.decode(wire.parameters, type=dict[str, Any])
        written = canonical(parameters)
    except (msgspec.DecodeError, UnicodeError, RecursionError, InvalidRequest) as error:
        raise BrokenProgram(file, why=f"the schema of the tool {wire.name} cannot be read") from error
    if len(written) > SCHEMA_BYTES_MAX or parameters.get("type") != "object":
        why = f"the schema of the tool {wire.name} must be of an object, in at most {SCHEMA_BYTES_MAX} bytes"
        raise BrokenProgram(file, why=why)
    definition = [wire.name, wire.description, parameters, wire.effect, wire.deadline_ms]
    return ToolSpec(
        name=wire.name,
        description=wire.description,
        parameters=parameters,
        effect=Effect(wire.effect),
        definition_hash=hashlib.sha256(canonical(definition)).hexdigest(),
        deadline_s=wire.deadline_ms / 1000 or None,
    )
