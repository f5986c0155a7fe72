"""From an input file to lines that can be answered: read once, in bounded memory, in blocks that are each kept whole.

A block's lines, how far the file was read and the work they make are one transaction, so a crash costs a block at most.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

import msgspec

from nimbos.batches import rows
from nimbos.batches.contents import Contents
from nimbos.batches.desk import lines_of
from nimbos.batches.lines import Bad, Checker, Good, Piece, Splitter, duplicate
from nimbos.batches.words import Batch, Fault, State
from nimbos.config import BatchSettings
from nimbos.db import Database, Transaction
from nimbos.errors import NotFound
from nimbos.work import Claim, Work

_BLOCK_LINES = 500
_BLOCK_BYTES = 4 * 1024 * 1024
_FAULTS_TOLD = 100


class Validating:
    def __init__(self, database: Database, contents: Contents, work: Work, settings: BatchSettings) -> None:
        self._database = database
        self._contents = contents
        self._work = work
        self._settings = settings

    async def run(self, batch: Batch, claim: Claim, *, file_bytes: int) -> bool:
        """Goes on where it was interrupted. True when the batch is in progress, and the claim ended with that;
        otherwise it failed, or somebody ended it.

        Raises: ClaimLost.
        """
        checker = Checker(endpoint=batch.endpoint, file_bytes=file_bytes, line_bytes=self._settings.line_bytes)
        fault = Fault(code="missing_file", message="The content of the input file is gone.", param="input_file_id")
        try:
            async with aclosing(self._blocks(batch, checker)) as blocks:
                async for block in blocks:
                    if not await self._database.run(partial(self._keep, batch, claim, block)):
                        return False
        except NotFound:
            await self._database.run(lambda: self._fail(batch, claim, [fault]))
            return False
        return await self._database.run(lambda: self._begin(batch, claim), durable=True)

    async def _blocks(self, batch: Batch, checker: Checker) -> AsyncGenerator[Block, None]:
        splitter = Splitter(
            line_bytes=self._settings.line_bytes,
            next_byte=batch.validated_bytes,
            next_number=batch.validated_lines + 1,
        )
        block = Block(splitter)
        contents = self._contents.read(batch.input_file, batch.input_blob, start=batch.validated_bytes)
        async with aclosing(contents) as pieces:
            async for content in pieces:
                for piece in splitter.feed(content):
                    block.add(piece, checker)
                    if block.full:
                        yield block.closed()
                        block = Block(splitter)
        for piece in splitter.finish():
            block.add(piece, checker)
        yield block.closed()

    def _keep(self, batch: Batch, claim: Claim, block: Block) -> Transaction[bool]:
        """False when the batch is not being validated any more."""
        yield from self._work.check(claim)
        (row,) = yield rows.LOCK(id=batch.id)
        if row["state"] != State.VALIDATING:
            return False
        if row["total"] + len(block.lines) > self._settings.lines:
            message = f"A batch may have at most {self._settings.lines:,} lines; this file has more."
            yield from self._fail(batch, claim, [Fault(code="too_many_lines", message=message)])
            return False
        bad = block.bad
        if block.good:
            listed = [[line.number, line.custom_id, line.start_byte, line.size_bytes] for line in block.good]
            kept = yield rows.ADD_GOOD(batch=batch.id, rows=msgspec.json.encode(listed).decode())
            fresh = {row["number"] for row in kept}
            bad = [*bad, *(duplicate(line) for line in block.good if line.number not in fresh)]
            yield from self._work.add_many(lines_of(batch.id), [f"{number:08}" for number in sorted(fresh)])
        if bad:
            listed = [[b.number, b.custom_id, b.start_byte, b.size_bytes, b.code, b.message] for b in bad]
            yield rows.ADD_BAD(batch=batch.id, rows=msgspec.json.encode(listed).decode())
        yield rows.PROGRESS(
            id=batch.id, more=len(block.lines), bad=len(bad), lines=block.last_number, bytes=block.next_byte
        )
        return True

    def _begin(self, batch: Batch, claim: Claim) -> Transaction[bool]:
        (row,) = yield rows.LOCK(id=batch.id)
        if row["state"] != State.VALIDATING:
            return False
        if row["total"] == row["failed"]:
            faults = yield from self._faults(batch)
            yield from self._fail(batch, claim, faults)
            return False
        yield rows.MOVE[State.IN_PROGRESS](id=batch.id, now_ms=time.time_ns() // 1_000_000)
        yield from self._work.finish(claim)
        return True

    def _faults(self, batch: Batch) -> Transaction[list[Fault]]:
        found = yield rows.FAILURES(batch=batch.id, limit=_FAULTS_TOLD)
        if not found:
            return [Fault(code="empty_file", message="The input file has no lines.", param="input_file_id")]
        return [Fault(code=row["error_code"], message=row["error_message"], line=row["number"]) for row in found]

    def _fail(self, batch: Batch, claim: Claim, faults: list[Fault]) -> Transaction[None]:
        """Nothing of it was asked; the job's claim stays, for cleaning up."""
        yield from self._work.check(claim)
        yield rows.MOVE[State.FAILED](id=batch.id, now_ms=time.time_ns() // 1_000_000)
        yield rows.FAULTS(id=batch.id, faults=msgspec.json.encode(faults).decode())


class Block:
    """Some lines of the file, one after the other. `next_byte`, `last_number`: how far the file was read with them."""

    def __init__(self, splitter: Splitter) -> None:
        self._splitter = splitter
        self._bytes = 0
        self.lines: list[Good | Bad] = []
        self.next_byte = splitter.next_byte
        self.last_number = splitter.next_number - 1

    def add(self, piece: Piece, checker: Checker) -> None:
        self.lines.append(checker.check(piece))
        self._bytes += piece.size_bytes

    @property
    def full(self) -> bool:
        return len(self.lines) >= _BLOCK_LINES or self._bytes >= _BLOCK_BYTES

    @property
    def good(self) -> list[Good]:
        return [line for line in self.lines if isinstance(line, Good)]

    @property
    def bad(self) -> list[Bad]:
        return [line for line in self.lines if isinstance(line, Bad)]

    def closed(self) -> Block:
        """Notes how far the file was read, before more of it is."""
        self.next_byte = self._splitter.next_byte
        self.last_number = self._splitter.next_number - 1
        return self
