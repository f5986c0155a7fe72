"""The end of a batch: its lines become an output file and an error file, in the input's order.

Files are made from rows that nothing changes any more, so a crash in between makes the same files again. Lines that
were never answered are rows of the error file, which say why.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import cast

import msgspec

from nimbos.batches import rows
from nimbos.batches.contents import Contents, Received
from nimbos.batches.desk import lines_of
from nimbos.batches.files import Files, made
from nimbos.batches.orphans import given_back
from nimbos.batches.words import Batch, State
from nimbos.db import Database, Row, Statement, Transaction
from nimbos.types import id_at
from nimbos.work import Claim, Work

OUTPUT_PURPOSE = "batch_output"
CANCEL_PATIENCE_MS = 30_000  # lines that are being answered may finish for so long
LOOK_AGAIN_S = 0.25
_ROWS_AT_ONCE = 50  # each holds a whole answer
_REMOVED_AT_ONCE = 1_000
_OUTPUT_BYTES_MAX = 1 << 40

_UNANSWERED = {
    "expired": ("batch_expired", "This line could not be answered before the completion window ended."),
    "cancelled": ("batch_cancelled", "The batch was cancelled before this line was answered."),
}


class Response(msgspec.Struct, kw_only=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(msgspec.Struct, kw_only=True):
    code: str
    message: str


class OutputLine(msgspec.Struct, kw_only=True):
    """One line of an output or error file, as OpenAI writes it."""

    id: str
    custom_id: str | None
    response: Response | None
    error: LineError | None


class Finishing:
    def __init__(self, database: Database, contents: Contents, work: Work, files: Files) -> None:
        self._database = database
        self._contents = contents
        self._work = work
        self._files = files

    async def run(self, batch: Batch, claim: Claim) -> bool:
        """False where lines are still being answered, and have time to. Raises: ClaimLost."""
        kind = lines_of(batch.id)
        since_ms = batch.at_ms[batch.state]
        held = await self._database.run(lambda: self._work.held(kind))
        if held and time.time_ns() // 1_000_000 - since_ms < CANCEL_PATIENCE_MS:
            return False
        await self._database.run(lambda: self._work.drop_all(kind))  # from here on no line is settled any more
        output = await self._written(batch, rows.ANSWERED, "output")
        errors = await self._written(batch, rows.NOT_ANSWERED, "error")
        await self._database.run(lambda: self._end(batch, claim, output, errors), durable=True)
        return True

    async def clean(self, batch_id: str, claim: Claim) -> None:
        """The answers are in files now, or the batch was deleted. Ends the job."""
        await self._database.run(lambda: self._work.drop_all(lines_of(batch_id)))
        (row,) = await self._database.read(rows.LAST(batch=batch_id))
        last = row["last"] or 0
        for below in range(_REMOVED_AT_ONCE, last + _REMOVED_AT_ONCE + 1, _REMOVED_AT_ONCE):
            await self._database.run(partial(_remove, batch_id, below))
        await self._database.run(lambda: self._work.finish(claim))

    async def _written(self, batch: Batch, query: Statement, what: str) -> Received | None:
        """None where there is no line."""
        lines = self._lines(batch, query)
        first = await anext(lines, None)
        if first is None:
            return None

        async def pieces() -> AsyncGenerator[bytes, None]:
            async with aclosing(lines):
                yield first
                async for line in lines:
                    yield line

        file_id = _file_id(batch, what)
        return await self._contents.store(file_id, pieces(), limit_bytes=_OUTPUT_BYTES_MAX)

    async def _lines(self, batch: Batch, query: Statement) -> AsyncGenerator[bytes, None]:
        found = self._database.stream(query(batch=batch.id), batch=_ROWS_AT_ONCE)
        async with aclosing(cast("AsyncGenerator[Row, None]", found)) as lines:
            async for row in lines:
                yield msgspec.json.encode(_line(batch, row)) + b"\n"

    def _end(self, batch: Batch, claim: Claim, output: Received | None, errors: Received | None) -> Transaction[None]:
        yield from self._work.check(claim)
        output_id = yield from self._keep(batch, output, "output")
        errors_id = yield from self._keep(batch, errors, "error")
        (row,) = yield rows.LEFT(batch=batch.id)
        left = row["left"] if batch.dialect == "openai" else 0  # Anthropic counts those as neither done nor failed
        yield rows.GIVE(id=batch.id, output=output_id, error=errors_id, left=left)
        yield rows.MOVE[State(batch.ending)](id=batch.id, now_ms=time.time_ns() // 1_000_000)

    def _keep(self, batch: Batch, received: Received | None, what: str) -> Transaction[str | None]:
        if received is None:
            return None
        file = made(
            batch.account,
            received,
            filename=f"{batch.id}_{what}.jsonl",
            purpose=OUTPUT_PURPOSE,
            expires_s=batch.output_expires_s,
        )
        yield from given_back(file.id)  # taken where a server died here and was away for long
        yield from self._files.record(batch.account, file, within_quota=False)
        return file.id


def _remove(batch_id: str, below: int) -> Transaction[None]:
    yield rows.DELETE_BELOW(batch=batch_id, number=below)


def _file_id(batch: Batch, what: str) -> str:
    """The same at every try, so that the same content is stored; sorted by the time at which the batch ended."""
    seed = hashlib.sha256(f"{batch.id} {what}".encode()).digest()
    return id_at("file", batch.at_ms[batch.state], seed)


def _line(batch: Batch, row: Row) -> OutputLine:
    line = OutputLine(
        id=f"batch_req_{batch.id.removeprefix('batch_')}_{row['number']}",
        custom_id=row["custom_id"],
        response=None,
        error=None,
    )
    if row["status"] is not None:
        line.response = Response(
            status_code=row["status"], request_id=row["request_id"], body=msgspec.Raw(bytes(row["answer"]))
        )
    elif row["state"] == "waiting":
        code, message = _UNANSWERED[batch.ending]
        line.error = LineError(code=code, message=message)
    else:
        line.error = LineError(code=row["error_code"], message=row["error_message"])
    return line
