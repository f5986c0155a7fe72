"""DashScope, Model Studio's own API: its routes, its errors, and the other name of OpenAI's routes.

`/compatible-mode/v1/…` is `/v1/…` by another name: the path is changed before anybody looks at it, so that keys,
scopes and errors are those of the route itself.
"""

from __future__ import annotations

from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from nimbos.api.dashscope_generation import Generation
from nimbos.api.dashscope_vectors import Embeddings, Rerank, refuse_multimodal
from nimbos.api.dashscope_wire import SHAPE
from nimbos.runtime import Runtime

_SERVICES = "/api/v1/services"
_COMPATIBLE = "/compatible-mode/v1/"


def routes(runtime: Runtime) -> list[Route]:
    service, server = runtime.service, runtime.settings.server
    handlers = {
        "aigc/text-generation/generation": Generation(service, server, parts=False).create,
        "aigc/multimodal-generation/generation": Generation(service, server, parts=True).create,
        "embeddings/text-embedding/text-embedding": Embeddings(service, server).create,
        "embeddings/multimodal-embedding/multimodal-embedding": refuse_multimodal,
        "rerank/text-rerank/text-rerank": Rerank(service, server).create,
    }
    return [Route(f"{_SERVICES}/{path}", handler, methods=["POST"]) for path, handler in handlers.items()]


class CompatibleMode:
    """Goes before everything that reads the path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_COMPATIBLE):
            path = scope["path"].removeprefix("/compatible-mode")
            raw_path = (scope.get("raw_path") or b"").removeprefix(b"/compatible-mode")
            scope = {**scope, "path": path, "raw_path": raw_path}
        await self._app(scope, receive, send)


__all__ = ["SHAPE", "CompatibleMode", "routes"]
