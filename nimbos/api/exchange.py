"""The end of an exchange: a JSON reply or an event stream, with the headers every answer carries."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from nimbos.api import openai_wire as wire
from nimbos.api.dialogue import Question
from nimbos.api.sse import OPENAI, EventResponse, Framing, Stream, or_gone
from nimbos.config import ServerSettings
from nimbos.types import Admission, Ask


def headers_of(ask: Ask, admission: Admission | None = None) -> dict[str, str]:
    limits = admission.headers if admission is not None else {}
    return {"x-nimbos-ask-id": ask.id, "x-nimbos-class": ask.ask_class.value, **limits}


def ask_headers(question: Question) -> dict[str, str]:
    """The ask's own headers and its limits; complete once the ask was let in."""
    return headers_of(question.ask, question.admission)


def json_reply(body: Any, *, headers: dict[str, str] | None = None) -> Response:
    return Response(wire.encode(body), media_type="application/json", headers=headers)


async def stream_reply(
    request: Request, events: AsyncGenerator[bytes, None], *, question: Question, settings: ServerSettings
) -> Response:
    """Begins the stream once its first event is there, so that what fails before it has a status of its own; a long
    wait begins it anyway, with comments that keep the connection."""
    return await event_stream(request, events, headers=lambda: ask_headers(question), settings=settings)


async def event_stream(
    request: Request,
    events: AsyncGenerator[bytes, None],
    *,
    headers: Callable[[], dict[str, str]],
    settings: ServerSettings,
    framing: Framing = OPENAI,
) -> Response:
    """Like `stream_reply`, for any ask. `headers` is called when the first event is there."""
    stream = Stream(events)
    await or_gone(request, stream.begin(settings.keep_alive_s))
    return EventResponse(
        stream,
        headers=headers(),
        keep_alive_s=settings.keep_alive_s,
        stall_s=settings.stall_write_s,
        framing=framing,
    )
