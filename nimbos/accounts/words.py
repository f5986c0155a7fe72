"""The nouns of this package as values: what a row says without its secrets, and who did something.

Times are milliseconds since the epoch. `model_mode` "" means that all models are allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import msgspec

from nimbos.accounts.roles import ProjectRole, Role
from nimbos.db import Row
from nimbos.types import Account, AskClass

ORGANISATION_ID = "org_default"
DEFAULT_PROJECT = "proj_default"
OWNER_USER = "user_owner"
OWNER_KEY = "key_owner"
ADMIN_SCOPE = "admin"

ModelMode = Literal["", "allow_list", "deny_list"]
OwnerKind = Literal["user", "service_account"]
KeyKind = Literal["project", "admin"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    id: str
    name: str
    model_mode: ModelMode
    models: tuple[str, ...]
    weight: float
    created_ms: int
    archived_ms: int | None

    @classmethod
    def of(cls, row: Row) -> Project:
        return cls(
            id=row["id"],
            name=row["name"],
            model_mode=row["model_mode"],
            models=strings(row["models"]) or (),
            weight=row["weight"],
            created_ms=row["created_ms"],
            archived_ms=row["archived_ms"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    id: str
    email: str
    name: str
    role: Role
    has_password: bool
    created_ms: int
    removed_ms: int | None

    @classmethod
    def of(cls, row: Row) -> User:
        return cls(
            id=row["id"],
            email=row["email"],
            name=row["name"],
            role=Role(row["role"]),
            has_password=row["password_hash"] is not None,
            created_ms=row["created_ms"],
            removed_ms=row["removed_ms"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A user in a project."""

    project_id: str
    user_id: str
    email: str
    name: str
    role: ProjectRole
    added_ms: int

    @classmethod
    def of(cls, row: Row) -> Member:
        return cls(
            project_id=row["project_id"],
            user_id=row["user_id"],
            email=row["email"],
            name=row["name"],
            role=ProjectRole(row["role"]),
            added_ms=row["added_ms"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceAccount:
    id: str
    project_id: str
    name: str
    role: ProjectRole
    created_ms: int
    removed_ms: int | None

    @classmethod
    def of(cls, row: Row) -> ServiceAccount:
        return cls(
            id=row["id"],
            project_id=row["project_id"],
            name=row["name"],
            role=ProjectRole(row["role"]),
            created_ms=row["created_ms"],
            removed_ms=row["removed_ms"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a key may do: `admin`, `class:NAME` and `programs:code` are `scopes`; None means all."""

    scopes: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None
    routes: tuple[str, ...] | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Without its secret and without its hash."""

    id: str
    kind: KeyKind
    project_id: str
    name: str
    redacted: str
    owner_kind: OwnerKind
    owner_id: str
    grant: Grant
    created_ms: int
    expires_ms: int | None
    revoked_ms: int | None
    last_used_ms: int | None

    @classmethod
    def of(cls, row: Row) -> Key:
        grant = Grant(
            scopes=strings(row["scopes"]) or (),
            models=strings(row["models"]),
            routes=strings(row["routes"]),
            weight=row["weight"],
        )
        return cls(
            id=row["id"],
            kind=row["kind"],
            project_id=row["project_id"],
            name=row["name"],
            redacted=row["redacted"],
            owner_kind=row["owner_kind"],
            owner_id=row["owner_id"],
            grant=grant,
            created_ms=row["created_ms"],
            expires_ms=row["expires_ms"],
            revoked_ms=row["revoked_ms"],
            last_used_ms=row["last_used_ms"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who changes something. `local` is whoever can read the home folder: a command without a server, or a start."""

    kind: Literal["api_key", "session", "local"]
    id: str
    user: str = ""
    email: str = ""
    service_account: str = ""
    address: str = ""


LOCAL = Actor(kind="local", id="local", user=OWNER_USER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whoever was let in. `role` None: may ask, and administers nothing. `account` pays for the asks."""

    account: Account
    actor: Actor
    role: Role | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed(Generic[T]):
    """What a change did, for the audit log; `value` is for whoever asked for it. Neither side holds a secret."""

    value: T
    action: str
    target: str
    project: str = ""
    before: Any = None
    after: Any = None


def strings(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else msgspec.json.decode(text, type=tuple[str, ...])


def encoded(values: tuple[str, ...] | None) -> str | None:
    return None if values is None else msgspec.json.encode(values).decode()


def allowed_model(account: Account, model: str) -> bool:
    """Whether this account's key and project may ask this model, by its id (not an alias)."""
    return model not in account.denied_models and (account.models is None or model in account.models)


def allowed_classes(account: Account) -> list[AskClass]:
    """Those that its key is for, the most urgent first; a key that names none is for all."""
    return [name for name in AskClass if f"class:{name}" in account.scopes] or list(AskClass)


def allowed_route(account: Account, path: str) -> bool:
    """A key for some routes may use those and what lies below them. All may list the models they could ask."""
    if account.routes is None or path == "/v1/models" or path.startswith("/v1/models/"):
        return True
    return any(path == route or path.startswith(f"{route}/") for route in account.routes)
