"""Projects: made, changed, archived; which models they may ask. Every change is a transaction for `audited`."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace

import msgspec
from sqlalchemy import Executable, Float, Text, bindparam, func, select, update
from sqlalchemy import text as sql

from nimbos.accounts.words import DEFAULT_PROJECT, ORGANISATION_ID, Changed, ModelMode, Project, encoded
from nimbos.db import Bound, Dialect, Statement, Transaction, insert
from nimbos.db.tables.accounts import projects
from nimbos.errors import Conflict, InvalidRequest, NotFound
from nimbos.types import new_id

NAME_CHARACTERS_MAX = 200
LIST_MAX = 1000  # ids in a list of models or routes
WEIGHT_MIN, WEIGHT_MAX = 0.01, 100.0

INSERT = insert(projects)
BY_ID = Statement(select(projects).where(projects.c.id == bindparam("wanted")))
BY_NAME = Statement(select(projects).where(projects.c.live_name == bindparam("wanted")))
ARCHIVED_BY_NAME = Statement(
    select(projects)
    .where(projects.c.name == bindparam("wanted"), projects.c.archived_ms.is_not(None))
    .order_by(projects.c.id.desc())
    .limit(1)
)
PAGE = Statement(
    select(projects)
    .where(projects.c.id > bindparam("after"), (projects.c.archived_ms.is_(None)) | (bindparam("archived") == 1))
    .order_by(projects.c.id)
    .limit(bindparam("most"))
)
COUNT = Statement(select(func.count().label("count")).select_from(projects).where(projects.c.archived_ms.is_(None)))
_CHANGE = Statement(
    update(projects)
    .where(projects.c.id == bindparam("of"))
    .values(
        name=bindparam("to_name"),
        live_name=bindparam("to_live_name"),
        model_mode=bindparam("to_mode"),
        models=bindparam("to_models"),
        weight=bindparam("to_weight"),
        archived_ms=bindparam("to_archived"),
    )
)


def _weighing(dialect: Dialect) -> Executable:
    each = "json_each(:ids)" if dialect == "sqlite" else "json_array_elements_text(CAST(:ids AS json))"
    statement = sql(f"SELECT id, weight FROM projects WHERE id IN (SELECT item.value FROM {each} AS item)")  # noqa: S608
    return statement.bindparams(bindparam("ids", type_=Text)).columns(id=Text, weight=Float)


_WEIGHTS = Statement(_weighing)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectChange:
    """None leaves as it is."""

    name: str | None = None
    weight: float | None = None


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def project_weights(project_ids: Collection[str]) -> Transaction[dict[str, float]]:
    """By id; a project that is not there is left out."""
    rows = yield _WEIGHTS(ids=msgspec.json.encode(list(project_ids)).decode())
    return {str(row["id"]): float(row["weight"]) for row in rows}


def live_project(project_id: str) -> Transaction[Project]:
    """Raises: NotFound; Conflict for an archived one."""
    project = yield from any_project(project_id)
    if project.archived_ms is not None:
        raise Conflict(f"The project {project.name!r} is archived; it cannot be changed or used any more.")
    return project


def any_project(project_id: str) -> Transaction[Project]:
    rows = yield BY_ID(wanted=project_id)
    if not rows:
        raise NotFound(f"There is no project {project_id[:100]!r}. `nimbos project list` shows those there are.")
    return Project.of(rows[0])


def create_project(name: str, *, weight: float = 1.0, project_id: str | None = None) -> Transaction[Changed[Project]]:
    """Raises: Conflict when there is one of this name; InvalidRequest."""
    yield from _check_free(name)
    project = Project(
        id=project_id or new_id("proj"),
        name=name,
        model_mode="",
        models=(),
        weight=checked_weight(weight),
        created_ms=now_ms(),
        archived_ms=None,
    )
    yield INSERT(
        id=project.id,
        organisation=ORGANISATION_ID,
        name=project.name,
        live_name=project.name,
        model_mode=project.model_mode,
        models="[]",
        weight=project.weight,
        created_ms=project.created_ms,
        archived_ms=None,
    )
    return Changed(value=project, action="project.created", target=project.id, project=project.id, after=project)


def update_project(project_id: str, change: ProjectChange) -> Transaction[Changed[Project]]:
    before = yield from live_project(project_id)
    after = before
    if change.name is not None and change.name != before.name:
        yield from _check_free(change.name)
        after = replace(after, name=change.name)
    if change.weight is not None:
        after = replace(after, weight=checked_weight(change.weight))
    yield _changed(after)
    return Changed(
        value=after, action="project.updated", target=project_id, project=project_id, before=before, after=after
    )


def archive_project(project_id: str) -> Transaction[Changed[Project]]:
    """Its keys die with it; its usage stays. It cannot be undone, and its name is free again."""
    before = yield from live_project(project_id)
    if project_id == DEFAULT_PROJECT:
        raise Conflict("The default project is the owner's key's; it cannot be archived.")
    after = replace(before, archived_ms=now_ms())
    yield _changed(after)
    return Changed(
        value=after, action="project.archived", target=project_id, project=project_id, before=before, after=after
    )


def set_models(project_id: str, mode: ModelMode, models: tuple[str, ...]) -> Transaction[Changed[Project]]:
    """Which models the project may ask: those named, or all but those named; with "" all.

    Raises: InvalidRequest.
    """
    before = yield from live_project(project_id)
    after = replace(before, model_mode=mode, models=checked_names(models, "model_ids") or ())
    yield _changed(after)
    return Changed(
        value=after,
        action="model_permissions.updated" if mode else "model_permissions.deleted",
        target=project_id,
        project=project_id,
        before={"mode": before.model_mode, "models": before.models},
        after={"mode": after.model_mode, "models": after.models},
    )


def _check_free(name: str) -> Transaction[None]:
    checked_name(name)
    if (yield BY_NAME(wanted=name)):
        raise Conflict(f"There is a project named {name!r} already. Choose another name, or archive that one.")


def _changed(project: Project) -> Bound:
    return _CHANGE(
        of=project.id,
        to_name=project.name,
        to_live_name=project.name if project.archived_ms is None else None,
        to_mode=project.model_mode,
        to_models=encoded(project.models),
        to_weight=project.weight,
        to_archived=project.archived_ms,
    )


def checked_name(name: str, field: str = "name") -> str:
    """Raises: InvalidRequest for a name that is empty, too long, or could not be shown on a line."""
    if not name.strip() or len(name) > NAME_CHARACTERS_MAX or not name.isprintable() or name != name.strip():
        raise InvalidRequest(
            f"`{field}` must have 1 to {NAME_CHARACTERS_MAX} printable characters, without spaces at its ends.",
            param=field,
        )
    return name


def checked_weight(weight: float) -> float:
    if not WEIGHT_MIN <= weight <= WEIGHT_MAX:
        raise InvalidRequest(f"`weight` is {weight}; it must be from {WEIGHT_MIN} to {WEIGHT_MAX}.", param="weight")
    return weight


def checked_names(names: tuple[str, ...] | None, field: str) -> tuple[str, ...] | None:
    if names is None:
        return None
    if len(names) > LIST_MAX:
        raise InvalidRequest(f"`{field}` has {len(names)} entries; there may be {LIST_MAX}.", param=field)
    for name in names:
        checked_name(name, field)
    return tuple(dict.fromkeys(names))
