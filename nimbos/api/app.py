"""Puts the routes, the door check and the error shapes together. Read `access.py`, then one dialect's file."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from nimbos.api import anthropic, dashscope, errors, health, metrics, models
from nimbos.api.access import Access
from nimbos.api.observing import Observing
from nimbos.api.openai_chat import ChatCompletions
from nimbos.api.openai_completions import Completions
from nimbos.api.openai_embeddings import Embeddings
from nimbos.runtime import Runtime


def build(runtime: Runtime) -> Starlette:
    """The app of one running server. Each dialect brings its own routes."""
    service, server = runtime.service, runtime.settings.server
    chat = ChatCompletions(service, server)
    completions = Completions(service, server)
    embeddings = Embeddings(service, server)
    listed = models.Models(service, server.aliases)
    routes = [
        Route("/health", health.Health(service).get, methods=["GET"]),
        Route("/metrics", metrics.Metrics(service, runtime.meters).get, methods=["GET"]),
        Route("/v1/models", listed.list, methods=["GET"]),
        Route("/v1/models/{model:path}", listed.retrieve, methods=["GET"]),
        Route("/v1/chat/completions", chat.create, methods=["POST"]),
        Route("/v1/completions", completions.create, methods=["POST"]),
        Route("/v1/embeddings", embeddings.create, methods=["POST"]),
        *dashscope.routes(runtime),
        *anthropic.routes(runtime),
    ]
    shapes = errors.Shapes(
        (dashscope.SHAPE, anthropic.SHAPE)
    )  # a dialect that writes errors in its own way adds its `Shape` here
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(dashscope.CompatibleMode),
            Middleware(Observing, routes=routes, telemetry=runtime.telemetry),
            Middleware(errors.LastResort, shapes=shapes),
            Middleware(Access, settings=server, accounts=runtime.accounts),
        ],
        exception_handlers=errors.handlers(),
    )
