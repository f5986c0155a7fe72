"""`@tool`: a typed function that a model, or a durable function, can call.

    @tool(effect="pure")
    def word_count(path: str) -> int:
        "How many words a text file has."

The effect class says what may be done when a crash leaves it unknown whether a call happened:
    pure         it only reads: it is run again
    idempotent   it takes the parameter `key`: it is run again with the same key, and the second has no effect
    checkable    it brings `verify(key, …arguments)`, which says whether it happened
    opaque       anything else: never run again, a person is asked
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

from nimbos.adk.schema import BadTool, Signature, read_signature
from nimbos.toolwire import EffectName

P = ParamSpec("P")
R = TypeVar("R")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_KEYED: frozenset[str] = frozenset({"idempotent", "checkable"})
_DEADLINE_S_MAX = 3600.0


@dataclass(frozen=True, slots=True)
class Happened:
    """What `verify` returns when it also knows what came of the call. Plain `True`, `False` and None (it cannot be
    told) do, too."""

    result: Any = None


@dataclass(eq=False)
class Tool(Generic[P, R]):
    """A function with what a caller needs to know of it; calling it calls the function. `signature` is read when it is
    first asked for, because annotations may name what is defined further down."""

    function: Callable[P, R]
    name: str
    effect: EffectName
    verify: Callable[..., Any] | None
    deadline_s: float | None
    keyed: bool = field(init=False)

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.function)
        self.keyed = self.effect in _KEYED and "key" in inspect.signature(self.function).parameters

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> R:
        return self.function(*arguments, **named)

    @property
    def asynchronous(self) -> bool:
        return inspect.iscoroutinefunction(self.function)

    @functools.cached_property
    def signature(self) -> Signature:
        """Raises: BadTool."""
        return read_signature(self.function, without=frozenset({"key"}) if self.keyed else frozenset())


def tool(
    *,
    effect: EffectName,
    name: str = "",
    verify: Callable[..., Any] | None = None,
    deadline_s: float | None = None,
) -> Callable[[Callable[P, R]], Tool[P, R]]:
    """`verify`: of a checkable tool, a function of `key` and the same arguments. `deadline_s`: None is the program's.

    Raises: BadTool.
    """

    def wrap(function: Callable[P, R]) -> Tool[P, R]:
        known_as = name or getattr(function, "__name__", "")
        _check(known_as, function, effect, verify, deadline_s)
        return Tool(function, known_as, effect, verify, deadline_s)

    return wrap


def _check(
    name: str, function: Callable[..., Any], effect: str, verify: Callable[..., Any] | None, deadline_s: float | None
) -> None:
    if not _NAME.fullmatch(name):
        raise BadTool(f"A tool cannot be called {name!r:.100}; up to 64 letters, digits, _ and - are taken.")
    if effect not in ("opaque", "idempotent", "checkable", "pure"):
        raise BadTool(f"The tool {name} has the effect {effect!r:.40}; it is opaque, idempotent, checkable or pure.")
    if not (inspect.getdoc(function) or "").strip():
        raise BadTool(f"The tool {name} has no docstring; it is how a model knows what the tool is for.")
    takes = inspect.signature(function).parameters
    if effect == "idempotent" and "key" not in takes:
        raise BadTool(f"The tool {name} is idempotent and takes no `key: str`; it must hand it on to what it calls.")
    if effect == "checkable" and verify is None:
        raise BadTool(f"The tool {name} is checkable and brings no `verify`.")
    if verify is not None and (effect != "checkable" or "key" not in inspect.signature(verify).parameters):
        raise BadTool(f"`verify` of the tool {name} is for checkable tools, and takes `key` and the same arguments.")
    if deadline_s is not None and not 0 < deadline_s <= _DEADLINE_S_MAX:
        raise BadTool(f"The tool {name} has a deadline of {deadline_s} s; it may have up to {_DEADLINE_S_MAX:.0f} s.")
