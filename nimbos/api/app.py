"""Puts the routes, the door check and the error shapes together. Read `access.py`, then one dialect's file."""

from __future__ import annotations

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from nimbos.api import (
    admin,
    anthropic,
    batches,
    dashscope,
    errors,
    files,
    health,
    live,
    metrics,
    models,
    moderations,
    ollama,
    openapi,
    own_usage,
    processes,
    programs,
    rerank,
    responses,
    uploads,
)
from nimbos.api.access import Access
from nimbos.api.observing import Observing
from nimbos.api.openai_chat import ChatCompletions
from nimbos.api.openai_completions import Completions
from nimbos.api.openai_embeddings import Embeddings
from nimbos.api.unknown import UnknownFields, performing
from nimbos.api.unread import Pieces
from nimbos.config import ServerSettings
from nimbos.runtime import Runtime


def build(runtime: Runtime) -> Starlette:
    """The app of one running server, whose batches are answered from now on."""
    lines = (batches, responses, anthropic)  # the dialects whose requests a batch may hold
    endpoints = [endpoint for dialect in lines for endpoint in dialect.endpoints(runtime)]
    policy = runtime.settings.server.unknown_fields
    runtime.batches.serve([performing(endpoint, policy) for endpoint in endpoints])
    routes = openapi.Description().routes(_routes(runtime))
    return _app(runtime, routes, runtime.settings.server, first=Middleware(dashscope.CompatibleMode))


def build_ollama(runtime: Runtime, secret: str) -> Starlette:
    """The app of the listener that asks for no key (`nimbos up --ollama`): whoever comes there uses this one."""
    greeting = Route(ollama.GREETING, ollama.greet, methods=["GET"])
    routes = [greeting, *(route for route in _routes(runtime) if ollama.serves(route.path))]
    server = msgspec.structs.replace(runtime.settings.server, host="127.0.0.1", allow_hosts=())  # only by its own name
    return _app(runtime, routes, server, first=Middleware(ollama.Keyless, secret=secret))


def _routes(runtime: Runtime) -> list[Route]:
    """Each dialect brings its own."""
    service, server = runtime.service, runtime.settings.server
    chat = ChatCompletions(service, server)
    completions = Completions(service, server)
    embeddings = Embeddings(service, server)
    listed = models.Models(service, server.aliases)
    return [
        Route("/health", health.Health(service).get, methods=["GET"]),
        Route("/metrics", metrics.Metrics(service, runtime.meters).get, methods=["GET"]),
        Route("/v1/models", listed.list, methods=["GET"]),
        Route("/v1/models/{model:path}", listed.retrieve, methods=["GET"]),
        Route("/v1/chat/completions", chat.create, methods=["POST"]),
        Route("/v1/completions", completions.create, methods=["POST"]),
        Route("/v1/embeddings", embeddings.create, methods=["POST"]),
        *rerank.routes(runtime),
        *live.routes(runtime),
        *own_usage.routes(runtime),
        *dashscope.routes(runtime),
        *ollama.routes(runtime),
        *anthropic.routes(runtime),
        *responses.routes(runtime),
        *admin.routes(runtime.accounts),
        *files.routes(runtime),
        *uploads.routes(runtime),
        *batches.routes(runtime),
        *processes.routes(runtime),
        *programs.routes(runtime),
        *moderations.routes(runtime),
    ]


def _app(runtime: Runtime, routes: list[Route], server: ServerSettings, *, first: Middleware) -> Starlette:
    """`first` changes requests before anybody looks at them."""
    # A dialect that writes errors in its own way adds its `Shape` here.
    shapes = errors.Shapes((dashscope.SHAPE, anthropic.SHAPE, ollama.SHAPE))
    app = Starlette(
        routes=routes,
        middleware=[
            first,
            Middleware(Observing, routes=routes, telemetry=runtime.telemetry),
            Middleware(Pieces),
            Middleware(errors.LastResort, shapes=shapes),
            Middleware(Access, settings=server, accounts=runtime.accounts),
            Middleware(UnknownFields, policy=server.unknown_fields),
        ],
        exception_handlers=errors.handlers(),
    )
    app.state.leave = runtime.kernel.bells.leave  # the server calls it when it stops
    return app
