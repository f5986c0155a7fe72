"""`/v1/programs`: programs that a project has, brought as a whole. What one is says `nimbos/kernel/program.py`.

A folder comes as JSON, a file for each path, or as the bytes that `pack` makes of it (`application/x-nimbos-program`),
which is what the command line sends.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimbos.accounts import Role
from nimbos.api import body as bodies
from nimbos.api.access import account_of, identity_of
from nimbos.api.exchange import json_reply
from nimbos.api.query import limit_of, only
from nimbos.errors import Forbidden, InvalidRequest
from nimbos.kernel import Listed, Program, unpack
from nimbos.runtime import Runtime
from nimbos.types import Account

LIST_MAX = 1_000
PACKED = "application/x-nimbos-program"


class Binary(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A file that is no text."""

    base64: str


class ProgramBody(msgspec.Struct, kw_only=True):
    """`files`: by path, with `/` between folders; a text, or bytes as base64."""

    files: dict[str, str | Binary]


class FileTold(msgspec.Struct, kw_only=True):
    path: str
    sha256: str
    size_bytes: int


class ProgramTold(msgspec.Struct, kw_only=True):
    """`id`: its hash. `entry`: of a durable function, "" for an agent. `agents`: ids of its parts, by name."""

    id: str
    object: Literal["program"] = "program"
    name: str
    version: str
    description: str
    python: bool
    entry: str
    size_bytes: int
    files: list[FileTold]
    agents: dict[str, str]


class ProgramRow(msgspec.Struct, kw_only=True):
    """`created_ms`: since when the project has it."""

    id: str
    object: Literal["program"] = "program"
    name: str
    version: str
    python: bool
    size_bytes: int
    created_ms: int


class ProgramDeleted(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["program"] = "program"
    deleted: bool = True


class ProgramList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ProgramRow]
    first_id: str | None
    last_id: str | None
    has_more: bool


def routes(runtime: Runtime) -> list[Route]:
    programs = ProgramRoutes(runtime)
    return [
        Route("/v1/programs", programs.create, methods=["POST"]),
        Route("/v1/programs", programs.list, methods=["GET"]),
        Route("/v1/programs/{program}", programs.retrieve, methods=["GET"]),
        Route("/v1/programs/{program}", programs.delete, methods=["DELETE"]),
    ]


class ProgramRoutes:
    def __init__(self, runtime: Runtime) -> None:
        self._programs = runtime.kernel.programs
        self._settings = runtime.settings.server

    async def create(self, request: Request) -> Response:
        content = await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )
        account = _changing(request)
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        files = unpack(content) if media_type == PACKED else _files_of(bodies.decode(content, ProgramBody))
        return json_reply(told(await self._programs.put(account, files)))

    async def list(self, request: Request) -> Response:
        query = only(request, "after", "limit")
        limit = limit_of(query, default=100, most=LIST_MAX)
        found = await self._programs.list(account_of(request).id, after=query.get("after", ""), limit=limit + 1)
        rows = [_row(listed) for listed in found[:limit]]
        return json_reply(
            ProgramList(
                data=rows,
                first_id=rows[0].id if rows else None,
                last_id=rows[-1].id if rows else None,
                has_more=len(found) > limit,
            )
        )

    async def retrieve(self, request: Request) -> Response:
        """By id, the beginning of one, name, or `name@version`."""
        hash = await self._programs.find(account_of(request).id, request.path_params["program"])
        return json_reply(told(await self._programs.load(hash)))

    async def delete(self, request: Request) -> Response:
        """As `retrieve` finds it."""
        hash = await self._programs.remove(_changing(request).id, request.path_params["program"])
        return json_reply(ProgramDeleted(id=hash))


def _changing(request: Request) -> Account:
    """Raises: Forbidden."""
    identity = identity_of(request)
    if identity.role is Role.READER:
        raise Forbidden("The role reader looks at programs; it brings none and takes none away.")
    return identity.account


def told(program: Program) -> ProgramTold:
    return ProgramTold(
        id=program.hash,
        name=program.name,
        version=program.version,
        description=program.description,
        python=program.python,
        entry=program.entry,
        size_bytes=program.size_bytes,
        files=[FileTold(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes) for file in program.files],
        agents=dict(program.parts),
    )


def _row(listed: Listed) -> ProgramRow:
    return ProgramRow(
        id=listed.hash,
        name=listed.name,
        version=listed.version,
        python=listed.python,
        size_bytes=listed.size_bytes,
        created_ms=listed.created_ms,
    )


def _files_of(body: ProgramBody) -> Mapping[str, bytes]:
    """Raises: InvalidRequest."""
    return {path: _content(path, content) for path, content in body.files.items()}


def _content(path: str, content: str | Binary) -> bytes:
    try:
        return content.encode() if isinstance(content, str) else base64.b64decode(content.base64, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"`files.{path[:100]}.base64` is not base64.", param="files") from error
