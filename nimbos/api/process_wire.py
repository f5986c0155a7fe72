"""How processes look on the wire: one struct for each body. Times are milliseconds since 1970."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from nimbos.kernel import A2aState, Cost, Folded, Left, McpState, Reason, Replayed, Said, State
from nimbos.types import AskClass


class Tasks(msgspec.Struct, kw_only=True):
    """The state in the words of other protocols."""

    a2a: A2aState
    mcp: McpState


class ForkPoint(msgspec.Struct, kw_only=True):
    """The fork's past is this process's, up to and with event `at`."""

    id: str
    at: int


class AskedTold(msgspec.Struct, kw_only=True):
    """What only a person can give. `about` goes into the answer. `question`: for people. `what`: the call that waits
    (`verb`, `resource`, `effect`, `arguments`), or the budget that is spent (`meter`, `owner`, `limit`, `used`)."""

    reason: Reason
    about: str
    question: str
    what: dict[str, Any]


class ProcessTold(msgspec.Struct, kw_only=True):
    """`result`: any JSON, null until it is done, and in a list whose results are too large together; `result_segment`
    says where it is. `usage`: by meter, what its asks and calls used so far. `events`:
    the seq of the newest. `asks`: only of one process alone, while it is asking."""

    id: str
    object: Literal["process"] = "process"
    name: str
    program: str
    model: str
    ask_class: AskClass = msgspec.field(name="class")
    state: State
    reason: Reason
    about: list[str]
    due_ms: int | None
    parent: str | None
    depth: int
    detached: bool
    withheld: bool
    forked_from: ForkPoint | None
    events: int
    created_ms: int
    changed_ms: int
    result: Any
    result_segment: str | None
    error: str
    usage: dict[str, int]
    tasks: Tasks
    asks: list[AskedTold] | UnsetType = UNSET


class ProcessList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ProcessTold]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Forks(msgspec.Struct, kw_only=True):
    """Those that were made at once."""

    object: Literal["list"] = "list"
    data: list[ProcessTold]


class LabelTold(msgspec.Struct, kw_only=True):
    origin: Literal["external", "tool", "user"]
    secrecy: Literal["public", "private", "credential"]


class EventTold(msgspec.Struct, kw_only=True):
    """A row of the log. `body` as it was hashed. `texts`: what the segments that it names hold, by hash; a large one is
    left out, and has its own route."""

    pid: str
    seq: int
    epoch: int
    ts_ms: int
    kind: str
    cause: int | None
    call_id: str
    actor: str
    label: LabelTold
    body: msgspec.Raw
    blob: str | None
    usage: dict[str, int] | None
    version: int
    prev_hash: str
    hash: str
    texts: dict[str, Any]


class EventList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[EventTold]
    has_more: bool


class DeltaTold(msgspec.Struct, kw_only=True):
    """What a generation that runs now has just said, behind `at` characters. Ephemeral: it has no number, and is in no
    log in this form."""

    pid: str
    ask_id: str
    channel: str
    text: str
    at: int


class SignalTold(msgspec.Struct, kw_only=True):
    """`id`: sent again with the same one, it is the same signal."""

    object: Literal["signal"] = "signal"
    id: str
    process: ProcessTold


class VerifiedTold(msgspec.Struct, kw_only=True):
    """`events`: how many are as they were written; `hash`: of the last of them. `broken_at`: the first that is not."""

    object: Literal["verified"] = "verified"
    id: str
    events: int
    hash: str
    broken_at: int | None
    why: str


class BudgetTold(msgspec.Struct, kw_only=True):
    """In the unit of its meter. `limit`: null where nothing of its own limits it. `used`, `reserved`: of all that draw
    on it."""

    meter: str
    limit: int | None
    used: int
    reserved: int
    left: int | None


class ShareTold(msgspec.Struct, kw_only=True):
    """`parent`: whose budget it draws on."""

    id: str
    parent: str | None
    name: str
    state: State
    reason: Reason
    used: dict[str, int]


class CostTold(msgspec.Struct, kw_only=True):
    """`used`: by the process itself; `total`: with all that draw on its budget, which are `processes`."""

    object: Literal["cost"] = "cost"
    id: str
    used: dict[str, int]
    total: dict[str, int]
    budgets: list[BudgetTold]
    processes: list[ShareTold]

    @classmethod
    def of(cls, cost: Cost) -> CostTold:
        return cls(
            id=cost.pid,
            used=dict(cost.used),
            total=dict(cost.total),
            budgets=[_budget(one) for one in cost.budgets],
            processes=[
                ShareTold(
                    id=one.pid,
                    parent=one.parent,
                    name=one.name,
                    state=one.state,
                    reason=one.reason,
                    used=dict(one.used),
                )
                for one in cost.processes
            ],
        )


def _budget(one: Left) -> BudgetTold:
    left = None if one.limit is None else max(0, one.limit - one.used - one.reserved)
    return BudgetTold(meter=one.meter, limit=one.limit, used=one.used, reserved=one.reserved, left=left)


class CallSaid(msgspec.Struct, kw_only=True):
    name: str
    arguments: str


class SaidTold(msgspec.Struct, kw_only=True):
    """`error`: the model could not be asked this."""

    text: str
    calls: list[CallSaid]
    error: str


class ReplayedTold(msgspec.Struct, kw_only=True):
    """An answer in the log, and what another model says to the same question. `seq`: of its `model.intent`. `now`: null
    where nobody was asked. `same_question`: the log proves that the very same was asked; null: it cannot be told, as it
    was another model. `common_characters`: of the two texts, from their beginning."""

    seq: int
    ask_id: str
    purpose: str
    step: str
    model: str
    then: SaidTold
    now: SaidTold | None
    same: bool
    same_question: bool | None
    common_characters: int

    @classmethod
    def of(cls, replayed: Replayed) -> ReplayedTold:
        return cls(
            seq=replayed.seq,
            ask_id=replayed.ask_id,
            purpose=replayed.purpose,
            step=replayed.step,
            model=replayed.model,
            then=_said(replayed.then),
            now=_said(replayed.now) if replayed.now is not None else None,
            same=replayed.same,
            same_question=replayed.same_question,
            common_characters=replayed.common_characters,
        )


class FoldedTold(msgspec.Struct, kw_only=True):
    """The end of a replay. `agrees`: what the log folds to is what the process is."""

    id: str
    events: int
    state: str
    reason: str
    agrees: bool
    turns: int
    calls: int

    @classmethod
    def of(cls, pid: str, folded: Folded) -> FoldedTold:
        return cls(
            id=pid,
            events=folded.events,
            state=folded.state,
            reason=folded.reason,
            agrees=folded.agrees,
            turns=folded.turns,
            calls=folded.calls,
        )


def _said(said: Said) -> SaidTold:
    calls = [CallSaid(name=name, arguments=arguments) for name, arguments in said.calls]
    return SaidTold(text=said.text, calls=calls, error=said.error)
