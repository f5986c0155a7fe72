"""What a role may do: the one table, and the question that is asked of it.

A role in the organisation says what of it one may see and change. A membership in a project says whose tokens one may
use: it brings keys of one's own there, and an owner of a project runs it. Both together count.

    reader   lists, usage, audit log; changes nothing
    member   keys of its own in the projects it belongs to
    admin    everything, except what concerns owners
    owner    everything
"""

from __future__ import annotations

from enum import StrEnum

from nimbos.errors import Forbidden


class Role(StrEnum):
    """In the organisation."""

    OWNER = "owner"
    ADMIN = "admin"
    MEMBER = "member"
    READER = "reader"


class ProjectRole(StrEnum):
    """`NONE` is for service accounts that were made without a key."""

    OWNER = "owner"
    MEMBER = "member"
    NONE = "none"


class Action(StrEnum):
    SELF = "see who one is"
    SEE = "see projects, people, keys, limits and usage"
    SEE_KEYS = "see keys of a project"
    OWN_KEYS = "make and revoke keys of one's own"
    PROJECT_KEYS = "make and revoke anyone's keys and service accounts"
    PROJECT_MEMBERS = "say who belongs to a project"
    PROJECTS = "make, change and archive projects"
    USERS = "add, change and remove people"
    OWNERS = "add, change and remove owners"
    LIMITS = "set limits, budgets, alerts and allowed models"
    PRICES = "set prices"
    ADMIN_KEYS = "make and revoke keys that administer"


_ALL = frozenset(Role)
_RUNS = frozenset({Role.OWNER, Role.ADMIN})

ORGANISATION: dict[Action, frozenset[Role]] = {
    Action.SELF: _ALL,
    Action.SEE: _RUNS | {Role.READER},
    Action.SEE_KEYS: _RUNS | {Role.READER},
    Action.OWN_KEYS: _RUNS,
    Action.PROJECT_KEYS: _RUNS,
    Action.PROJECT_MEMBERS: _RUNS,
    Action.PROJECTS: _RUNS,
    Action.USERS: _RUNS,
    Action.OWNERS: frozenset({Role.OWNER}),
    Action.LIMITS: _RUNS,
    Action.PRICES: _RUNS,
    Action.ADMIN_KEYS: _RUNS,
}

PROJECT: dict[Action, frozenset[ProjectRole]] = {
    Action.SEE: frozenset({ProjectRole.OWNER}),
    Action.SEE_KEYS: frozenset({ProjectRole.OWNER, ProjectRole.MEMBER}),
    Action.OWN_KEYS: frozenset({ProjectRole.OWNER, ProjectRole.MEMBER}),
    Action.PROJECT_KEYS: frozenset({ProjectRole.OWNER}),
    Action.PROJECT_MEMBERS: frozenset({ProjectRole.OWNER}),
}


def may(role: Role | None, action: Action, *, in_project: ProjectRole | None = None) -> bool:
    """`role` None: a key without the scope `admin`, which may do none of this. `in_project`: what the same person is in
    the project that the action is about."""
    if role is None:
        return False
    if role in ORGANISATION[action]:
        return True
    return in_project is not None and in_project in PROJECT.get(action, frozenset())


def check(role: Role | None, action: Action, *, in_project: ProjectRole | None = None) -> None:
    """Raises: Forbidden naming the role and what it may not do."""
    if not may(role, action, in_project=in_project):
        raise Forbidden(f"The role {role or 'of this key'} may not {action}.")


def runs_everything(role: Role | None) -> bool:
    """Owners and admins belong to every project."""
    return role in _RUNS
