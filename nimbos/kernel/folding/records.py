"""The records that a view keeps. None of them ever changes, so a copy of a view is a copy of its collections."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

from nimbos.kernel.events import (
    CallDenied,
    CallDone,
    CallIntent,
    CallResolved,
    CallWanted,
    ModelDone,
    ModelFailed,
)
from nimbos.kernel.words import Reason, SignalKind

Purpose: TypeAlias = Literal["turn", "step", "summary"]
Outcome: TypeAlias = CallDone | CallDenied | CallResolved | ModelDone | ModelFailed


class CallStatus(StrEnum):
    INTENDED = "intended"  # no driver has it
    STARTED = "started"  # a driver was given it
    UNKNOWN = "unknown"  # a person must say what came of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A model's ask without an outcome. `ask_ids`: each continues the one before; the last may be in flight, in the
    hands of the holder of `epoch`. `failed`: it is not in flight any more. `seq`: of the last `model.intent`."""

    ask_ids: tuple[str, ...]
    model: str
    seq: int
    epoch: int
    purpose: Purpose
    step: str
    request: str | None
    limit_tokens: int | None
    asked: str = ""
    emitted: tuple[int, ...] = ()
    text: str = ""
    thinking: str = ""
    failed: ModelFailed | None = None

    @property
    def ask_id(self) -> str:
        return self.ask_ids[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call without an outcome. `wanted`: as a model wrote it; None: it is not a model's. `again`: a person said that
    it may be done once more. `seq`: of its intent."""

    intent: CallIntent
    seq: int
    intended_ms: int
    wanted: CallWanted | None = None
    status: CallStatus = CallStatus.INTENDED
    attempts: int = 0
    approved: bool = False
    again: bool = False
    started_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """How a step of a durable function ended. `result`: segment. `error`: a code, "" where all went well."""

    seq: int
    result: str | None
    error: str
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """`foreign`: it is a child of the process that this one was forked from; both are told of its exit."""

    call_id: str
    exited: Reason | None = None
    result: str | None = None
    foreign: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A signal that nobody has consumed. `seq`: of its `signal.received`."""

    seq: int
    signal: SignalKind
    source: str
    external_id: str
    about: str
    body: str | None
    reason: Reason
    ts_ms: int
