"""Models on disk: what there is, where it comes from, what fits. The door is `Hub`; read `hub.py` first."""

from nimbos.hub.facts import Gguf, ModelFacts, read_gguf
from nimbos.hub.hub import Hub
from nimbos.hub.native import NativeLibrary
from nimbos.hub.progress import Progress
from nimbos.hub.store import LocalModel

__all__ = ["Gguf", "Hub", "LocalModel", "ModelFacts", "NativeLibrary", "Progress", "read_gguf"]
