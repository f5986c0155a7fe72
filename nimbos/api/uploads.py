"""`/v1/uploads`: a file that comes in parts. Each part goes to disk as it comes, and so does the file made of them."""

from __future__ import annotations

from contextlib import aclosing
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimbos.api import body as bodies
from nimbos.api.access import account_of
from nimbos.api.batches import ExpiresAfter
from nimbos.api.exchange import json_reply
from nimbos.api.files import DRAINED_BYTES, FileBody, body_of, checked_expiry, checked_purpose
from nimbos.api.multipart import Form
from nimbos.batches import File, Part, Upload, UploadState
from nimbos.errors import InvalidRequest, NimbosError
from nimbos.runtime import Runtime

NAME_CHARACTERS = 255


class UploadBody(msgspec.Struct, kw_only=True):
    """`mime_type` is looked at by nobody."""

    bytes: int
    filename: str
    mime_type: str
    purpose: str
    expires_after: ExpiresAfter | None = None


class CompleteBody(msgspec.Struct, kw_only=True):
    part_ids: list[str]
    md5: str | None = None


class UploadTold(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: UploadState
    file: FileBody | None


class PartTold(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


def routes(runtime: Runtime) -> list[Route]:
    uploads = UploadRoutes(runtime)
    return [
        Route("/v1/uploads", uploads.create, methods=["POST"]),
        Route("/v1/uploads/{upload_id}/parts", uploads.add, methods=["POST"]),
        Route("/v1/uploads/{upload_id}/complete", uploads.complete, methods=["POST"]),
        Route("/v1/uploads/{upload_id}/cancel", uploads.cancel, methods=["POST"]),
    ]


class UploadRoutes:
    def __init__(self, runtime: Runtime) -> None:
        self._uploads = runtime.batches.uploads
        self._settings = runtime.settings.server

    async def create(self, request: Request) -> Response:
        body = bodies.decode(await self._read(request), UploadBody)
        if body.bytes < 0:
            raise InvalidRequest("`bytes` cannot be below zero.", param="bytes")
        if not 0 < len(body.filename) <= NAME_CHARACTERS or "\0" in body.filename:
            raise InvalidRequest(
                f"`filename` must have 1 to {NAME_CHARACTERS} characters, none of them NUL.", param="filename"
            )
        expires = body.expires_after
        upload = await self._uploads.create(
            account_of(request),
            filename=body.filename,
            purpose=checked_purpose(body.purpose),
            size_bytes=body.bytes,
            file_expires_s=checked_expiry(expires.seconds, "expires_after") if expires is not None else None,
        )
        return json_reply(told(upload))

    async def add(self, request: Request) -> Response:
        form = Form(request, stall_s=self._settings.stall_write_s, file_part="data")
        try:
            part = await self._receive(request, form)
        except NimbosError:
            await form.drain(DRAINED_BYTES)
            raise
        return json_reply(PartTold(id=part.id, created_at=part.created_ms // 1000, upload_id=part.upload))

    async def _receive(self, request: Request, form: Form) -> Part:
        project, upload_id = account_of(request).id, request.path_params["upload_id"]
        async with aclosing(form.file()) as pieces:
            incoming = await self._uploads.receive(project, upload_id, pieces)
        try:
            await form.rest()
            for name in form.fields:
                raise InvalidRequest(f"The form has the unknown field {name[:60]!r}.", param=name[:60])
            return await self._uploads.add(project, upload_id, incoming)
        except NimbosError as error:
            await self._uploads.forget(incoming, after=error)
            raise

    async def complete(self, request: Request) -> Response:
        body = bodies.decode(await self._read(request), CompleteBody)
        upload, file = await self._uploads.complete(
            account_of(request), request.path_params["upload_id"], body.part_ids, md5=body.md5
        )
        return json_reply(told(upload, file))

    async def cancel(self, request: Request) -> Response:
        return json_reply(told(await self._uploads.cancel(account_of(request).id, request.path_params["upload_id"])))

    async def _read(self, request: Request) -> bytes:
        return await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )


def told(upload: Upload, file: File | None = None) -> UploadTold:
    return UploadTold(
        id=upload.id,
        bytes=upload.size_bytes,
        created_at=upload.created_ms // 1000,
        expires_at=upload.expires_ms // 1000,
        filename=upload.filename,
        purpose=upload.purpose,
        status=upload.state,
        file=body_of(file) if file is not None else None,
    )
