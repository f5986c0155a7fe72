"""Ollama's API: its routes, and the listener of its own that asks for no key (`nimbos up --ollama`).

The listener is on loopback only. Every request that comes there is the key `ollama`'s, which may ask and nothing else;
what a client sends as a key is not looked at. `Host` and `Origin` are checked as everywhere (`access.py`).
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from nimbos.api.ollama_chat import Conversations
from nimbos.api.ollama_embed import Embedding
from nimbos.api.ollama_models import Models
from nimbos.api.ollama_wire import SHAPE
from nimbos.runtime import Runtime

_SERVED = (
    "/api/",
    "/v1/chat/",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/models",
    "/v1/rerank",
    "/v1/responses",
)
_NOT_SERVED = ("/api/v1/", "/v1/messages/batches")
GREETING = "/api/"
_KEY_HEADERS = frozenset({b"authorization", b"x-api-key", b"cookie"})

REFUSED = ("/api/copy", "/api/create", "/api/push", "/api/blobs/{digest}")


def routes(runtime: Runtime) -> list[Route]:
    service, settings = runtime.service, runtime.settings
    conversations = Conversations(service, settings.server)
    embedding = Embedding(service, settings.server)
    models = Models(service, runtime.hub, runtime.accounts, settings)
    return [
        Route("/api/version", models.version, methods=["GET"]),
        Route("/api/tags", models.tags, methods=["GET"]),
        Route("/api/ps", models.running, methods=["GET"]),
        Route("/api/show", models.show, methods=["POST"]),
        Route("/api/chat", conversations.chat, methods=["POST"]),
        Route("/api/generate", conversations.generate, methods=["POST"]),
        Route("/api/embed", embedding.embed, methods=["POST"]),
        Route("/api/embeddings", embedding.embeddings, methods=["POST"]),
        Route("/api/pull", models.pull, methods=["POST"]),
        Route("/api/delete", models.delete, methods=["DELETE"]),
        *(Route(path, models.refuse, methods=["POST"]) for path in REFUSED),
    ]


async def greet(_: Request) -> Response:
    """What clients look for to know that Ollama is there."""
    return PlainTextResponse("Ollama is running")


def serves(path: str) -> bool:
    """Whether the keyless listener has this route: Ollama's own, and those that ask a model."""
    return path.startswith(_SERVED) and not path.startswith(_NOT_SERVED)


class Keyless:
    """Goes before everything that looks for a key: whoever comes here comes with the key `ollama`. As keys are for
    routes below a first word, `/` is looked for at `GREETING`."""

    def __init__(self, app: ASGIApp, *, secret: str) -> None:
        self._app = app
        self._header = (b"authorization", f"Bearer {secret}".encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            kept = [header for header in scope["headers"] if header[0].lower() not in _KEY_HEADERS]
            path = GREETING if scope["path"] == "/" else scope["path"]
            scope = {**scope, "headers": [*kept, self._header], "path": path}
        await self._app(scope, receive, send)


__all__ = ["GREETING", "SHAPE", "Keyless", "greet", "routes", "serves"]
