"""Anthropic's API: its routes and the shape of its errors. Read `anthropic_messages.py` next."""

from __future__ import annotations

from starlette.routing import Route

from nimbos.api import anthropic_batches
from nimbos.api.anthropic_batches import endpoints
from nimbos.api.anthropic_body import PATH
from nimbos.api.anthropic_errors import SHAPE
from nimbos.api.anthropic_messages import Messages
from nimbos.runtime import Runtime


def routes(runtime: Runtime) -> list[Route]:
    messages = Messages(runtime.service, runtime.settings.server)
    return [
        Route(PATH, messages.create, methods=["POST"]),
        Route(f"{PATH}/count_tokens", messages.count, methods=["POST"]),
        *anthropic_batches.routes(runtime),
    ]


__all__ = ["SHAPE", "endpoints", "routes"]
