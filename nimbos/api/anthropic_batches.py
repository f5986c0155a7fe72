"""`/v1/messages/batches`: many messages in one request, answered at class `batch` when there is room.

The requests become lines of a file and run as every batch does (`nimbos.batches`); here are only Anthropic's words for
it. Results are read from the files that a batch leaves, line by line.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from nimbos.api import anthropic_batch_wire as wire
from nimbos.api import body as bodies
from nimbos.api.access import account_of
from nimbos.api.anthropic_body import PATH
from nimbos.api.anthropic_errors import written
from nimbos.api.anthropic_messages import perform
from nimbos.api.batches import check_class
from nimbos.api.exchange import json_reply
from nimbos.api.query import limit_of
from nimbos.batches import Batch, Endpoint, File, State
from nimbos.errors import Conflict, InvalidRequest, NimbosError, NotFound, PayloadTooLarge
from nimbos.runtime import Runtime
from nimbos.types import Account

WINDOW_S = 86_400
KEPT_S = 29 * 86_400  # results
LIST_MAX = 1_000
_CUSTOM_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_COUNT = "requests"


class Item(msgspec.Struct):
    custom_id: str
    params: msgspec.Raw


class BatchBody(msgspec.Struct):
    requests: list[Item]


def routes(runtime: Runtime) -> list[Route]:
    batches = MessageBatches(runtime)
    one = f"{PATH}/batches/{{batch_id}}"
    return [
        Route(f"{PATH}/batches", batches.create, methods=["POST"]),
        Route(f"{PATH}/batches", batches.page, methods=["GET"]),
        Route(one, batches.retrieve, methods=["GET"]),
        Route(one, batches.delete, methods=["DELETE"]),
        Route(f"{one}/cancel", batches.cancel, methods=["POST"]),
        Route(f"{one}/results", batches.results, methods=["GET"]),
    ]


def endpoints(runtime: Runtime) -> list[Endpoint]:
    return [Endpoint(path=PATH, perform=partial(perform, runtime), refuse=written)]


class MessageBatches:
    def __init__(self, runtime: Runtime) -> None:
        self._batches = runtime.batches
        self._desk = runtime.batches.desk
        self._files = runtime.batches.files
        self._settings = runtime.settings.server

    async def create(self, request: Request) -> Response:
        content = await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )
        account = account_of(request)
        check_class(account)
        items = self._checked(content)
        file = await self._keep(account, items)
        try:
            batch = await self._desk.create(
                account,
                dialect="anthropic",
                endpoint=PATH,
                input_file=file.id,
                completion_window="24h",
                window_s=WINDOW_S,
                metadata={_COUNT: str(len(items))},
                output_expires_s=KEPT_S,
            )
        except NimbosError:
            with suppress(NimbosError):  # a batch that is there after all keeps its file
                await self._files.delete(account.id, file.id)
            raise
        self._batches.wake()
        return json_reply(self._told(request, batch))

    async def page(self, request: Request) -> Response:
        query = request.query_params
        limit = limit_of(query, default=20, most=LIST_MAX)
        after, before = (_own_id(query[name]) if name in query else "" for name in ("after_id", "before_id"))
        found = await self._desk.list(
            account_of(request).id, dialect="anthropic", limit=limit + 1, after=after, before=before
        )
        more = len(found) > limit
        shown = (found[1:] if more and before else found)[:limit]
        data = [self._told(request, batch) for batch in shown]
        page = wire.BatchPage(
            data=data, has_more=more, first_id=data[0].id if data else None, last_id=data[-1].id if data else None
        )
        return json_reply(page)

    async def retrieve(self, request: Request) -> Response:
        return json_reply(self._told(request, await self._found(request)))

    async def cancel(self, request: Request) -> Response:
        """Also of one that was cancelled before, and is over by now."""
        batch_id = _own_id(request.path_params["batch_id"])
        try:
            batch = await self._desk.cancel(account_of(request).id, batch_id, dialect="anthropic")
        except Conflict:
            batch = await self._found(request)
            if batch.state is not State.CANCELLED:
                raise
        self._batches.wake()
        return json_reply(self._told(request, batch))

    async def delete(self, request: Request) -> Response:
        """With its files, which nobody else knows of."""
        batch = await self._found(request)
        await self._desk.delete(batch.project, batch.id, dialect="anthropic")
        for file_id in filter(None, (batch.input_file, batch.output_file, batch.error_file)):
            try:
                await self._files.delete(batch.project, file_id)
            except NotFound:
                continue  # its time was over
        return json_reply(wire.Deleted(id=wire.shown_id(batch.id)))

    async def results(self, request: Request) -> Response:
        batch = await self._found(request)
        if wire.status_of(batch) != "ended":
            raise Conflict(f"The batch {wire.shown_id(batch.id)} has no results yet: it has not ended.")
        if batch.state is State.FAILED:
            told = self._failed(batch)
        else:
            files = [await self._file(batch, file_id) for file_id in (batch.output_file, batch.error_file) if file_id]
            told = self._results(batch, files)
        return StreamingResponse(told, media_type="application/x-jsonl")

    def _checked(self, content: bytes) -> list[Item]:
        """Raises: InvalidRequest, PayloadTooLarge. What is wrong inside a request becomes its result."""
        try:
            items = msgspec.json.decode(content, type=BatchBody).requests
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(f"The body is no batch of requests: {str(error)[:200]}.", param="requests") from error
        limit = self._batches.settings.lines
        if not 0 < len(items) <= limit:
            raise InvalidRequest(f"There may be 1 to {limit} requests; here are {len(items)}.", param="requests")
        seen: set[str] = set()
        for number, item in enumerate(items):
            where = f"requests[{number}]"
            if not _CUSTOM_ID.fullmatch(item.custom_id) or item.custom_id in seen:
                raise InvalidRequest(
                    f"`{where}.custom_id` must have 1 to 64 letters, digits, _ or -, and be the only one of its name.",
                    param=f"{where}.custom_id",
                )
            seen.add(item.custom_id)
            if bytes(item.params).lstrip()[:1] != b"{":
                raise InvalidRequest(f"`{where}.params` must be an object.", param=f"{where}.params")
            size = len(_line(item))
            if size > self._batches.settings.line_bytes:
                raise PayloadTooLarge(have=size, limit=self._batches.settings.line_bytes, what=f"request {where}")
        return items

    async def _keep(self, account: Account, items: list[Item]) -> File:
        async def lines() -> AsyncGenerator[bytes, None]:
            for item in items:
                yield _line(item) + b"\n"

        stored = await self._files.receive(lines())
        try:
            return await self._files.keep(
                account, stored, filename="message_batch.jsonl", purpose="batch", expires_s=KEPT_S
            )
        except NimbosError as error:
            await self._files.forget(stored, after=error)
            raise

    async def _found(self, request: Request) -> Batch:
        batch_id = _own_id(request.path_params["batch_id"])
        return await self._desk.get(account_of(request).id, batch_id, dialect="anthropic")

    async def _file(self, batch: Batch, file_id: str) -> File:
        return await self._files.get(batch.project, file_id)

    def _told(self, request: Request, batch: Batch) -> wire.MessageBatch:
        count = int((batch.metadata or {}).get(_COUNT, batch.total))
        return wire.told(batch, count=count, base_url=str(request.base_url))

    async def _results(self, batch: Batch, files: list[File]) -> AsyncGenerator[bytes, None]:
        for file in files:
            async for line in _lines(self._files.read(file)):
                yield wire.result_of(line)
        if batch.state in (State.CANCELLED, State.EXPIRED):
            async for number, line in self._input(batch):
                if number > batch.validated_lines:
                    yield wire.unread_of(batch, line)

    async def _failed(self, batch: Batch) -> AsyncGenerator[bytes, None]:
        """No request was good, so nothing was asked: the reasons stand with the batch."""
        reasons = {fault.line: fault.message for fault in batch.errors}
        async for number, line in self._input(batch):
            yield wire.fault_of(line, reasons.get(number, "The batch failed."))

    async def _input(self, batch: Batch) -> AsyncGenerator[tuple[int, bytes], None]:
        """The requests, counted from 1."""
        number = 0
        async for line in _lines(self._files.read(await self._file(batch, batch.input_file))):
            number += 1
            yield number, line


def _line(item: Item) -> bytes:
    """One line: line ends in JSON stand between its values only, where a space does as well."""
    params = bytes(item.params).replace(b"\n", b" ").replace(b"\r", b" ")
    return b'{"custom_id":"%b","method":"POST","url":"%b","body":%b}' % (
        item.custom_id.encode(),
        PATH.encode(),
        params,
    )


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    held: list[bytes] = []
    async for piece in pieces:
        *whole, rest = piece.split(b"\n")
        for end in whole:
            yield b"".join([*held, end])
            held.clear()
        held.append(rest)


def _own_id(shown: str) -> str:
    """Raises: NotFound for what is no id of such a batch."""
    if not shown.startswith(wire.PREFIX):
        raise NotFound(f"There is no message batch {shown[:100]!r} in this project.")
    return f"batch_{shown.removeprefix(wire.PREFIX)}"
