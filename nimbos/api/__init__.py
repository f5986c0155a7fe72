"""The HTTP side: one ASGI app, a file for each dialect. The door is `build`."""

from nimbos.api.app import build

__all__ = ["build"]
