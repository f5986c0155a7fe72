"""What the files of a program say: `nimbos.toml` (`manifest.py`) or a plain `SKILL.md` (`skill.py`), instructions,
`tools.py`, the schema of its answer. Pure.

A program is immutable: its identity is the hash of the bytes that `package.py` makes of its canonical files. Folders in
`agents/` are programs too, parts of this one, which it may spawn by their names. Read `programs.py` for who has which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from nimbos.blobs import hash_of
from nimbos.errors import BrokenProgram
from nimbos.kernel import manifest as manifests
from nimbos.kernel import skill as skills
from nimbos.kernel.manifest import Manifest, read_manifest, toml_of
from nimbos.kernel.package import check_files, pack, unpack
from nimbos.kernel.skill import read_skill, without_front
from nimbos.types import Grammar

INSTRUCTIONS = "instructions.md"
TOOLS = "tools.py"
PARTS = "agents/"
INSTRUCTIONS_BYTES_MAX = 256 * 1024
SCHEMA_BYTES_MAX = 64 * 1024
DOCUMENTS_MAX = 50  # their names stand in every prompt

_DOCUMENTS = (".md", ".txt", ".csv", ".json", ".yaml", ".yml")


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """`entry`: "" for an agent, else the durable function as `main.py:main`. `python`: it brings code that a worker
    runs. `answer`: what its last answer must look like. `parts`: hashes of its parts by name."""

    hash: str
    name: str
    version: str
    description: str
    instructions: str
    manifest: Manifest
    files: tuple[File, ...]
    python: bool
    entry: str = ""
    answer: Grammar | None = None
    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def documents(self) -> tuple[str, ...]:
        """Files that an agent may read in: what a skill's instructions refer to. Not those that say what it is."""
        own = {
            manifests.FILE_NAME,
            skills.FILE_NAME,
            INSTRUCTIONS,
            self.manifest.instructions,
            self.manifest.answer.schema,
        }
        paths = (file.path for file in self.files if file.path not in own and not file.path.startswith(PARTS))
        return tuple(path for path in paths if path.endswith(_DOCUMENTS))[:DOCUMENTS_MAX]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def canonical(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files whose bytes are the program's identity: `nimbos.toml` is written anew, in its one form, so comments
    and the order of keys make no other program. Raises: BrokenProgram, PayloadTooLarge."""
    check_files(files)
    for path in files:
        if path.startswith(PARTS) and path.split("/")[2:3] == [PARTS.rstrip("/")]:
            raise BrokenProgram(path, why="a part of a program has no parts of its own; put them beside it")
    folders = {path.rpartition("/")[0] for path in files if path.rpartition("/")[2] == manifests.FILE_NAME}
    written = {_in(place, manifests.FILE_NAME) for place in folders if place == "" or _is_part(place)}
    return {path: toml_of(_manifest(path, files[path])) if path in written else files[path] for path in files}


def program_of(files: Mapping[str, bytes]) -> tuple[Program, bytes]:
    """The program and its bytes. Raises: BrokenProgram naming file and line, PayloadTooLarge."""
    return _program_of(canonical(files), parts=True)


def read_program(content: bytes) -> Program:
    """Of bytes that `program_of` made. Raises: BrokenProgram."""
    return _program_of(unpack(content), parts=True)[0]


def _program_of(files: Mapping[str, bytes], *, parts: bool) -> tuple[Program, bytes]:
    manifest, skill_body = _said(files)
    instructions = _instructions(files, manifest, skill_body)
    entry_file = manifest.entry.partition(":")[0]
    if entry_file and entry_file not in files:
        raise BrokenProgram(manifests.FILE_NAME, why=f"`entry` names {entry_file!r}, which is not there")
    if not manifest.entry and not instructions.strip():
        raise BrokenProgram("", why=f"it has neither instructions ({INSTRUCTIONS}, SKILL.md) nor an `entry`")
    inside = {} if not parts else {name: _program_of(its, parts=False) for name, its in _parts_of(files).items()}
    content = pack(files)
    program = Program(
        hash=hash_of(content),
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        instructions=instructions,
        manifest=manifest,
        files=tuple(
            File(path=path, sha256=hashlib.sha256(files[path]).hexdigest(), size_bytes=len(files[path]))
            for path in sorted(files, key=str.encode)
        ),
        python=TOOLS in files or bool(manifest.entry) or any(part.python for part, _ in inside.values()),
        entry=manifest.entry,
        answer=_answer(files, manifest),
        parts={name: part.hash for name, (part, _) in sorted(inside.items())},
    )
    return program, content


def part_contents(files: Mapping[str, bytes]) -> list[bytes]:
    """The bytes of its parts, which are programs by themselves."""
    return [pack(its) for its in _parts_of(canonical(files)).values()]


def _parts_of(files: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    """The files of each folder in `agents/`, by the folder's name. Raises: BrokenProgram."""
    found: dict[str, dict[str, bytes]] = {}
    for path, content in files.items():
        if path.startswith(PARTS):
            name, _, rest = path.removeprefix(PARTS).partition("/")
            if not rest:
                raise BrokenProgram(path, why=f"{PARTS} has a folder for each part, and nothing else")
            found.setdefault(name, {})[rest] = content
    for name, its in found.items():
        if manifests.FILE_NAME not in its and skills.FILE_NAME not in its:
            raise BrokenProgram(f"{PARTS}{name}", why=f"a part has a {manifests.FILE_NAME} or a {skills.FILE_NAME}")
    return found


def _said(files: Mapping[str, bytes]) -> tuple[Manifest, str | None]:
    """The manifest, and the instructions of a plain skill, which has none."""
    if manifests.FILE_NAME in files:
        return read_manifest(files[manifests.FILE_NAME]), None
    if skills.FILE_NAME not in files:
        raise BrokenProgram("", why=f"it has neither {manifests.FILE_NAME} nor {skills.FILE_NAME}")
    skill = read_skill(_text(files, skills.FILE_NAME))
    said: dict[str, Any] = {"name": skill.name, "description": skill.description}
    try:
        return msgspec.convert({**said, "version": skill.version or "0"}, Manifest), skill.body
    except msgspec.ValidationError:  # a version in somebody else's form
        return msgspec.convert(said, Manifest), skill.body


def _manifest(path: str, content: bytes) -> Manifest:
    try:
        return read_manifest(content)
    except BrokenProgram as error:
        raise BrokenProgram(path, line=error.line, why=error.why) from error


def _instructions(files: Mapping[str, bytes], manifest: Manifest, skill_body: str | None) -> str:
    if skill_body is not None:
        return skill_body
    named = manifest.instructions
    if named and named not in files:
        raise BrokenProgram(manifests.FILE_NAME, why=f"`instructions` names {named!r}, which is not there")
    path = named or next((path for path in (INSTRUCTIONS, skills.FILE_NAME) if path in files), "")
    text = _text(files, path) if path else ""
    return without_front(text) if path.endswith(skills.FILE_NAME) else text


def _text(files: Mapping[str, bytes], path: str) -> str:
    if len(files[path]) > INSTRUCTIONS_BYTES_MAX:
        raise BrokenProgram(path, why=f"instructions may have {INSTRUCTIONS_BYTES_MAX} bytes")
    try:
        return files[path].decode()
    except UnicodeDecodeError as error:
        raise BrokenProgram(path, line=files[path][: error.start].count(b"\n") + 1, why="not UTF-8") from error


def _answer(files: Mapping[str, bytes], manifest: Manifest) -> Grammar | None:
    if manifest.answer.regex:
        return Grammar(kind="regex", source=manifest.answer.regex)
    path = manifest.answer.schema
    if not path:
        return None
    if path not in files:
        raise BrokenProgram(manifests.FILE_NAME, why=f"`answer.schema` names {path!r}, which is not there")
    if len(files[path]) > SCHEMA_BYTES_MAX:
        raise BrokenProgram(path, why=f"a schema may have {SCHEMA_BYTES_MAX} bytes")
    try:
        schema = msgspec.json.decode(files[path])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BrokenProgram(path, why="it is not JSON") from error
    if not isinstance(schema, dict):
        raise BrokenProgram(path, why="a JSON Schema is an object")
    return Grammar(kind="json_schema", source=msgspec.json.encode(schema).decode())


def _is_part(place: str) -> bool:
    return place.startswith(PARTS) and place.count("/") == 1


def _in(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name
