"""What Anthropic's clients read of message batches, made of a batch's row and of the lines that it leaves. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

import msgspec

from nimbos.api.anthropic_errors import Details, ErrorBody, ErrorDetail
from nimbos.batches import Batch, State
from nimbos.types import new_id

PREFIX = "msgbatch_"
_ENDED = frozenset({State.COMPLETED, State.FAILED, State.EXPIRED, State.CANCELLED})
_UNANSWERED = {"batch_expired": "expired", "batch_cancelled": "canceled"}

Status = Literal["in_progress", "canceling", "ended"]


class Counts(msgspec.Struct, kw_only=True):
    """All but `processing` are 0 until the batch has ended, as the original has it."""

    processing: int = 0
    succeeded: int = 0
    errored: int = 0
    canceled: int = 0
    expired: int = 0


class MessageBatch(msgspec.Struct, kw_only=True, tag_field="type", tag="message_batch"):
    id: str
    processing_status: Status
    request_counts: Counts
    created_at: str
    expires_at: str
    ended_at: str | None
    cancel_initiated_at: str | None
    archived_at: None = None
    results_url: str | None


class BatchPage(msgspec.Struct, kw_only=True):
    data: list[MessageBatch]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Deleted(msgspec.Struct, tag_field="type", tag="message_batch_deleted"):
    id: str


class _Response(msgspec.Struct):
    status_code: int
    body: msgspec.Raw


class _LineError(msgspec.Struct):
    code: str
    message: str


class _Line(msgspec.Struct):
    """A line of a batch's output or error file."""

    custom_id: str | None
    response: _Response | None = None
    error: _LineError | None = None


class _Succeeded(msgspec.Struct, tag_field="type", tag="succeeded"):
    message: msgspec.Raw


class _Errored(msgspec.Struct, tag_field="type", tag="errored"):
    error: msgspec.Raw | ErrorBody


class _Ended(msgspec.Struct):
    type: str


class _Result(msgspec.Struct):
    custom_id: str | None
    result: _Succeeded | _Errored | _Ended


def shown_id(batch_id: str) -> str:
    return f"{PREFIX}{batch_id.removeprefix('batch_')}"


def status_of(batch: Batch) -> Status:
    if batch.state in _ENDED:
        return "ended"
    return "canceling" if batch.state is State.CANCELLING else "in_progress"


def told(batch: Batch, *, count: int, base_url: str) -> MessageBatch:
    """`count`: of its requests."""
    status = status_of(batch)
    shown = shown_id(batch.id)
    return MessageBatch(
        id=shown,
        processing_status=status,
        request_counts=_counts(batch, count) if status == "ended" else Counts(processing=count),
        created_at=_moment(batch.created_ms),
        expires_at=_moment(batch.expires_ms),
        ended_at=_moment(batch.at_ms[batch.state]) if status == "ended" else None,
        cancel_initiated_at=_moment(batch.at_ms[State.CANCELLING]) if State.CANCELLING in batch.at_ms else None,
        results_url=f"{base_url}v1/messages/batches/{shown}/results" if status == "ended" else None,
    )


def result_of(line: bytes) -> bytes:
    """A line of a file as a line of results."""
    read = msgspec.json.decode(line, type=_Line)
    result: _Succeeded | _Errored | _Ended
    if read.response is not None:
        good = 200 <= read.response.status_code < 300
        result = _Succeeded(read.response.body) if good else _Errored(read.response.body)
    elif read.error is not None and read.error.code in _UNANSWERED:
        result = _Ended(_UNANSWERED[read.error.code])
    else:
        error = read.error or _LineError("line_abandoned", "There is no answer.")
        result = _Errored(_error(error.code, error.message))
    return msgspec.json.encode(_Result(read.custom_id, result)) + b"\n"


def unread_of(batch: Batch, line: bytes) -> bytes:
    """A line of the input that the batch had not come to when it was ended, as a line of results."""
    kind = "expired" if batch.state is State.EXPIRED else "canceled"
    return msgspec.json.encode(_Result(_custom_id(line), _Ended(kind))) + b"\n"


def fault_of(line: bytes, reason: str) -> bytes:
    """A line of the input, of which nothing was asked, as a line of results."""
    return msgspec.json.encode(_Result(_custom_id(line), _Errored(_error("invalid_request", reason)))) + b"\n"


def _custom_id(line: bytes) -> str | None:
    return msgspec.json.decode(line, type=_Line).custom_id


def _counts(batch: Batch, count: int) -> Counts:
    """Requests that a batch which was ended early never came to are what remains."""
    if batch.state is State.FAILED:
        return Counts(errored=count)
    left = count - batch.completed - batch.failed
    if batch.state is State.EXPIRED:
        return Counts(succeeded=batch.completed, errored=batch.failed, expired=left)
    return Counts(succeeded=batch.completed, errored=batch.failed, canceled=left)


def _error(code: str, message: str) -> ErrorBody:
    kind = "api_error" if code == "line_abandoned" else "invalid_request_error"
    detail = ErrorDetail(type=kind, message=message, details=Details(error_code=code))
    return ErrorBody(error=detail, request_id=new_id("req"))


def _moment(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
