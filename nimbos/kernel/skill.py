"""`SKILL.md`, as the Agent Skills describe it: YAML between two lines of dashes, then the instructions.

Keys that we do not use are left alone, whatever they are: a folder that was made for others runs as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

from nimbos.errors import BrokenProgram
from nimbos.kernel.manifest import NAME_CHARACTERS, NAME_PATTERN

FILE_NAME = "SKILL.md"
FRONT_BYTES_MAX = 16 * 1024
_DESCRIPTION_CHARACTERS = 1_024
# What the parser raises besides, for numbers and dates that cannot be, and for words with a tag that does not fit them.
_UNREADABLE = (RecursionError, ValueError, OverflowError, LookupError, AttributeError)
_FRONT = re.compile(r"\A---[ \t]*\n(.*?\n)??---[ \t]*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skill:
    """`version`: of its metadata, "" where none is said. `body`: the instructions."""

    name: str
    description: str
    version: str
    body: str


def read_skill(text: str) -> Skill:
    """Raises: BrokenProgram."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    front = _FRONT.match(text)
    if front is None:
        raise BrokenProgram(FILE_NAME, line=1, why="it must begin with `---`, `name:` and `description:`, and `---`")
    fields = _fields(front[1] or "")
    name, description = fields.get("name"), fields.get("description")
    if not isinstance(name, str) or not re.search(NAME_PATTERN, name) or len(name) > NAME_CHARACTERS:
        why = f"`name` must be lower-case letters, digits and single hyphens, at most {NAME_CHARACTERS}"
        raise BrokenProgram(FILE_NAME, why=why)
    if not isinstance(description, str) or not 0 < len(description) <= _DESCRIPTION_CHARACTERS:
        raise BrokenProgram(FILE_NAME, why=f"`description` must have 1 to {_DESCRIPTION_CHARACTERS} characters")
    metadata = fields.get("metadata")
    version = metadata.get("version") if isinstance(metadata, dict) else None
    return Skill(
        name=name,
        description=description,
        version=_version(version),
        body=without_front(text),
    )


def _version(said: object) -> str:
    """A number may have more digits than Python writes."""
    return str(said) if isinstance(said, str | float) or (isinstance(said, int) and abs(said) < 1 << 63) else ""


def without_front(text: str) -> str:
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    front = _FRONT.match(text)
    return text[front.end() :].strip("\n") + "\n" if front else text


def _fields(front: str) -> dict[object, object]:
    if len(front.encode()) > FRONT_BYTES_MAX:
        raise BrokenProgram(FILE_NAME, why=f"what is between the dashes may have {FRONT_BYTES_MAX} bytes")
    try:
        fields = yaml.safe_load(front)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 2 if mark is not None else None  # the dashes are line 1
        raise BrokenProgram(FILE_NAME, line=line, why="what is between the dashes is not YAML") from error
    except _UNREADABLE as error:
        raise BrokenProgram(FILE_NAME, why="what is between the dashes cannot be read") from error
    if not isinstance(fields, dict):
        raise BrokenProgram(FILE_NAME, line=2, why="what is between the dashes must be keys and values")
    return fields
