"""Anthropic's API: its routes and the shape of its errors. Read `anthropic_messages.py` next."""

from __future__ import annotations

from starlette.routing import Route

from nimbos.api.anthropic_errors import SHAPE
from nimbos.api.anthropic_messages import Messages
from nimbos.runtime import Runtime


def routes(runtime: Runtime) -> list[Route]:
    messages = Messages(runtime.service, runtime.settings.server)
    return [
        Route("/v1/messages", messages.create, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count, methods=["POST"]),
    ]


__all__ = ["SHAPE", "routes"]
