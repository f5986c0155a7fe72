"""Errors in Anthropic's shape, `{"type": "error", "error": {"type", "message"}, "request_id"}`.

Every path under `/v1/messages` has it, and any path that a client asks for with the header `anthropic-version`.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from nimbos.api import errors
from nimbos.api.errors import Shape
from nimbos.errors import BudgetExhausted, NimbosError, PromptTooLong
from nimbos.types import new_id

VERSION_HEADER = "anthropic-version"

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_REQUEST_ID = "anthropic_request_id"  # where an error keeps the id that its body shows, for its header
_LIMIT = re.compile(r"x-ratelimit-(limit|remaining|reset)-([a-z-]+)")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|d|h|m|s)")
_UNIT_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3_600, "d": 86_400}


class Details(msgspec.Struct, kw_only=True):
    """`error_code` is our own code, which says more than the type."""

    error_code: str
    param: str | None = None


class ErrorDetail(msgspec.Struct, kw_only=True):
    type: str
    message: str
    details: Details


class ErrorBody(msgspec.Struct, kw_only=True, tag="error"):
    error: ErrorDetail
    request_id: str


def type_of(error: NimbosError) -> str:
    if isinstance(error, BudgetExhausted):
        return "billing_error"
    return _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")


def message_of(error: NimbosError) -> str:
    """Coding clients know a prompt that is too long by these very words, and then shorten the conversation."""
    if isinstance(error, PromptTooLong):
        return f"prompt is too long: {error.have} tokens > {error.limit} maximum"
    return error.message


def body_of(error: NimbosError, request_id: str | None = None) -> ErrorBody:
    return ErrorBody(
        error=ErrorDetail(
            type=type_of(error),
            message=message_of(error),
            details=Details(error_code=error.code, param=error.param),
        ),
        request_id=request_id or new_id("req"),
    )


def event_of(error: NimbosError, request_id: str) -> bytes:
    """A failure in the middle of a stream."""
    return b"event: error\ndata: " + msgspec.json.encode(body_of(error, request_id)) + b"\n\n"


def limit_headers(headers: dict[str, str]) -> dict[str, str]:
    """`x-ratelimit-remaining-tokens: 5` as `anthropic-ratelimit-tokens-remaining: 5`; a reset becomes a moment."""
    found: dict[str, str] = {}
    for name, value in headers.items():
        match = _LIMIT.fullmatch(name)
        if match is not None:
            kind, what = match.groups()
            found[f"anthropic-ratelimit-{what}-{kind}"] = _moment_in(value) if kind == "reset" else value
    return found


def _moment_in(duration: str) -> str:
    """`1m30s` from now, as RFC 3339 has it."""
    seconds = sum(float(number) * _UNIT_S[unit] for number, unit in _DURATION.findall(duration))
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def written(error: NimbosError) -> bytes:
    body = body_of(error)
    _kept(error)[_REQUEST_ID] = body.request_id  # one error object may be told to several who wait for the same load
    return msgspec.json.encode(body)


def _headers(error: NimbosError) -> dict[str, str]:
    """Called after the body was written."""
    return {"request-id": _kept(error).get(_REQUEST_ID, ""), **limit_headers(errors.headers_of(error))}


def _kept(error: NimbosError) -> dict[str, Any]:
    return error.__dict__


SHAPE = Shape(
    prefixes=("/v1/messages", "/api/event_logging"), body=written, headers=_headers, client_header=VERSION_HEADER
)
