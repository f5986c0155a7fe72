"""`/v1/files`: contents that a project keeps here, for batches. Uploads go to disk as they come."""

from __future__ import annotations

import re
from contextlib import aclosing
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from nimbos.api.access import account_of
from nimbos.api.exchange import json_reply
from nimbos.api.multipart import Form
from nimbos.api.query import choice_of, limit_of, only
from nimbos.batches import File
from nimbos.errors import InvalidRequest, NimbosError
from nimbos.runtime import Runtime
from nimbos.types import Account

PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
LIST_MAX = 10_000
EXPIRES_S = (3_600, 2_592_000)
DRAINED_BYTES = 1 << 30  # of a form that is refused, so that its client gets to read why
_FIELDS = frozenset({"purpose", "expires_after[anchor]", "expires_after[seconds]"})
_SECONDS = re.compile(r"[0-9]{1,12}")
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class RangeNotSatisfiable(NimbosError):
    code = "range_not_satisfiable"
    status = 416
    kind = "invalid_request_error"


class FileBody(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[FileBody]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(msgspec.Struct, kw_only=True):
    id: str
    object: str = "file"
    deleted: bool = True


def routes(runtime: Runtime) -> list[Route]:
    files = FileRoutes(runtime)
    return [
        Route("/v1/files", files.create, methods=["POST"]),
        Route("/v1/files", files.list, methods=["GET"]),
        Route("/v1/files/{file_id}", files.retrieve, methods=["GET"]),
        Route("/v1/files/{file_id}", files.delete, methods=["DELETE"]),
        Route("/v1/files/{file_id}/content", files.content, methods=["GET"]),
    ]


class FileRoutes:
    def __init__(self, runtime: Runtime) -> None:
        self._files = runtime.batches.files
        self._stall_s = runtime.settings.server.stall_write_s

    async def create(self, request: Request) -> Response:
        form = Form(request, stall_s=self._stall_s)
        try:
            file = await self._receive(account_of(request), form)
        except NimbosError:
            await form.drain(DRAINED_BYTES)
            raise
        return json_reply(body_of(file))

    async def _receive(self, account: Account, form: Form) -> File:
        async with aclosing(form.file()) as pieces:
            incoming = await self._files.receive(pieces)
        try:
            await form.rest()
            purpose, expires_s = _fields(form.fields)
            return await self._files.keep(
                account, incoming, filename=form.filename, purpose=purpose, expires_s=expires_s
            )
        except NimbosError as error:
            await self._files.forget(incoming, after=error)
            raise

    async def list(self, request: Request) -> Response:
        query = only(request, "after", "limit", "order", "purpose")
        limit = limit_of(query, default=LIST_MAX, most=LIST_MAX)
        newest_first = choice_of(query, "order", ("desc", "asc")) == "desc"
        found = await self._files.list(
            account_of(request).id,
            after=query.get("after", ""),
            limit=limit + 1,
            newest_first=newest_first,
            purpose=query.get("purpose", ""),
        )
        shown = [body_of(file) for file in found[:limit]]
        return json_reply(
            FileList(
                data=shown,
                first_id=shown[0].id if shown else None,
                last_id=shown[-1].id if shown else None,
                has_more=len(found) > limit,
            )
        )

    async def retrieve(self, request: Request) -> Response:
        return json_reply(body_of(await self._found(request)))

    async def delete(self, request: Request) -> Response:
        file_id = request.path_params["file_id"]
        await self._files.delete(account_of(request).id, file_id)
        return json_reply(Deleted(id=file_id))

    async def content(self, request: Request) -> Response:
        """The whole, or the one range that is asked for; several ranges get the whole, as HTTP allows."""
        file = await self._found(request)
        start, end = _range_of(request.headers.get("range"), file.size_bytes)
        headers = {"content-length": str(end - start), "accept-ranges": "bytes", "x-content-type-options": "nosniff"}
        whole = (start, end) == (0, file.size_bytes)
        if not whole:
            headers["content-range"] = f"bytes {start}-{end - 1}/{file.size_bytes}"
        return StreamingResponse(
            self._files.read(file, start=start, end=end),
            status_code=200 if whole else 206,
            headers=headers,
            media_type="application/octet-stream",
        )

    async def _found(self, request: Request) -> File:
        return await self._files.get(account_of(request).id, request.path_params["file_id"])


def body_of(file: File) -> FileBody:
    return FileBody(
        id=file.id,
        bytes=file.size_bytes,
        created_at=file.created_ms // 1000,
        expires_at=file.expires_ms // 1000 if file.expires_ms is not None else None,
        filename=file.filename,
        purpose=file.purpose,
    )


def _fields(fields: dict[str, str]) -> tuple[str, int | None]:
    """Purpose and expiry. Raises: InvalidRequest naming the field."""
    for name in fields:
        if name not in _FIELDS:
            raise InvalidRequest(f"The form has the unknown field {name[:60]!r}.", param=name[:60])
    purpose = checked_purpose(fields.get("purpose", ""))
    seconds = fields.get("expires_after[seconds]")
    if seconds is None and "expires_after[anchor]" not in fields:
        return purpose, None
    if fields.get("expires_after[anchor]") != "created_at" or seconds is None:
        raise InvalidRequest("`expires_after` needs `anchor`, 'created_at', and `seconds`.", param="expires_after")
    return purpose, checked_expiry(seconds, "expires_after")


def checked_purpose(purpose: str) -> str:
    """Raises: InvalidRequest."""
    if purpose not in PURPOSES:
        raise InvalidRequest(f"`purpose` must be one of {', '.join(PURPOSES)}.", param="purpose")
    return purpose


def checked_expiry(seconds: str | int, param: str) -> int:
    least, most = EXPIRES_S
    count = int(seconds) if isinstance(seconds, int) or _SECONDS.fullmatch(seconds) else 0
    if not least <= count <= most:
        raise InvalidRequest(f"`{param}.seconds` must be from {least} to {most}.", param=param)
    return count


def _range_of(header: str | None, size_bytes: int) -> tuple[int, int]:
    """[start, end). Raises: RangeNotSatisfiable."""
    match = _RANGE.fullmatch(header.strip()) if header is not None else None
    if match is None or match.group() == "bytes=-":
        return 0, size_bytes
    first, last = match.groups()
    if first:
        start, end = int(first), min(int(last) + 1 if last else size_bytes, size_bytes)
    else:
        start, end = max(0, size_bytes - int(last)), size_bytes
    if start >= end:
        raise RangeNotSatisfiable(f"The file has {size_bytes} bytes; the range {match.group()!r} is outside of it.")
    return start, end
