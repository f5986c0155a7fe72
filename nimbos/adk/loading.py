"""A program's Python, brought into the worker: its tools, and the function it is, if it is one. Used by `worker.py`."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from nimbos.adk.schema import BadTool
from nimbos.adk.steps import CHILD_KEY, CHILD_MARK
from nimbos.adk.tools import Tool
from nimbos.toolwire import TOOLS_MAX, Load, ToolWire


class CannotLoad(Exception):
    """The message is for people: what of the program is wrong, and where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loadable:
    """`entry`: the durable function, None for an agent. `module`: the one it stands in."""

    tools: dict[str, Tool[..., Any]]
    entry: Callable[..., Any] | None
    module: ModuleType | None

    def wires(self) -> tuple[ToolWire, ...]:
        """Raises: BadTool."""
        return tuple(_wire(tool) for tool in self.tools.values())

    def function_for(self, input: Any) -> tuple[Callable[..., Any], Any]:
        """What to run, and on what: the entry, or the marked function that a parent named.

        Raises: LookupError when the input names a function that is not marked.
        """
        if isinstance(input, dict) and isinstance(name := input.get(CHILD_KEY), str):
            function = getattr(self.module, name, None)
            if not getattr(function, CHILD_MARK, False) or function is None:
                raise LookupError(f"There is no function {name[:100]!r} marked with @child beside the entry.")
            return function, input.get("input")
        if self.entry is None:
            raise LookupError("This program has no entry; it is an agent.")
        return self.entry, input


def load(wanted: Load) -> Loadable:
    """Raises: CannotLoad for whatever the program's own code raises, too."""
    sys.path.insert(0, wanted.folder)
    tools: dict[str, Tool[..., Any]] = {}
    if wanted.tools:
        module = _module(Path(wanted.folder), wanted.tools)
        for value in vars(module).values():
            if isinstance(value, Tool) and tools.setdefault(value.name, value) is not value:
                raise CannotLoad(f"{wanted.tools} has two tools that are called {value.name!r}.")
        if len(tools) > TOOLS_MAX:
            raise CannotLoad(f"{wanted.tools} has {len(tools)} tools and may have {TOOLS_MAX}.")
    if not wanted.entry:
        return Loadable(tools=tools, entry=None, module=None)
    file, _, name = wanted.entry.partition(":")
    module = _module(Path(wanted.folder), file)
    entry = getattr(module, name, None)
    if not inspect.iscoroutinefunction(entry):
        raise CannotLoad(f"{file} has no `async def {name}(input)`, which the manifest's entry names.")
    return Loadable(tools=tools, entry=entry, module=module)


def _module(folder: Path, file: str) -> ModuleType:
    """Imported under its file's name, so that the program's files find each other."""
    name = file.removesuffix(".py").replace("/", ".")
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(folder / file):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, folder / file)
    if spec is None or spec.loader is None or not (folder / file).is_file():
        raise CannotLoad(f"The program has no file {file}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # the program's own code, which may raise anything, also SystemExit
        raise CannotLoad(f"{file} cannot be imported: {told(error, folder)}") from error
    return module


def told(error: BaseException, folder: Path) -> str:
    """An exception in one line: what it is, and the last place in the program's own files."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename or '?').name}:{error.lineno})"
    text = traceback.format_exception_only(error)[-1].strip()  # also where its own text cannot be made
    places = [
        f"{Path(frame.filename).name}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(str(folder))
    ]
    return f"{text} ({places[-1]})" if places else text


def _wire(tool: Tool[..., Any]) -> ToolWire:
    try:
        parameters = msgspec.json.encode(tool.signature.schema)
    except (TypeError, ValueError) as error:
        raise BadTool(f"The tool {tool.name} has a default that JSON cannot say: {error}") from error
    return ToolWire(
        name=tool.name,
        description=tool.signature.description,
        parameters=parameters,
        effect=tool.effect,
        deadline_ms=int((tool.deadline_s or 0) * 1000),
    )
