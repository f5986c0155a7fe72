"""The statements on batches and their lines, both written for both databases."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Executable,
    Integer,
    Text,
    bindparam,
    case,
    delete,
    func,
    literal_column,
    not_,
    null,
    or_,
    select,
    update,
)
from sqlalchemy import text as sql

from nimbos.batches.words import LEGAL, State
from nimbos.db import Dialect, Statement, insert
from nimbos.db.tables.accounts import projects
from nimbos.db.tables.batches import batch_lines, batches


def _at(name: str) -> BindParameter[int]:
    return bindparam(name, type_=BigInteger)


def _text(name: str) -> BindParameter[str]:
    return bindparam(name, type_=Text)


# --- batches

ADD = insert(batches)
GET = Statement(select(batches).where(batches.c.id == _text("id")))
LOCK = Statement(select(batches).where(batches.c.id == _text("id")).with_for_update())
_OWN = (batches.c.project == _text("project"), batches.c.dialect == _text("dialect"))
GET_OWN = Statement(select(batches).where(batches.c.id == _text("id"), *_OWN))
LIST = Statement(
    select(batches)
    .where(*_OWN, or_(_text("after") == "", batches.c.id < _text("after")))
    .order_by(batches.c.id.desc())
    .limit(bindparam("limit", type_=Integer))
)
LIST_BACK = Statement(
    select(batches)
    .where(*_OWN, batches.c.id > _text("before"))
    .order_by(batches.c.id)
    .limit(bindparam("limit", type_=Integer))
)


def _move(to: State) -> Statement:
    """Only from where it is legal; no row comes back otherwise."""
    return Statement(
        update(batches)
        .where(
            batches.c.id == _text("id"),
            or_(*[batches.c.state == before.value for before in LEGAL if to in LEGAL[before]]),
        )
        .values({"state": to.value, f"{to.value}_ms": _at("now_ms")})
        .returning(*batches.c)
    )


OPEN = Statement(
    select(func.count().label("open")).where(
        batches.c.project == _text("project"), or_(*[batches.c.state == state.value for state in LEGAL if LEGAL[state]])
    )
)
MOVE: dict[State, Statement] = {to: _move(to) for to in State if to is not State.VALIDATING}
DELETE = Statement(delete(batches).where(batches.c.id == _text("id")))
END = Statement(update(batches).where(batches.c.id == _text("id")).values(ending=_text("how")))
GIVE = Statement(
    update(batches)
    .where(batches.c.id == _text("id"))
    .values(
        output_file=_text("output"),
        error_file=_text("error"),
        failed=batches.c.failed + _at("left"),
        waiting_for=null(),
        waiting_until_ms=0,
    )
)
FAULTS = Statement(update(batches).where(batches.c.id == _text("id")).values(errors=_text("faults")))
PROGRESS = Statement(
    update(batches)
    .where(batches.c.id == _text("id"))
    .values(
        total=batches.c.total + _at("more"),
        failed=batches.c.failed + _at("bad"),
        validated_lines=_at("lines"),
        validated_bytes=_at("bytes"),
    )
)
COUNT = Statement(
    update(batches)
    .where(batches.c.id == _text("id"))
    .values(
        completed=batches.c.completed + _at("good"),
        failed=batches.c.failed + _at("bad"),
        waiting_for=case((batches.c.waiting_until_ms <= _at("now_ms"), null()), else_=batches.c.waiting_for),
    )
    .returning(*batches.c)
)
WAIT = Statement(
    update(batches)
    .where(batches.c.id == _text("id"))
    .values(waiting_for=_text("limit_told"), waiting_until_ms=_at("until_ms"))
)


def _ready() -> Statement:
    """The oldest batches of every project, in turn: many of one do not keep those of another from being looked at."""
    turn = func.row_number().over(partition_by=batches.c.project, order_by=batches.c.id).label("turn")
    waiting = (
        select(batches.c.id, batches.c.project, turn)
        .where(batches.c.state == State.IN_PROGRESS.value, batches.c.waiting_until_ms <= _at("now_ms"))
        .subquery()
    )
    return Statement(
        select(waiting.c.id, waiting.c.project, func.coalesce(projects.c.weight, literal_column("1.0")).label("weight"))
        .outerjoin(projects, projects.c.id == waiting.c.project)
        .order_by(waiting.c.turn, waiting.c.id)
        .limit(bindparam("limit", type_=Integer))
    )


READY = _ready()
LAPSED = Statement(
    select(batches.c.id).where(
        or_(batches.c.state == State.VALIDATING.value, batches.c.state == State.IN_PROGRESS.value),
        batches.c.expires_ms <= _at("now_ms"),
    )
)

# --- lines


_GOOD = "number, custom_id, unique_id, start_byte, size_bytes, state"
_BAD = "number, custom_id, start_byte, size_bytes, state, error_code, error_message"


def _adding_good(dialect: Dialect) -> Executable:
    number, start, size = (_item(at, dialect, "bigint") for at in (0, 2, 3))
    custom = _item(1, dialect)
    return _adding(_GOOD, f"{number}, {custom}, {custom}, {start}, {size}, 'waiting'", dialect)


def _adding_bad(dialect: Dialect) -> Executable:
    number, start, size = (_item(at, dialect, "bigint") for at in (0, 2, 3))
    custom, code, message = (_item(at, dialect) for at in (1, 4, 5))
    return _adding(_BAD, f"{number}, {custom}, {start}, {size}, 'failed', {code}, {message}", dialect)


def _adding(columns: str, values: str, dialect: Dialect) -> Executable:
    """Rows from one JSON list of lists; those come back that had no namesake before."""
    each = "json_each(:rows)" if dialect == "sqlite" else "json_array_elements(CAST(:rows AS json))"
    statement = sql(
        f"INSERT INTO batch_lines (batch, {columns}) SELECT :batch, {values} "  # noqa: S608 constants
        f"FROM {each} AS item WHERE true ON CONFLICT DO NOTHING RETURNING number"
    )
    return statement.bindparams(_text("batch"), _text("rows"))


def _item(at: int, dialect: Dialect, kind: str = "") -> str:
    return (
        f"json_extract(item.value, '$[{at}]')"
        if dialect == "sqlite"
        else f"CAST(item.value->>{at} AS {kind or 'text'})"
    )


ADD_GOOD = Statement(_adding_good)
ADD_BAD = Statement(_adding_bad)
_LINE = (batch_lines.c.batch == _text("batch"), batch_lines.c.number == _at("number"))
GET_LINE = Statement(select(batch_lines).where(*_LINE))
SETTLE = Statement(
    update(batch_lines)
    .where(*_LINE, batch_lines.c.state == "waiting")
    .values(
        state=_text("how"),
        status=bindparam("code", type_=Integer),
        request_id=_text("ask"),
        answer=bindparam("body", type_=batch_lines.c.answer.type),
        error_code=_text("fault"),
        error_message=_text("message"),
    )
    .returning(batch_lines.c.number)
)


def _each_line(*, answered: bool) -> Statement:
    done = batch_lines.c.state == "done"
    return Statement(
        select(batch_lines)
        .where(batch_lines.c.batch == _text("batch"), done if answered else not_(done))
        .order_by(batch_lines.c.number)
    )


ANSWERED = _each_line(answered=True)
NOT_ANSWERED = _each_line(answered=False)
LEFT = Statement(
    select(func.count().label("left")).where(batch_lines.c.batch == _text("batch"), batch_lines.c.state == "waiting")
)
FAILURES = Statement(
    select(batch_lines.c.number, batch_lines.c.error_code, batch_lines.c.error_message)
    .where(batch_lines.c.batch == _text("batch"), batch_lines.c.state == "failed")
    .order_by(batch_lines.c.number)
    .limit(bindparam("limit", type_=Integer))
)
LAST = Statement(select(func.max(batch_lines.c.number).label("last")).where(batch_lines.c.batch == _text("batch")))
DELETE_BELOW = Statement(
    delete(batch_lines).where(batch_lines.c.batch == _text("batch"), batch_lines.c.number < _at("number"))
)
