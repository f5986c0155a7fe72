"""What the log can say: one struct for each kind of event, and the row that carries it.

`body` is the exact bytes that were hashed: canonical JSON (keys in order, no white space). An event is never changed;
one of an older `version` is lifted when it is read (`lift`), one of a newer is refused. Texts are not in the log but in
content-addressed segments, named by hash; what stands here is small and bounded.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from nimbos.kernel.words import Effect, Label, Reason, SignalKind, State, Verb, Verdict
from nimbos.types import AskClass, Usage

SegmentKind = Literal["system", "goal", "user", "assistant", "tool", "view", "note"]


class Segment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of a context. `hash`: of its content, a message in OpenAI's shape as JSON. `id`: unique in its
    process. `tokens`: as counted or estimated. `whole`: hash of a large result of which this shows the head.
    `covers`: of a view, the segments it stands for."""

    id: str
    hash: str
    kind: SegmentKind
    tokens: int
    label: Label = Label()
    pinned: bool = False
    whole: str | None = None
    whole_bytes: int = 0
    covers: tuple[str, ...] = ()


class CallWanted(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call as the model wrote it. `arguments`: JSON text, not yet checked."""

    call_id: str
    name: str
    arguments: str


class ProcCreated(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="proc.created"):
    """`account`: the project that pays. `input`: segment of what the process was given, a JSON value.
    `key`: whoever spawned it, so that the same spawn is not made twice. `withheld`: a child of a fork that is not
    adopted, whose effects are withheld like its own. `born_seq`: the last event of its parent's log then; whoever is
    forked from that log there or later knows the child."""

    program: str
    name: str
    account: str
    input: str
    model: str
    ask_class: AskClass
    parent: str | None = None
    depth: int = 0
    detached: bool = False
    withheld: bool = False
    key: str = ""
    born_seq: int = 0


class ProcForked(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="proc.forked"):
    """The first event of a fork: its past is `of`'s, up to and with `at_seq`. `prev_hash` of its row is `at_hash`.
    Effects that are not internal or pure are withheld until it is adopted. `key`: whoever forked it, so that the same
    forks are not made twice."""

    of: str
    at_seq: int
    at_hash: str
    key: str = ""


class ProcState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="proc.state"):
    """`due_ms`: when a timer wakes it, by the wall clock. `about`: call ids, children or question it waits for."""

    to: State
    reason: Reason = Reason.NONE
    due_ms: int | None = None
    about: tuple[str, ...] = ()


class ProcExited(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="proc.exited"):
    """`result`: segment, a JSON value. `error`: for people, what went wrong and what to do."""

    reason: Reason
    result: str | None = None
    error: str = ""


class SignalReceived(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="signal.received"):
    """Taken out of the mailbox by the process's own server. `body`: segment, a JSON value; None: it has none.
    `about`: the question, call or child it is for. Of a `child_exit`: `reason` is how it ended, `about` its pid, `body`
    its result."""

    signal: SignalKind
    source: str
    external_id: str
    about: str = ""
    body: str | None = None
    reason: Reason = Reason.NONE


class SignalConsumed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="signal.consumed"):
    """`received`: the seq of its `signal.received`. `call_id`: the call that waited for it, if one did."""

    received: int
    call_id: str = ""


class ModelIntent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="model.intent"):
    """The context is what the fold says at this event. `continues`: the ask whose partial answer this one goes on
    with, which must have `asked` the same: a hash of the model's file and all that was asked of it. `step`: of a
    durable function; `request`: segment of what the step asks, where it is not the context."""

    ask_id: str
    model: str
    limit_tokens: int | None = None
    continues: str = ""
    step: str = ""
    purpose: Literal["turn", "step", "summary"] = "turn"
    request: str | None = None
    asked: str = ""


class ModelPartial(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="model.partial"):
    """What came since the last one: token ids to go on from, and their text by channel, as no door turns ids back."""

    ask_id: str
    ids: tuple[int, ...]
    text: str = ""
    thinking: str = ""


class ModelDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="model.done"):
    """`message`: segment, the assistant's message in OpenAI's shape. `finish`: stop, length, tool_calls or budget."""

    ask_id: str
    model_hash: str
    finish: str
    message: str
    calls: tuple[CallWanted, ...] = ()


class ModelFailed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="model.failed"):
    """`again`: it may be tried again with what is there. Without a partial answer nothing was lost."""

    ask_id: str
    code: str
    message: str
    again: bool = False


class CallIntent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="call.intent"):
    """Durable before the driver runs. `key`: the effect's, the same at each try, fresh in a fork. `arguments`: segment,
    canonical JSON. `bound_to`: hash of the tool's definition and the arguments, which an approval is for.
    `step`: of a durable function."""

    call_id: str
    verb: Verb
    resource: str
    effect: Effect
    key: str
    arguments: str
    bound_to: str = ""
    deadline_ms: int = 0
    step: str = ""


class CallApproved(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="call.approved"):
    call_id: str
    by: str
    bound_to: str = ""


class CallDenied(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="call.denied"):
    """`why` is what the model is shown. Also for a tool that does not exist and arguments that do not fit."""

    call_id: str
    by: str
    why: str


class CallStarted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="call.started"):
    """The driver was given it, the `attempt`-th time, from 1."""

    call_id: str
    attempt: int


class CallDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="call.done"):
    """`result`: segment, a JSON value (its head is what a model is shown). `error`: a code where it went wrong, and the
    result is then a sentence for the model. `withheld`: nothing was done, this is a fork. `child`: of a spawn.
    `printed`: segment, what a tool's program printed meanwhile, which no model is shown."""

    call_id: str
    result: str
    size_bytes: int
    error: str = ""
    withheld: bool = False
    child: str = ""
    printed: str | None = None


class CallUnknown(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="call.unknown"):
    """It was intended and perhaps done; nobody knows."""

    call_id: str


class CallResolved(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="call.resolved"):
    """`result`: segment, what a person says came of it."""

    call_id: str
    verdict: Verdict
    by: str
    result: str | None = None


class CtxChanged(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="ctx.changed"):
    """`add` at the end, or, a view, in the place of what it covers. `evict`: ids that are no longer shown, whose
    content stays. All in this order: evict, add, pin, unpin."""

    add: tuple[Segment, ...] = ()
    evict: tuple[str, ...] = ()
    pin: tuple[str, ...] = ()
    unpin: tuple[str, ...] = ()


class BudgetReserved(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="budget.reserved"):
    """Of a meter that is not the ledger's: `seconds_ms` or `calls`."""

    meter: str
    amount: int
    call_id: str = ""


class BudgetSettled(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="budget.settled"):
    """What an ask or a call used in the end, in all meters it used."""

    used: dict[str, int]
    ask_id: str = ""
    call_id: str = ""


class BudgetExhausted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="budget.exhausted"):
    """`owner`: whose budget it is that ended it (`process`, a parent, the key …), for people."""

    meter: str
    owner: str
    limit: int
    used: int


class MemChanged(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="mem.changed"):
    """Its place: memory comes with capabilities."""

    key: str
    value: str | None = None


class GrantAdded(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="grant.added"):
    """Its place: until capabilities come, a program's grants are its manifest's tools."""

    grant: str


class GrantRevoked(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="grant.revoked"):
    grant: str


class Note(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="note"):
    """For people: what an adopted fork did not do any more, which recorded step a changed function did not ask for
    again, an adoption."""

    about: Literal["changed_step", "adopted", "clock", "compaction", "dropped", "recovered", "said"]
    text: str


Body: TypeAlias = (
    ProcCreated
    | ProcForked
    | ProcState
    | ProcExited
    | SignalReceived
    | SignalConsumed
    | ModelIntent
    | ModelPartial
    | ModelDone
    | ModelFailed
    | CallIntent
    | CallApproved
    | CallDenied
    | CallStarted
    | CallDone
    | CallUnknown
    | CallResolved
    | CtxChanged
    | MemChanged
    | GrantAdded
    | GrantRevoked
    | BudgetReserved
    | BudgetSettled
    | BudgetExhausted
    | Note
)


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the log. `seq` is dense from 1, also in a fork, whose first is `at_seq + 1`. `cause`: the seq that led
    to it. `actor`: `kernel`, `user:…`, `process:…`. `hash`: SHA-256 in hexadecimal over `prev_hash` and every other
    column; `prev_hash` of the first is "" and of a fork its parent's."""

    pid: str
    seq: int
    epoch: int
    ts_ms: int
    kind: str
    cause: int | None
    call_id: str
    actor: str
    label: Label
    body: bytes
    blob: str | None
    usage: Usage | None
    version: int
    prev_hash: str
    hash: str
