"""Models on disk: what there is, where it comes from, what fits. The door is `Hub`; read `hub.py` first.
What is asked for is loaded then: looking whether a library is there does not cost the import of an HTTP client."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nimbos.hub.facts import Gguf, ModelFacts, read_gguf
    from nimbos.hub.hub import Hub
    from nimbos.hub.native import NativeLibrary
    from nimbos.hub.progress import Progress
    from nimbos.hub.store import LocalModel

__all__ = ["Gguf", "Hub", "LocalModel", "ModelFacts", "NativeLibrary", "Progress", "read_gguf"]

_HOMES = {
    "Gguf": "facts",
    "Hub": "hub",
    "LocalModel": "store",
    "ModelFacts": "facts",
    "NativeLibrary": "native",
    "Progress": "progress",
    "read_gguf": "facts",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"nimbos.hub has no {name!r}")
    return getattr(import_module(f"nimbos.hub.{_HOMES[name]}"), name)
