"""Whose budget or limit it is, as a person says it (a kind, and a name or an id), found among what there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from nimbos.accounts import keys, projects
from nimbos.accounts.words import DEFAULT_PROJECT, ORGANISATION_ID, OWNER_KEY, Key, Project
from nimbos.db import Transaction
from nimbos.errors import Conflict, InvalidRequest, NotFound

OwnerKind = Literal["organisation", "project", "key", "process", "model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """`project`: the one it belongs to, "" for none."""

    kind: OwnerKind
    id: str
    name: str
    project: str = ""


class OwnerBody(msgspec.Struct, kw_only=True):
    kind: str
    id: str
    name: str


def find_owner(kind: OwnerKind, wanted: str) -> Transaction[Owner]:
    """`wanted`: an id, or the name of a living project or key.

    Raises: NotFound; Conflict for a key's name that several projects have.
    """
    if kind == "organisation":
        return Owner(kind=kind, id=ORGANISATION_ID, name="organisation")
    if not wanted:
        raise InvalidRequest(f"Which {kind}? Give its name or its id.", param="owner_id")
    if kind == "project":
        project = yield from find_project(wanted)
        return Owner(kind=kind, id=project.id, name=project.name, project=project.id)
    if kind == "key":
        if wanted in (OWNER_KEY, "owner"):
            return Owner(kind=kind, id=OWNER_KEY, name="owner", project=DEFAULT_PROJECT)
        if wanted.startswith("key_file_"):
            return Owner(kind=kind, id=wanted, name=wanted.removeprefix("key_file_"))
        key = yield from find_key(wanted)
        return Owner(kind=kind, id=key.id, name=key.name, project=key.project_id)
    return Owner(kind=kind, id=projects.checked_name(wanted, "owner_id"), name=wanted)


def project_of(kind: str, owner_id: str) -> Transaction[str]:
    """Where an owner belongs that may be gone; "" for none."""
    if kind == "project":
        return owner_id
    if kind != "key":
        return ""
    if owner_id == OWNER_KEY:
        return DEFAULT_PROJECT
    rows = yield keys.BY_ID(wanted=owner_id)
    return rows[0]["project_id"] if rows else ""


def find_project(wanted: str) -> Transaction[Project]:
    """By its id, which no other project's name can take away, or else by its name."""
    if not (yield projects.BY_ID(wanted=wanted)):
        rows = yield projects.BY_NAME(wanted=wanted)
        if rows:
            return Project.of(rows[0])
    return (yield from projects.live_project(wanted))


def find_key(wanted: str) -> Transaction[Key]:
    """A living key by its name, or any key by its id."""
    rows = yield keys.BY_ID(wanted=wanted)
    if not rows:
        rows = yield keys.BY_NAME(wanted=wanted, project="", everywhere=1)
    if not rows:
        raise NotFound(f"There is no key {wanted[:100]!r}. `nimbos key list` shows those there are.")
    if len(rows) > 1:
        ids = ", ".join(row["id"] for row in rows[:5])
        raise Conflict(f"Several projects have a key {wanted!r}: give one of their ids ({ids}).")
    return Key.of(rows[0])
