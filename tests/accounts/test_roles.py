"""The table of roles, line by line, and the question that is asked of it."""

from __future__ import annotations

from itertools import product

import pytest

from nimbos.accounts import Action, ProjectRole, Role
from nimbos.accounts.roles import ORGANISATION, PROJECT, check, may
from nimbos.errors import Forbidden

# What each role may, of all actions; whatever is not named it may not.
MAY = {
    Role.OWNER: set(Action),
    Role.ADMIN: set(Action) - {Action.OWNERS},
    Role.MEMBER: {Action.SELF},
    Role.READER: {Action.SELF, Action.SEE, Action.SEE_KEYS},
}
MAY_IN_PROJECT = {
    ProjectRole.OWNER: {
        Action.SEE,
        Action.SEE_KEYS,
        Action.OWN_KEYS,
        Action.PROJECT_KEYS,
        Action.PROJECT_MEMBERS,
    },
    ProjectRole.MEMBER: {Action.SEE_KEYS, Action.OWN_KEYS},
    ProjectRole.NONE: set(),
}
CHANGES = set(Action) - {Action.SELF, Action.SEE, Action.SEE_KEYS}


def test_every_action_is_in_the_table() -> None:
    assert ORGANISATION.keys() == set(Action)
    assert PROJECT.keys() <= set(Action)


@pytest.mark.parametrize(("role", "action"), list(product(Role, Action)))
def test_what_a_role_may_in_the_organisation(role: Role, action: Action) -> None:
    assert may(role, action) == (action in MAY[role])


@pytest.mark.parametrize(("role", "action"), list(product(ProjectRole, Action)))
def test_what_a_member_may_in_a_project(role: ProjectRole, action: Action) -> None:
    expected = action in MAY_IN_PROJECT[role] | MAY[Role.MEMBER]
    assert may(Role.MEMBER, action, in_project=role) == expected


def test_a_reader_changes_nothing_and_a_key_without_the_scope_does_nothing() -> None:
    assert not [action for action in CHANGES if may(Role.READER, action)]
    assert not [action for action in Action if may(None, action, in_project=ProjectRole.OWNER)]


def test_a_refusal_names_the_role_and_what_it_may_not() -> None:
    with pytest.raises(Forbidden, match=r"The role reader may not set limits, budgets"):
        check(Role.READER, Action.LIMITS)
