"""Accounts: the organisation, its projects, people and keys; who a secret is, and who changed what.

`Accounts` is the door. Read `words.py` for the nouns, `roles.py` for who may do what.
"""

from nimbos.accounts.accounts import Accounts
from nimbos.accounts.authority import Authority
from nimbos.accounts.keys import CODE_SCOPE
from nimbos.accounts.projects import project_weights
from nimbos.accounts.roles import Action, ProjectRole, Role
from nimbos.accounts.words import Actor, Identity, allowed_classes, allowed_model, allowed_route

__all__ = [
    "CODE_SCOPE",
    "Accounts",
    "Action",
    "Actor",
    "Authority",
    "Identity",
    "ProjectRole",
    "Role",
    "allowed_classes",
    "allowed_model",
    "allowed_route",
    "project_weights",
]
