"""`GET /health`: 200 when a model is ready to answer, 503 before and while shutting down.

It needs no key and says no more."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nimbos.service import Service


class Health:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def get(self, _: Request) -> Response:
        if self._service.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, status_code=503, headers={"retry-after": "1"})
