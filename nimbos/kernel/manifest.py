"""`nimbos.toml`: what a program is called, what it needs and what it may use. An unknown key is an error with its line.

Knows nothing of the other files of a program; read `programs.py` for those. `toml_of` writes a manifest in its one
canonical form, without comments and without what is the default: two manifests that say the same are the same program.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec

from nimbos.errors import BrokenProgram

FILE_NAME = "nimbos.toml"
BYTES_MAX = 64 * 1024
NAME_PATTERN = r"\A[a-z0-9]+(-[a-z0-9]+)*\Z"  # as the Agent Skills have it
NAME_CHARACTERS = 64
KEY_PARTS_MAX = 16

_SHOWN_CHARACTERS = 80

Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN, max_length=NAME_CHARACTERS)]
Version = Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-Za-z][0-9A-Za-z.+-]*\Z", max_length=64)]
Path = Annotated[str, msgspec.Meta(max_length=200)]
ToolName = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z_][A-Za-z0-9_-]*\Z", max_length=64)]
BuiltinTool = Literal["ask", "pin", "read", "receive", "send", "sleep", "spawn", "wait"]
Level = Literal["auto", "none", "minimal", "low", "medium", "high", "xhigh", "max"]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000_000)]
AnswerTokens = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
Temperature = Annotated[float, msgspec.Meta(ge=0, le=10)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
ThinkingTokens = Annotated[int, msgspec.Meta(ge=0, le=10_000_000)]


class ModelNeeds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`name`: "" is what whoever runs it names, or the server's own choice. `context_tokens`: how much of the model's
    window it uses, 0 for all. `max_tokens`: of one answer. `thinking`: on or off, tokens, or a level of the dial."""

    name: Annotated[str, msgspec.Meta(max_length=200)] = ""
    context_tokens: Annotated[int, msgspec.Meta(ge=0, le=100_000_000)] = 0
    max_tokens: AnswerTokens | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    seed: Seed | None = None
    thinking: bool | ThinkingTokens | Level | None = None


class Tools(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`builtin`: of the kernel. `python`: of `tools.py`, None for all that stand there. `confirm`: those of either that
    a person approves first, call by call. `parallel`: one answer may make several calls. For small models, which would
    rather guess, or never stop: `call_first`, its first answer to somebody must call one; `rounds`, after so many
    answers that called it has none any more."""

    builtin: tuple[BuiltinTool, ...] = ("read",)
    python: tuple[ToolName, ...] | None = None
    confirm: tuple[ToolName, ...] = ()
    parallel: bool = True
    call_first: bool = False
    rounds: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a process may use where nobody says otherwise; None holds nothing. `cost`: in the currency of the prices."""

    tokens: Count | None = None
    cost: Annotated[float, msgspec.Meta(gt=0, le=1_000_000_000)] | None = None
    seconds: Count | None = None
    calls: Count | None = None

    @property
    def cost_micros(self) -> int | None:
        return None if self.cost is None else max(1, round(self.cost * 1_000_000))


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`turns`: answers of the model before the process fails. `children`: at a time; `depth`: of the tree below it.
    `tool_deadline_s`: of one call that names none. `result_bytes`: what of a result the model is shown at once."""

    turns: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 100
    children: Annotated[int, msgspec.Meta(ge=0, le=1_000)] = 32
    depth: Annotated[int, msgspec.Meta(ge=0, le=16)] = 4
    tool_deadline_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 60.0
    result_bytes: Annotated[int, msgspec.Meta(ge=256, le=1_048_576)] = 4_096


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the last answer must look like, held by the grammar: a JSON Schema in a file of the program, or a regular
    expression. At most one of them."""

    schema: Path = ""
    regex: Annotated[str, msgspec.Meta(max_length=4_000)] = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`instructions`: the file that has them, "" for `instructions.md` or `SKILL.md`, whichever is there.
    `entry`: "" for an agent; `main.py:main` for a durable function."""

    name: Name
    version: Version = "0"
    description: Annotated[str, msgspec.Meta(max_length=1_024)] = ""
    instructions: Path = ""
    entry: Annotated[str, msgspec.Meta(pattern=r"\A([\w./-]+\.py:[A-Za-z_]\w*)?\Z", max_length=200)] = ""
    model: ModelNeeds = ModelNeeds()
    tools: Tools = Tools()
    budget: Budget = Budget()
    limits: Limits = Limits()
    answer: Answer = Answer()


def read_manifest(content: bytes) -> Manifest:
    """Raises: BrokenProgram naming the line."""
    if len(content) > BYTES_MAX:
        raise BrokenProgram(FILE_NAME, why=f"it has {len(content)} bytes and may have {BYTES_MAX}")
    try:
        text = content.decode().replace("\r\n", "\n")
        _check_dots(text)
        table = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise BrokenProgram(FILE_NAME, line=content[: error.start].count(b"\n") + 1, why="not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise _broken_syntax(str(error), text) from error
    except RecursionError as error:
        raise BrokenProgram(FILE_NAME, why="it is nested too deeply") from error
    except ValueError as error:  # more digits than Python reads
        raise BrokenProgram(FILE_NAME, why="it has a number that is too long") from error
    return manifest_of(table, text)


def manifest_of(table: dict[str, Any], text: str = "") -> Manifest:
    """`text`: where the lines are that an error names. Raises: BrokenProgram."""
    _check_keys(text, table, Manifest, ())
    try:
        manifest = msgspec.convert(table, Manifest)
    except msgspec.ValidationError as error:
        why, _, place = str(error).partition(" - at `$")
        path = tuple(re.findall(r"[A-Za-z_]\w*", place))
        where = f"`{'.'.join(path)}`: " if path else ""
        if path == ("name",):
            why = f"lower-case letters, digits and single hyphens, at most {NAME_CHARACTERS}"
        raise BrokenProgram(FILE_NAME, line=line_of(text, path), why=f"{where}{why}") from error
    if manifest.answer.schema and manifest.answer.regex:
        line = line_of(text, ("answer", "regex"))
        raise BrokenProgram(FILE_NAME, line=line, why="`answer` has both `schema` and `regex`; leave one of them out")
    return manifest


def toml_of(manifest: Manifest) -> bytes:
    """The canonical form: keys in the order of the structs, only those that say something else than the default."""
    given = _given(manifest)
    lines = [f"{key} = {_value(value)}" for key, value in given.items() if not isinstance(value, dict)]
    for section, table in given.items():
        if isinstance(table, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_value(value)}" for key, value in table.items())]
    return ("\n".join(lines) + "\n").encode()


def line_of(text: str, path: tuple[str, ...]) -> int | None:
    """Where a key stands, or as much of its path as is written; from 1. `text` is valid TOML."""
    best, found = 0, None
    inside: tuple[str, ...] = ()
    for line, statement in _statements(text):
        table = tomllib.loads(statement)
        if statement.startswith("["):
            inside = _header(table)
            reached = len(inside) if path[: len(inside)] == inside else 0
        elif path[: len(inside)] == inside:
            depth = _depth(table, path[len(inside) :])
            reached = len(inside) + depth if depth else 0
        else:
            reached = 0
        if reached > best:
            best, found = reached, line
    return found


def _check_keys(text: str, table: dict[str, Any], into: type[msgspec.Struct], path: tuple[str, ...]) -> None:
    known = {field.encode_name: field.type for field in msgspec.structs.fields(into)}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key[:_SHOWN_CHARACTERS], sorted(known), n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(known)}"
            inside = f" in [{'.'.join(path)}]" if path else ""
            why = f"unknown key {key[:_SHOWN_CHARACTERS]!r}{inside}; {hint}"
            raise BrokenProgram(FILE_NAME, line=line_of(text, (*path, key)), why=why)
        section = known[key]
        if isinstance(value, dict) and isinstance(section, type) and issubclass(section, msgspec.Struct):
            _check_keys(text, value, section, (*path, key))


# A dotted key, where one can begin; possessive, so that no text makes it look twice.
_KEY_PART = r"""(?:[\w-]++|"(?:\\.|[^"\\\n])*+"|'[^'\n]*+')"""
_LONG_KEY = re.compile(
    rf"(?:^|[\[{{,])[ \t]*+{_KEY_PART}(?:[ \t]*+\.[ \t]*+{_KEY_PART}){{{KEY_PARTS_MAX}}}", re.MULTILINE
)


def _check_dots(text: str) -> None:
    """The parser's work grows with the square of a key's parts: with 20,000 of them, a minute."""
    found = _LONG_KEY.search(text)
    if found is not None:
        line = text.count("\n", 0, found.end()) + 1
        raise BrokenProgram(FILE_NAME, line=line, why=f"a key of more than {KEY_PARTS_MAX} parts")


def _broken_syntax(message: str, text: str) -> BrokenProgram:
    why, _, place = message.partition(" (at ")
    at = re.match(r"line (\d+)", place)
    line = int(at[1]) if at else text.rstrip("\n").count("\n") + 1
    return BrokenProgram(FILE_NAME, line=line, why=why[:200])


# What can hold a bracket or the end of a line without meaning it, and what means it.
_TOKEN = re.compile(
    r"#[^\n]*"
    r'|"""(?:\\.|[^\\])*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'"
    r"|(?P<open>[\[{])|(?P<close>[\]}])|(?P<end>\n)",
    re.DOTALL,
)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Headers and keys with their values, each with the line it begins in."""
    depth, start, line, lines = 0, 0, 1, 1
    for token in _TOKEN.finditer(text + "\n"):
        lines += token[0].count("\n")
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth -= 1
        elif token["end"] and depth == 0:
            statement = text[start : token.start()].strip()
            if statement and not statement.startswith("#"):
                yield line, statement
            start, line = token.end(), lines


def _header(table: dict[str, Any]) -> tuple[str, ...]:
    """`[a.b]` is `{"a": {"b": {}}}`."""
    path: list[str] = []
    node: Any = table
    while isinstance(node, dict) and node:
        ((key, node),) = node.items()
        path.append(key)
    return tuple(path)


def _depth(table: dict[str, Any], path: tuple[str, ...]) -> int:
    node: Any = table
    for depth, key in enumerate(path):
        if not isinstance(node, dict) or key not in node:
            return depth
        node = node[key]
    return len(path)


def _given(struct: msgspec.Struct) -> dict[str, Any]:
    given = {}
    for field in msgspec.structs.fields(struct):
        value = getattr(struct, field.name)
        if isinstance(value, msgspec.Struct):
            value = _given(value)
        elif value == field.default:
            continue
        if value != {}:
            given[field.encode_name] = value
    return given


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
