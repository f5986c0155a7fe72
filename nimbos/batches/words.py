"""Files and batches as values, and the one table of what a batch may become. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import msgspec

from nimbos.db import Row
from nimbos.types import Account

Dialect = Literal["openai", "anthropic"]

TEST_MODEL = "batch-test-model"
TEST_LINES = 100
TEST_BYTES = 1_000_000


class State(StrEnum):
    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


# Every change of a batch's state is one of these.
LEGAL: dict[State, frozenset[State]] = {
    State.VALIDATING: frozenset({State.IN_PROGRESS, State.FINALIZING, State.FAILED, State.CANCELLING}),
    State.IN_PROGRESS: frozenset({State.FINALIZING, State.CANCELLING}),
    State.FINALIZING: frozenset({State.COMPLETED, State.EXPIRED}),
    State.CANCELLING: frozenset({State.CANCELLED}),
    State.COMPLETED: frozenset(),
    State.FAILED: frozenset(),
    State.EXPIRED: frozenset(),
    State.CANCELLED: frozenset(),
}
OVER = frozenset(state for state in State if not LEGAL[state])


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    id: str
    project: str
    purpose: str
    filename: str
    size_bytes: int
    blob: str
    created_ms: int
    expires_ms: int | None


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch failed; `line` of the input file, from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """`at_ms`: when it came to each state. `waiting_for`: the message of the limit that holds it up."""

    id: str
    project: str
    account: Account
    dialect: Dialect
    endpoint: str
    input_file: str
    input_blob: str
    completion_window: str
    metadata: dict[str, str] | None
    output_expires_s: int | None
    state: State
    ending: str
    created_ms: int
    expires_ms: int
    at_ms: dict[State, int]
    errors: tuple[Fault, ...]
    output_file: str | None
    error_file: str | None
    total: int
    completed: int
    failed: int
    validated_lines: int
    validated_bytes: int
    waiting_for: str | None
    waiting_until_ms: int


def file_of(row: Row) -> File:
    return File(
        id=row["id"],
        project=row["project"],
        purpose=row["purpose"],
        filename=row["filename"],
        size_bytes=row["size_bytes"],
        blob=row["blob"],
        created_ms=row["created_ms"],
        expires_ms=row["expires_ms"],
    )


def batch_of(row: Row) -> Batch:
    return Batch(
        id=row["id"],
        project=row["project"],
        account=msgspec.json.decode(row["account"], type=Account),
        dialect=row["dialect"],
        endpoint=row["endpoint"],
        input_file=row["input_file"],
        input_blob=row["input_blob"],
        completion_window=row["completion_window"],
        metadata=msgspec.json.decode(row["metadata"], type=dict[str, str]) if row["metadata"] else None,
        output_expires_s=row["output_expires_s"],
        state=State(row["state"]),
        ending=row["ending"],
        created_ms=row["created_ms"],
        expires_ms=row["expires_ms"],
        at_ms={state: row[f"{state}_ms"] for state in _DATED if row[f"{state}_ms"] is not None},
        errors=msgspec.json.decode(row["errors"], type=tuple[Fault, ...]) if row["errors"] else (),
        output_file=row["output_file"],
        error_file=row["error_file"],
        total=row["total"],
        completed=row["completed"],
        failed=row["failed"],
        validated_lines=row["validated_lines"],
        validated_bytes=row["validated_bytes"],
        waiting_for=row["waiting_for"],
        waiting_until_ms=row["waiting_until_ms"],
    )


_DATED = [state for state in State if state is not State.VALIDATING]  # `created_ms` is when that began
