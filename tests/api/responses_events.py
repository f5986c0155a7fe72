"""What the tests of the Responses routes share: events of a stream, held to OpenAI's own types."""

from __future__ import annotations

import json
from typing import Any

import httpx2
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

ENDS = ("response.completed", "response.incomplete", "response.failed")

_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def events_of(response: httpx2.Response) -> list[dict[str, Any]]:
    """Of a finished stream. Each is valid by the official types, numbered without a gap; the last is an end."""
    assert response.status_code == 200, response.text
    events = [_event(block) for block in response.text.split("\n\n") if block and not block.startswith(":")]
    first = events[0]["sequence_number"]
    assert [event["sequence_number"] for event in events] == list(range(first, first + len(events)))
    assert events[-1]["type"] in ENDS
    for event in events:
        _EVENT.validate_python(event)
    return events


def whole(response: httpx2.Response) -> dict[str, Any]:
    """A reply that is a response, valid by the official types."""
    assert response.status_code == 200, response.text
    Response.model_validate(response.json())
    found: dict[str, Any] = response.json()
    return found


def texts(response: dict[str, Any]) -> list[str]:
    return [item["content"][0]["text"] for item in response["output"] if item["type"] == "message"]


def _event(block: str) -> dict[str, Any]:
    name, data = block.strip("\n").split("\n")
    event: dict[str, Any] = json.loads(data.removeprefix("data: "))
    assert name == f"event: {event['type']}"
    return event
