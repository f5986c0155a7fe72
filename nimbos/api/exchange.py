"""The end of an exchange: a JSON reply or an event stream, with the headers every answer carries."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from nimbos.api import openai_wire as wire
from nimbos.api.sse import EventResponse, Stream, or_gone
from nimbos.config import ServerSettings
from nimbos.types import Ask


def ask_headers(ask: Ask) -> dict[str, str]:
    return {"x-nimbos-ask-id": ask.id, "x-nimbos-class": ask.ask_class.value}


def json_reply(body: Any, *, headers: dict[str, str] | None = None) -> Response:
    return Response(wire.encode(body), media_type="application/json", headers=headers)


async def stream_reply(
    request: Request, events: AsyncGenerator[bytes, None], *, headers: dict[str, str], settings: ServerSettings
) -> Response:
    """Begins the stream once its first event is there, so that what fails before it has a status of its own; a long
    wait begins it anyway, with comments that keep the connection."""
    stream = Stream(events)
    await or_gone(request, stream.begin(settings.keep_alive_s))
    return EventResponse(stream, headers=headers, keep_alive_s=settings.keep_alive_s, stall_s=settings.stall_write_s)
