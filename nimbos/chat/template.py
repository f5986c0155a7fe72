"""A model's chat template: compiled and rendered as its authors expect it, in a sandbox.
Knows nothing of processes; `renderer.py` runs this in a worker, `chat.py` runs it in place for templates it trusts.

A template is a program by a stranger. The sandbox keeps it from Python's internals, not from using time and memory.
"""

from __future__ import annotations

import datetime
import json
from collections import OrderedDict
from typing import Any, Literal

import jinja2
import jinja2.ext
import msgspec
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_PROMPT_CHARACTERS = 4 * 1024 * 1024
_KEPT_TEMPLATES = 4
_MESSAGE_CHARACTERS = 500

# What a template can make Python raise; MemoryError is told apart because it ends the worker.
_FOREIGN_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    StopIteration,
    SyntaxError,
    TypeError,
    ValueError,
)

FailureKind = Literal["refused", "syntax", "runtime", "unsafe", "too_long", "memory", "time", "died"]


class RenderJob(msgspec.Struct, frozen=True):
    template: str
    variables: dict[str, Any]


class Rendered(msgspec.Struct, frozen=True, tag="rendered"):
    text: str


class RenderFailure(msgspec.Struct, frozen=True, tag="failed"):
    """`refused`: the template itself said no, with its own words in `message`. `line` is the template's."""

    kind: FailureKind
    message: str = ""
    line: int | None = None


RenderResult = Rendered | RenderFailure


class _Refused(jinja2.TemplateError):
    """What `raise_exception` in a template raises."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the model's own words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise _Refused(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)  # templates want the local date


class TemplateRenderer:
    """Renders jobs; keeps the last few compiled templates."""

    def __init__(self) -> None:
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )
        self._environment.filters["tojson"] = _to_json
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = _strftime_now
        self._compiled: OrderedDict[str, jinja2.Template] = OrderedDict()

    def render(self, job: RenderJob) -> RenderResult:
        try:
            template = self._compile(job.template)
            return _join(template, job.variables)
        except MemoryError:
            return RenderFailure("memory")
        except _Refused as error:
            return RenderFailure("refused", _short(error.message or ""), _line(error))
        except jinja2.TemplateSyntaxError as error:
            return RenderFailure("syntax", _short(error.message or ""), error.lineno)
        except jinja2.exceptions.SecurityError as error:
            return RenderFailure("unsafe", _short(str(error)), _line(error))
        except _FOREIGN_FAILURES as error:
            return RenderFailure("runtime", _short(f"{type(error).__name__}: {error}"), _line(error))

    def _compile(self, source: str) -> jinja2.Template:
        template = self._compiled.get(source)
        if template is None:
            template = self._environment.from_string(source)
            self._compiled[source] = template
            if len(self._compiled) > _KEPT_TEMPLATES:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(source)
        return template


def _join(template: jinja2.Template, variables: dict[str, Any]) -> RenderResult:
    """Joins the pieces that the template yields, and stops it when there are too many."""
    pieces: list[str] = []
    room = MAX_PROMPT_CHARACTERS
    for piece in template.generate(variables):
        room -= len(piece)
        if room < 0:
            return RenderFailure("too_long")
        pieces.append(piece)
    return Rendered("".join(pieces))


def _short(message: str) -> str:
    message = " ".join(message.split())
    return message if len(message) <= _MESSAGE_CHARACTERS else message[:_MESSAGE_CHARACTERS] + "…"


def _line(error: BaseException) -> int | None:
    """The template's line where it failed: jinja2 puts frames of its own with that line into the traceback."""
    line, frame = None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            line = frame.tb_lineno
        frame = frame.tb_next
    return line
