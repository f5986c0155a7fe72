"""The programs that projects have: uploaded whole, found by name or hash, unpacked for the workers that run them.

Which project has which is a row; the bytes are in `blobs`, under the program's own hash, for good: logs name them, and
another program may have the same ones as a part (`program.py`), which has no row.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Integer, Text, bindparam, delete, func, literal_column, select

from nimbos.accounts import CODE_SCOPE
from nimbos.blobs import Blobs
from nimbos.db import Database, Statement, Transaction, upsert
from nimbos.db.tables.processes import processes
from nimbos.db.tables.programs import programs
from nimbos.errors import Conflict, Forbidden, NotFound, PayloadTooLarge
from nimbos.kernel.package import unpack
from nimbos.kernel.program import File, Program, part_contents, program_of, read_program
from nimbos.kernel.unpacked import unpacked
from nimbos.types import Account, new_id

__all__ = ["File", "Listed", "Program", "Programs"]

PROJECT_BYTES_MAX = 4 << 30

_ROW_BYTES = 1_024  # what a program costs besides its own bytes, at most
_KEPT = 64
_LAST = "put_g"  # behind all ids
_HASH = re.compile(r"[0-9a-f]{64}")
_SHORT = re.compile(r"[0-9a-f]{8,63}")
_WORD = re.compile(r"[0-9A-Za-z.@+-]{1,200}")  # names, versions and hashes have no other characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A row: what a list shows. `created_ms`: when the project had it first."""

    hash: str
    name: str
    version: str
    python: bool
    size_bytes: int
    created_ms: int


class Programs:
    def __init__(self, database: Database, blobs: Blobs, root: Path) -> None:
        """`root`: the folder for unpacked programs; made when it is needed."""
        self._database = database
        self._blobs = blobs
        self._root = root
        self._kept: OrderedDict[str, Program] = OrderedDict()

    async def put(self, account: Account, files: Mapping[str, bytes]) -> Program:
        """The project has it from now on; the same files again are the same program.

        Raises: BrokenProgram, PayloadTooLarge, Forbidden for Python without the scope, StorageUnavailable.
        """
        program, content = await asyncio.to_thread(program_of, files)
        if program.python and CODE_SCOPE not in account.scopes:
            raise Forbidden(
                f"The program {program.name!r} brings Python, which runs on this machine: its upload needs a key with "
                f"the scope {CODE_SCOPE!r}, as owners and admins have."
            )
        for part in await asyncio.to_thread(part_contents, files):
            await self._blobs.put(part)
        await self._blobs.put(content)
        await self._database.run(lambda: _record(account.id, program), durable=True)
        return program

    async def remove(self, account: str, wanted: str) -> str:
        """The project has it no more: its id. Processes that are over keep it, to be replayed and forked.

        Raises: NotFound; Conflict while a process of it, or of a part of it, is not over.
        """
        hash = await self.find(account, wanted)
        program = await self.load(hash)
        await self._database.run(lambda: _forget(account, program), durable=True)
        return hash

    async def load(self, hash: str) -> Program:
        """Whoever's it is: who may run it was asked when it was spawned. Raises: NotFound, StorageUnavailable."""
        if hash not in self._kept:
            content = await self._content(hash)
            self._kept[hash] = await asyncio.to_thread(read_program, content)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(hash)
        return self._kept[hash]

    async def folder(self, program: Program) -> Path:
        """The program's files, read-only, for its worker. Made anew if they were deleted or changed.

        Raises: StorageUnavailable, NotFound.
        """
        content = await self._content(program.hash)
        hashes = {file.path: file.sha256 for file in program.files}
        return await asyncio.to_thread(unpacked, self._root, program.hash, hashes, lambda: unpack(content))

    async def file(self, program: Program, path: str) -> bytes:
        """Raises: NotFound for a file that it does not have."""
        if all(file.path != path for file in program.files):
            raise NotFound(f"The program {program.name!r} has no file {path[:100]!r}.")
        return unpack(await self._content(program.hash))[path]

    async def find(self, account: str, wanted: str, *, inside: Program | None = None) -> str:
        """The hash of what a word names: a part of the program `inside`, a hash or the beginning of one, or the name of
        the project's program (the one uploaded last), also as `name@version`. Raises: NotFound."""
        if inside is not None and wanted in inside.parts:
            return inside.parts[wanted]
        name, _, version = wanted.partition("@")
        rows = []
        if _HASH.fullmatch(wanted):
            rows = await self._database.read(_BY_HASH(account=account, hash=wanted))
        elif _WORD.fullmatch(wanted):
            rows = await self._database.read(_BY_NAME(account=account, name=name, version=version))
            if not rows and _SHORT.fullmatch(wanted):
                rows = await self._database.read(_BY_START(account=account, start=wanted, after=f"{wanted}g"))
        if not rows:
            parts = f" Its parts: {', '.join(inside.parts)}." if inside is not None and inside.parts else ""
            raise NotFound(f"There is no program {wanted[:100]!r} here.{parts}", param="program")
        return str(rows[0]["hash"])

    async def list(self, account: str, *, after: str = "", limit: int = 100) -> list[Listed]:
        """Last uploaded first. `after`: a hash of the list. Raises: NotFound when it has none such."""
        before = _LAST
        if after:
            rows = await self._database.read(_BY_HASH(account=account, hash=after)) if _HASH.fullmatch(after) else []
            if not rows:
                raise NotFound(f"There is no program {after[:100]!r} here.", param="after")
            before = rows[0]["put_id"]
        rows = await self._database.read(_PAGE(account=account, before=before, limit=limit))
        return [
            Listed(
                hash=row["hash"],
                name=row["name"],
                version=row["version"],
                python=bool(row["python"]),
                size_bytes=row["size_bytes"],
                created_ms=row["created_ms"],
            )
            for row in rows
        ]

    async def _content(self, hash: str) -> bytes:
        try:
            return await self._blobs.get(hash)
        except NotFound as error:
            raise NotFound(f"There is no program {hash[:64]!r}.", param="program") from error


def _record(account: str, program: Program) -> Transaction[None]:
    now_ms = time.time_ns() // 1_000_000
    yield _PUT(
        account=account,
        hash=program.hash,
        put_id=new_id("put"),
        name=program.name,
        version=program.version,
        python=int(program.python),
        size_bytes=program.size_bytes,
        created_ms=now_ms,
    )
    (row,) = yield _TOTAL(account=account)
    if row["total"] > PROJECT_BYTES_MAX:
        raise PayloadTooLarge(have=int(row["total"]), limit=PROJECT_BYTES_MAX, what="project's programs")


def _forget(account: str, program: Program) -> Transaction[None]:
    """Raises: Conflict, NotFound."""
    for hash in (program.hash, *program.parts.values()):
        rows = yield _LIVING(account=account, program=hash)
        if rows:
            raise Conflict(
                f"The program {program.name!r} ({program.hash[:12]}) is in use: {rows[0]['id']} is not over."
            )
    if not (yield _FORGET(account=account, hash=program.hash)):
        raise NotFound(f"There is no program {program.hash[:100]!r} here.", param="program")


_ACCOUNT = programs.c.account == bindparam("account", type_=Text)
_PUT = upsert(programs, key=("account", "hash"), set=("put_id",))
_TOTAL = Statement(select(func.sum(programs.c.size_bytes + _ROW_BYTES).label("total")).where(_ACCOUNT))
_BY_HASH = Statement(select(programs).where(_ACCOUNT, programs.c.hash == bindparam("hash", type_=Text)))
_VERSION = bindparam("version", type_=Text)
_BY_NAME = Statement(
    select(programs.c.hash)
    .where(
        _ACCOUNT,
        programs.c.name == bindparam("name", type_=Text),
        (_VERSION == "") | (programs.c.version == _VERSION),
    )
    .order_by(programs.c.put_id.desc())
    .limit(1)
)
_BY_START = Statement(
    select(programs.c.hash)
    .where(
        _ACCOUNT,
        programs.c.hash > bindparam("start", type_=Text),
        programs.c.hash < bindparam("after", type_=Text),
    )
    .order_by(programs.c.put_id.desc())
    .limit(1)
)
_THIS = programs.c.hash == bindparam("hash", type_=Text)
_FORGET = Statement(delete(programs).where(_ACCOUNT, _THIS).returning(programs.c.hash))
_MADE_OF = processes.c.program == bindparam("program", type_=Text)
_LIVING = Statement(
    select(processes.c.id)
    .where(processes.c.account == bindparam("account", type_=Text), _MADE_OF, literal_column("state != 'done'"))
    .limit(1)
)
_PAGE = Statement(
    select(programs)
    .where(_ACCOUNT, programs.c.put_id < bindparam("before", type_=Text))
    .order_by(programs.c.put_id.desc())
    .limit(bindparam("limit", type_=Integer))
)
