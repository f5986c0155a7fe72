"""`Program(...)`: a program that is written in Python, and the very folder it stands for.

    trip = Program("trip", instructions="Compare the two.", tools=[temperature], budget={"tokens": 20_000})

The sections are those of `nimbos.toml`, and say the same. Functions bring the whole file they are written in, as
`tools.py` or `main.py`; so `trip.save(folder)` makes a folder with the same hash, which a person can read and change.
Making one reads nothing and is cheap: its own file is imported in a worker, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nimbos.adk.schema import BadTool
from nimbos.adk.tools import Tool

if TYPE_CHECKING:
    from nimbos.kernel import manifest as manifests

INSTRUCTIONS, TOOLS, MAIN, SCHEMA, PARTS = "instructions.md", "tools.py", "main.py", "answer.json", "agents"


class Program:
    def __init__(
        self,
        name: str,
        *,
        instructions: str = "",
        tools: Sequence[Tool[..., Any]] | Path | str = (),
        entry: Callable[[Any], Any] | None = None,
        version: str = "0",
        description: str = "",
        model: Mapping[str, Any] | None = None,
        builtin: Sequence[str] | None = None,
        confirm: Sequence[str] = (),
        parallel: bool = True,
        call_first: bool = False,
        rounds: int | None = None,
        budget: Mapping[str, Any] | None = None,
        limits: Mapping[str, Any] | None = None,
        regex: str = "",
        schema: Mapping[str, Any] | type | None = None,
        files: Mapping[str, bytes] | None = None,
        agents: Mapping[str, Program] | None = None,
    ) -> None:
        """`tools`: functions of one file, or that file. `entry`: the durable function it is; without one it is an
        agent. `builtin`: the kernel's tools it may use; `confirm`, `parallel`, `call_first`, `rounds`: as in `[tools]`.
        `regex`, `schema`: what its last answer must look like; a type is made a schema. `files`: more of them, by path.
        `agents`: its parts, by the names it spawns them by."""
        self.name = name
        self._instructions = instructions
        self._tools = tools
        self._entry = entry
        self._said: dict[str, Any] = {
            "version": version,
            "description": description,
            "model": dict(model or {}),
            "tools": {
                "confirm": list(confirm),
                "parallel": parallel,
                "call_first": call_first,
                **({} if builtin is None else {"builtin": list(builtin)}),
                **({} if rounds is None else {"rounds": rounds}),
            },
            "budget": dict(budget or {}),
            "limits": dict(limits or {}),
        }
        self._regex = regex
        self._schema = schema
        self._more = dict(files or {})
        self._agents = dict(agents or {})

    @property
    def hash(self) -> str:
        """Its identity. Raises: what `files` raises."""
        from nimbos.kernel.program import program_of

        return program_of(self.files())[0].hash

    def files(self) -> dict[str, bytes]:
        """The folder. Blocks. Raises: BrokenProgram, PayloadTooLarge, BadTool, OSError."""
        from nimbos.kernel.manifest import toml_of
        from nimbos.kernel.program import canonical

        files = dict(self._more)
        if self._instructions:
            files[INSTRUCTIONS] = f"{inspect.cleandoc(self._instructions).strip()}\n".encode()
        answer, entry = {"regex": self._regex}, ""
        if self._schema is not None:
            files[SCHEMA] = _schema_of(self._schema)
            answer["schema"] = SCHEMA
        source = _source_of(self._tools)
        if source is not None:
            files[TOOLS] = source.read_bytes()
        if self._entry is not None:
            main = _file_of(self._entry)
            file = TOOLS if main == source else MAIN
            files[file] = main.read_bytes()
            entry = f"{file}:{getattr(self._entry, '__name__', '')}"
        for name, part in self._agents.items():
            files |= {f"{PARTS}/{name}/{path}": content for path, content in part.files().items()}
        files["nimbos.toml"] = toml_of(self._manifest(answer, entry))
        return canonical(files)

    def save(self, folder: Path) -> None:
        """Writes the folder, which must be new or empty. Raises: what `files` raises; FileExistsError."""
        files = self.files()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(f"The folder {folder} is not empty.")
        for path, content in files.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)

    def _manifest(self, answer: Mapping[str, str], entry: str) -> manifests.Manifest:
        from nimbos.kernel.manifest import manifest_of

        return manifest_of({"name": self.name, "entry": entry, "answer": answer, **self._said})


def read_program(folder: Path | str) -> dict[str, bytes]:
    """The files of a program's folder. Blocks. Raises: BrokenProgram, PayloadTooLarge, OSError."""
    from nimbos.kernel.package import read_folder

    return read_folder(Path(folder))


def _source_of(tools: Sequence[Tool[..., Any]] | Path | str) -> Path | None:
    if isinstance(tools, Path | str):
        return Path(tools)
    sources = {_file_of(tool.function) for tool in tools}
    if len(sources) > 1:
        shown = ", ".join(sorted(source.name for source in sources))
        raise BadTool(f"The tools of a program stand in one file, and these in several: {shown}.")
    return sources.pop() if sources else None


def _file_of(function: Callable[..., Any]) -> Path:
    file = inspect.getsourcefile(inspect.unwrap(function))
    if file is None or not Path(file).is_file():
        raise BadTool(f"{function!r} stands in no file; a program brings the file its functions stand in.")
    return Path(file).resolve()


def _schema_of(schema: Mapping[str, Any] | type) -> bytes:
    import msgspec

    said = schema if isinstance(schema, Mapping) else msgspec.json.schema(schema)
    return msgspec.json.format(msgspec.json.encode(said), indent=2) + b"\n"
