"""The HTTP side: an app with a file for each dialect. The door is `build`, and `build_ollama` for the listener without
keys."""

from nimbos.api.app import build, build_ollama

__all__ = ["build", "build_ollama"]
