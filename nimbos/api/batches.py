"""`/v1/batches`: many requests in one file, answered at class `batch` when there is room. In OpenAI's shape."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimbos.accounts import allowed_route
from nimbos.api import body as bodies
from nimbos.api import errors, openai_chat, openai_completions, openai_embeddings
from nimbos.api.access import account_of
from nimbos.api.exchange import json_reply
from nimbos.api.fields import class_of
from nimbos.api.files import checked_expiry
from nimbos.api.query import limit_of, only
from nimbos.batches import Batch, Endpoint, Fault, State
from nimbos.errors import Forbidden, InvalidRequest
from nimbos.runtime import Runtime
from nimbos.types import Account, AskClass

LIST_MAX = 100
METADATA_MAX = 16
METADATA_KEY_CHARACTERS, METADATA_VALUE_CHARACTERS = 64, 512
WINDOW_S = (60, 14 * 86_400)
_WINDOW = re.compile(r"([1-9][0-9]{0,5})([mhd])")
_UNIT_S = {"m": 60, "h": 3_600, "d": 86_400}


class ExpiresAfter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    seconds: int
    anchor: Literal["created_at"] = "created_at"


class BatchBody(msgspec.Struct, kw_only=True):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


class FaultList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: tuple[Fault, ...]


class Counts(msgspec.Struct, kw_only=True):
    total: int
    completed: int
    failed: int


class Waiting(msgspec.Struct, kw_only=True):
    """Why nothing goes on, in the words of the limit; and when the batch looks again."""

    waiting_for: str
    waiting_until: int


class BatchTold(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: FaultList | None
    input_file_id: str
    completion_window: str
    status: State
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: Counts
    metadata: dict[str, str] | None
    x_nimbos: Waiting | UnsetType = UNSET


class BatchList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[BatchTold]
    first_id: str | None
    last_id: str | None
    has_more: bool


def routes(runtime: Runtime) -> list[Route]:
    batches = BatchRoutes(runtime)
    return [
        Route("/v1/batches", batches.create, methods=["POST"]),
        Route("/v1/batches", batches.list, methods=["GET"]),
        Route("/v1/batches/{batch_id}", batches.retrieve, methods=["GET"]),
        Route("/v1/batches/{batch_id}/cancel", batches.cancel, methods=["POST"]),
    ]


def endpoints(runtime: Runtime) -> list[Endpoint]:
    """Those of this dialect that a line may name."""
    return [
        Endpoint(path=path, perform=partial(perform, runtime), refuse=errors.body_of)
        for path, perform in (
            ("/v1/chat/completions", openai_chat.perform),
            ("/v1/completions", openai_completions.perform),
            ("/v1/embeddings", openai_embeddings.perform),
        )
    ]


class BatchRoutes:
    def __init__(self, runtime: Runtime) -> None:
        self._batches = runtime.batches
        self._desk = runtime.batches.desk
        self._settings = runtime.settings.server

    async def create(self, request: Request) -> Response:
        content = await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )
        body = bodies.decode(content, BatchBody)
        account = account_of(request)
        self._check_endpoint(account, body.endpoint)
        check_class(account)
        file = await self._batches.files.get(account.id, body.input_file_id)
        if file.purpose != "batch":
            raise InvalidRequest(
                f"The file {file.id} has the purpose {file.purpose!r}; upload it with 'batch'.", param="input_file_id"
            )
        batch = await self._desk.create(
            account,
            dialect="openai",
            endpoint=body.endpoint,
            input_file=body.input_file_id,
            completion_window=body.completion_window,
            window_s=_window_s(body.completion_window),
            metadata=_checked_metadata(body.metadata),
            output_expires_s=_expires_s(body.output_expires_after),
        )
        self._batches.wake()
        return json_reply(told(batch))

    async def list(self, request: Request) -> Response:
        query = only(request, "after", "limit")
        limit = limit_of(query, default=20, most=LIST_MAX)
        found = await self._desk.list(
            account_of(request).id, dialect="openai", after=query.get("after", ""), limit=limit + 1
        )
        shown = [told(batch) for batch in found[:limit]]
        return json_reply(
            BatchList(
                data=shown,
                first_id=shown[0].id if shown else None,
                last_id=shown[-1].id if shown else None,
                has_more=len(found) > limit,
            )
        )

    async def retrieve(self, request: Request) -> Response:
        batch_id = request.path_params["batch_id"]
        return json_reply(told(await self._desk.get(account_of(request).id, batch_id, dialect="openai")))

    async def cancel(self, request: Request) -> Response:
        batch_id = request.path_params["batch_id"]
        batch = await self._desk.cancel(account_of(request).id, batch_id, dialect="openai")
        self._batches.wake()
        return json_reply(told(batch))

    def _check_endpoint(self, account: Account, endpoint: str) -> None:
        known = [path for path in self._batches.endpoints if not path.startswith("/v1/messages")]
        if endpoint not in known:
            raise InvalidRequest(
                f"`endpoint` is {endpoint[:60]!r}; batches are for {', '.join(known)}.", param="endpoint"
            )
        if not allowed_route(account, endpoint):
            raise Forbidden(f"This key may not use {endpoint}, so no batch for it either.")


def check_class(account: Account) -> None:
    """Raises: Forbidden for a key that may not ask at class `batch`."""
    class_of(None, AskClass.BATCH, None, account)


def told(batch: Batch) -> BatchTold:
    at: dict[str, Any] = {
        f"{state.value}_at": batch.at_ms[state] // 1000 if state in batch.at_ms else None
        for state in State
        if state is not State.VALIDATING
    }
    waiting: Waiting | UnsetType = UNSET
    if batch.waiting_for is not None:
        waiting = Waiting(waiting_for=batch.waiting_for, waiting_until=batch.waiting_until_ms // 1000)
    return BatchTold(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=FaultList(data=batch.errors) if batch.errors else None,
        input_file_id=batch.input_file,
        completion_window=batch.completion_window,
        status=batch.state,
        output_file_id=batch.output_file,
        error_file_id=batch.error_file,
        created_at=batch.created_ms // 1000,
        expires_at=batch.expires_ms // 1000,
        request_counts=Counts(total=batch.total, completed=batch.completed, failed=batch.failed),
        metadata=batch.metadata,
        x_nimbos=waiting,
        **at,
    )


def _window_s(window: str) -> int:
    match = _WINDOW.fullmatch(window)
    seconds = int(match[1]) * _UNIT_S[match[2]] if match else 0
    least, most = WINDOW_S
    if not least <= seconds <= most:
        raise InvalidRequest(
            "`completion_window` must be a number with m, h or d, from '1m' to '14d', such as '24h'.",
            param="completion_window",
        )
    return seconds


def _expires_s(after: ExpiresAfter | None) -> int | None:
    return checked_expiry(after.seconds, "output_expires_after") if after is not None else None


def _checked_metadata(metadata: dict[str, str] | None) -> dict[str, str] | None:
    if metadata is None:
        return None
    if len(metadata) > METADATA_MAX:
        raise InvalidRequest(f"`metadata` may have {METADATA_MAX} entries.", param="metadata")
    for key, value in metadata.items():
        if len(key) > METADATA_KEY_CHARACTERS or len(value) > METADATA_VALUE_CHARACTERS:
            raise InvalidRequest(
                f"`metadata`: keys may have {METADATA_KEY_CHARACTERS} characters, values {METADATA_VALUE_CHARACTERS}.",
                param="metadata",
            )
    return metadata
