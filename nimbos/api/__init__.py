"""The HTTP side: an app with a file for each dialect. The door is `build`, and `build_ollama` for the listener without
keys. Loaded when asked for: a command that administers needs one part of it and no engine."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nimbos.api.app import build, build_ollama

__all__ = ["build", "build_ollama"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"nimbos.api has no {name!r}")
    return getattr(import_module("nimbos.api.app"), name)
