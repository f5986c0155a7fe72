"""Statements: declared once in SQLAlchemy Core, compiled once for each database, run as plain strings.

Building and compiling a statement costs a hundred times what running it does, so a part declares its own at module
level and gives values at run time. Knows no connection; `database.py` runs what is made here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from operator import itemgetter
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from sqlalchemy import Executable, Table, bindparam
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.postgresql.asyncpg import dialect as asyncpg_dialect
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine.interfaces import Dialect as SqlDialect
from sqlalchemy.sql.compiler import SQLCompiler

Dialect = Literal["sqlite", "postgresql"]
Value: TypeAlias = int | str | bytes | float | None
T = TypeVar("T")


class Row(Protocol):
    """A row of a result, of either database."""

    def __getitem__(self, key: str | int, /) -> Any: ...

    def keys(self) -> Iterable[str]: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """`names`: the parameters in the order of their marks. `fixed`: those whose values the statement itself brings."""

    text: str
    names: tuple[str, ...]
    fixed: dict[str, Value]
    wanted: int
    pick: Callable[[dict[str, Value]], tuple[Value, ...]] = field(repr=False)

    def parameters(self, values: dict[str, Value]) -> tuple[Value, ...]:
        """Raises: TypeError for a name that is missing, or that the statement does not have."""
        if len(values) == self.wanted and not self.fixed:
            try:
                return self.pick(values)
            except KeyError:
                pass
        all_values = {**self.fixed, **values}
        if all_values.keys() != set(self.names):
            wrong = sorted(all_values.keys() ^ set(self.names))
            raise TypeError(f"Values missing or unknown: {', '.join(wrong)}, in {self.text}")
        return self.pick(all_values)


class Statement:
    """What to ask of a database; called with values by name (of `bindparam`), it is `Bound` and can be run."""

    __slots__ = ("_build", "_compiled")

    def __init__(self, build: Executable | Callable[[Dialect], Executable]) -> None:
        """`build`: the statement, or what makes it where the two databases write it differently."""
        self._build = build
        self._compiled: dict[Dialect, Compiled] = {}

    def __call__(self, **values: Value) -> Bound:
        return Bound(self, values)

    def compiled(self, dialect: Dialect) -> Compiled:
        found = self._compiled.get(dialect)
        if found is None:
            found = self._compiled[dialect] = _compile(self._build, dialect)
        return found


class Bound:
    """A statement with its values."""

    __slots__ = ("statement", "values")

    def __init__(self, statement: Statement, values: dict[str, Value]) -> None:
        self.statement = statement
        self.values = values

    def prepared(self, dialect: Dialect) -> tuple[str, tuple[Value, ...]]:
        """Text and parameters for the driver."""
        compiled = self.statement.compiled(dialect)
        return compiled.text, compiled.parameters(self.values)


# What runs as one: it yields statements and is sent their rows; what it returns is the result.
Transaction: TypeAlias = Generator[Bound, list[Row], T]


def insert(table: Table) -> Statement:
    """One row; every column is a parameter by its own name."""
    return Statement(table.insert().values(_own_parameters(table)))


def insert_ignored(table: Table, *, key: tuple[str, ...]) -> Statement:
    """One row, unless there is one with this key; add nothing then. All columns are parameters."""

    def build(dialect: Dialect) -> Executable:
        if dialect == "sqlite":
            return sqlite_insert(table).values(_own_parameters(table)).on_conflict_do_nothing(index_elements=key)
        return postgresql_insert(table).values(_own_parameters(table)).on_conflict_do_nothing(index_elements=key)

    return Statement(build)


def upsert(table: Table, *, key: tuple[str, ...], add: tuple[str, ...] = (), set: tuple[str, ...] = ()) -> Statement:
    """One row; where there is one with this key, the columns of `add` grow by their values, and those of `set` become
    them. All columns are parameters."""

    def build(dialect: Dialect) -> Executable:
        made = sqlite_insert(table) if dialect == "sqlite" else postgresql_insert(table)
        statement = made.values(_own_parameters(table))
        changes = {name: table.c[name] + statement.excluded[name] for name in add}
        changes |= {name: statement.excluded[name] for name in set}
        return statement.on_conflict_do_update(index_elements=key, set_=changes)

    return Statement(build)


class ManyRows:
    """Several rows in one statement, which costs a round trip or a walk of the library once. Called with the rows, all
    columns by name; compiled once for each number of rows, so use it where that number is small."""

    __slots__ = ("_add", "_key", "_made", "_table")

    def __init__(self, table: Table, *, key: tuple[str, ...] = (), add: tuple[str, ...] = ()) -> None:
        """With `key`, the columns of `add` grow by their values where there is a row with this key already; no two
        rows of one call have the same."""
        self._table = table
        self._key = key
        self._add = add
        self._made: dict[int, Statement] = {}

    def __call__(self, rows: Sequence[dict[str, Value]]) -> Bound:
        statement = self._made.get(len(rows))
        if statement is None:
            statement = self._made[len(rows)] = Statement(partial(self._build, len(rows)))
        return Bound(statement, {f"{name}_{at}": value for at, row in enumerate(rows) for name, value in row.items()})

    def _build(self, count: int, dialect: Dialect) -> Executable:
        table = self._table
        made = sqlite_insert(table) if dialect == "sqlite" else postgresql_insert(table)
        statement = made.values([_own_parameters(table, suffix=f"_{at}") for at in range(count)])
        if not self._key:
            return statement
        changes = {name: table.c[name] + statement.excluded[name] for name in self._add}
        return statement.on_conflict_do_update(index_elements=self._key, set_=changes)


def _own_parameters(table: Table, *, suffix: str = "") -> dict[str, Any]:
    return {column.name: bindparam(f"{column.name}{suffix}", type_=column.type) for column in table.columns}


def _compile(build: Executable | Callable[[Dialect], Executable], dialect: Dialect) -> Compiled:
    statement: Any = build(dialect) if callable(build) else build
    compiled = statement.compile(dialect=_sql_dialect(dialect), compile_kwargs={"render_postcompile": True})
    assert isinstance(compiled, SQLCompiler)
    names = tuple(compiled.positiontup or ())
    # What has a value already: literals, and the OFFSET that SQLite's dialect adds to a LIMIT.
    binds = compiled.binds
    fixed = {name: compiled.params[name] for name in names if name not in binds or not binds[name].required}
    return Compiled(
        text=str(compiled),
        names=names,
        fixed=fixed,
        wanted=len(set(names)),
        pick=_picker(names),
    )


def _picker(names: tuple[str, ...]) -> Callable[[dict[str, Value]], tuple[Value, ...]]:
    if len(names) > 1:
        return itemgetter(*names)
    return lambda values: tuple(values[name] for name in names)


@cache
def _sql_dialect(dialect: Dialect) -> SqlDialect:
    """One of each: it remembers how it writes a type, which is a third of compiling."""
    if dialect == "sqlite":
        return sqlite_dialect(paramstyle="qmark")
    return asyncpg_dialect()  # type: ignore[no-untyped-call]
