"""`/v1/organization/projects`: projects, who belongs to them, which models they may ask."""

from __future__ import annotations

from typing import Literal

import msgspec

from nimbos.accounts import Action, ProjectRole
from nimbos.accounts import people as persons
from nimbos.accounts import projects as rows
from nimbos.accounts.words import Changed, Member, Project
from nimbos.api.admin.desk import AdminRoute, Call, Page, Window, get, post, remove, seconds
from nimbos.db import Transaction
from nimbos.errors import InvalidRequest, NotFound

PROJECTS = "/v1/organization/projects"
_NO_GEOGRAPHY = {
    "external_key_id": "this server keeps no keys elsewhere",
    "geography": "everything is on this server",
    "residency": "everything is on this server",
}


class ProjectExtension(msgspec.Struct, kw_only=True):
    weight: float


class ProjectBody(msgspec.Struct, kw_only=True):
    id: str
    object: str = "organization.project"
    name: str
    created_at: int
    archived_at: int | None
    status: str
    x_nimbos: ProjectExtension

    @classmethod
    def of(cls, project: Project) -> ProjectBody:
        return cls(
            id=project.id,
            name=project.name,
            created_at=project.created_ms // 1000,
            archived_at=seconds(project.archived_ms),
            status="active" if project.archived_ms is None else "archived",
            x_nimbos=ProjectExtension(weight=project.weight),
        )


class ProjectCreate(msgspec.Struct, kw_only=True):
    """`weight`: the project's share of the scheduler; 1.0 is everybody's."""

    name: str
    weight: float = 1.0


class ProjectUpdate(msgspec.Struct, kw_only=True):
    name: str | None = None
    weight: float | None = None


class MemberBody(msgspec.Struct, kw_only=True):
    id: str
    object: str = "organization.project.user"
    name: str
    email: str
    role: str
    added_at: int

    @classmethod
    def of(cls, member: Member) -> MemberBody:
        return cls(
            id=member.user_id,
            name=member.name,
            email=member.email,
            role=member.role.value,
            added_at=member.added_ms // 1000,
        )


class MemberCreate(msgspec.Struct, kw_only=True):
    """A user of the organisation, by `user_id` or by `email`."""

    role: Literal["owner", "member"]
    user_id: str | None = None
    email: str | None = None


class MemberUpdate(msgspec.Struct, kw_only=True):
    role: Literal["owner", "member"] | None = None


class Deleted(msgspec.Struct, kw_only=True):
    id: str
    object: str
    deleted: bool = True


class ModelsBody(msgspec.Struct, kw_only=True):
    object: str = "project.model_permissions"
    mode: str
    model_ids: list[str]


class ModelsUpdate(msgspec.Struct, kw_only=True):
    mode: Literal["allow_list", "deny_list"]
    model_ids: tuple[str, ...]


class ModelsDeleted(msgspec.Struct, kw_only=True):
    object: str = "project.model_permissions.deleted"
    deleted: bool = True


async def list_projects(call: Call) -> Page:
    window = Window.of(call.query)
    archived = bool(call.query.flag("include_archived"))
    found = await call.accounts.database.read(
        rows.PAGE(after=window.after, archived=int(archived), most=window.limit + 1)
    )
    return window.page([ProjectBody.of(Project.of(row)) for row in found])


async def create_project(call: Call) -> ProjectBody:
    wanted = call.body(ProjectCreate, refused=_NO_GEOGRAPHY)
    return ProjectBody.of(await call.change(lambda: rows.create_project(wanted.name, weight=wanted.weight)))


async def retrieve_project(call: Call) -> ProjectBody:
    return ProjectBody.of(await call.read(lambda: rows.any_project(call.path["project_id"])))


async def update_project(call: Call) -> ProjectBody:
    wanted = call.body(ProjectUpdate, refused=_NO_GEOGRAPHY)
    change = rows.ProjectChange(name=wanted.name, weight=wanted.weight)
    return ProjectBody.of(await call.change(lambda: rows.update_project(call.path["project_id"], change)))


async def archive_project(call: Call) -> ProjectBody:
    call.check_no_body()
    return ProjectBody.of(await call.change(lambda: rows.archive_project(call.path["project_id"])))


async def list_members(call: Call) -> Page:
    window = Window.of(call.query)
    await call.read(lambda: rows.any_project(call.path["project_id"]))
    found = await call.accounts.database.read(
        persons.MEMBERS_PAGE(project=call.path["project_id"], after=window.after, most=window.limit + 1)
    )
    return window.page([MemberBody.of(Member.of(row)) for row in found])


async def create_member(call: Call) -> MemberBody:
    wanted = call.body(MemberCreate)
    if (wanted.user_id is None) == (wanted.email is None):
        raise InvalidRequest("Give one of `user_id` and `email`.", param="user_id")

    def change() -> Transaction[Changed[Member]]:
        if wanted.user_id is not None:
            user = yield from persons.live_user(wanted.user_id)
        else:
            user = yield from persons.user_by_email(wanted.email or "")
        return (yield from persons.add_member(call.path["project_id"], user, ProjectRole(wanted.role)))

    return MemberBody.of(await call.change(change))


async def retrieve_member(call: Call) -> MemberBody:
    return MemberBody.of(await call.read(lambda: persons.member_of(call.path["project_id"], call.path["user_id"])))


async def update_member(call: Call) -> MemberBody:
    wanted = call.body(MemberUpdate)
    if wanted.role is None:
        raise InvalidRequest("`role` is `owner` or `member`.", param="role")
    role = ProjectRole(wanted.role)
    return MemberBody.of(
        await call.change(lambda: persons.update_member(call.path["project_id"], call.path["user_id"], role))
    )


async def remove_member(call: Call) -> Deleted:
    member = await call.change(lambda: persons.remove_member(call.path["project_id"], call.path["user_id"]))
    return Deleted(id=member.user_id, object="organization.project.user.deleted")


async def retrieve_models(call: Call) -> ModelsBody:
    project = await call.read(lambda: rows.any_project(call.path["project_id"]))
    if not project.model_mode:
        raise NotFound(f"The project {project.name!r} has no list of models; it may ask all of them.")
    return ModelsBody(mode=project.model_mode, model_ids=list(project.models))


async def update_models(call: Call) -> ModelsBody:
    wanted = call.body(ModelsUpdate)
    project = await call.change(lambda: rows.set_models(call.path["project_id"], wanted.mode, wanted.model_ids))
    return ModelsBody(mode=project.model_mode, model_ids=list(project.models))


async def remove_models(call: Call) -> ModelsDeleted:
    await call.change(lambda: rows.set_models(call.path["project_id"], "", ()))
    return ModelsDeleted()


def routes() -> list[AdminRoute]:
    one, members = f"{PROJECTS}/{{project_id}}", f"{PROJECTS}/{{project_id}}/users"
    models = f"{one}/model_permissions"
    return [
        get(PROJECTS, Action.SEE, list_projects),
        post(PROJECTS, Action.PROJECTS, create_project),
        get(one, Action.SEE, retrieve_project),
        post(one, Action.PROJECTS, update_project),
        post(f"{one}/archive", Action.PROJECTS, archive_project),
        get(members, Action.SEE, list_members),
        post(members, Action.PROJECT_MEMBERS, create_member),
        get(f"{members}/{{user_id}}", Action.SEE, retrieve_member),
        post(f"{members}/{{user_id}}", Action.PROJECT_MEMBERS, update_member),
        remove(f"{members}/{{user_id}}", Action.PROJECT_MEMBERS, remove_member),
        get(models, Action.SEE, retrieve_models),
        post(models, Action.LIMITS, update_models),
        remove(models, Action.LIMITS, remove_models),
    ]
