"""The kernel's closed sets: states and what may follow them, effect classes, verbs, labels. Pure.

A state without its reason says little, so the two go together everywhere. `LEGAL` is the one table of changes; the fold
refuses whatever it does not list.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum

import msgspec


class State(StrEnum):
    READY = "ready"  # a claim would run it
    RUNNING = "running"  # one server has it
    WAITING = "waiting"  # for something that comes by itself
    ASKING = "asking"  # for something that a person gives
    PAUSED = "paused"
    DONE = "done"


class Reason(StrEnum):
    # ready, running
    NONE = ""
    # waiting
    MODEL = "model"
    TOOL = "tool"
    CHILD = "child"
    TIMER = "timer"
    SIGNAL = "signal"
    # asking
    INPUT = "input"
    PERMISSION = "permission"
    AUTH = "auth"
    BUDGET = "budget"
    IN_DOUBT = "in_doubt"
    # paused
    USER = "user"
    POLICY = "policy"
    SHUTDOWN = "shutdown"
    # done
    OK = "ok"
    FAILED = "failed"
    CANCELLED = "cancelled"
    KILLED = "killed"
    REJECTED = "rejected"


LEGAL: dict[State, frozenset[State]] = {
    State.READY: frozenset({State.RUNNING, State.PAUSED, State.DONE}),
    State.RUNNING: frozenset({State.READY, State.WAITING, State.ASKING, State.PAUSED, State.DONE}),
    State.WAITING: frozenset({State.READY, State.PAUSED, State.DONE}),
    State.ASKING: frozenset({State.READY, State.PAUSED, State.DONE}),
    State.PAUSED: frozenset({State.READY, State.DONE}),
    State.DONE: frozenset(),
}

REASONS: dict[State, frozenset[Reason]] = {
    State.READY: frozenset({Reason.NONE}),
    State.RUNNING: frozenset({Reason.NONE}),
    State.WAITING: frozenset({Reason.MODEL, Reason.TOOL, Reason.CHILD, Reason.TIMER, Reason.SIGNAL}),
    State.ASKING: frozenset({Reason.INPUT, Reason.PERMISSION, Reason.AUTH, Reason.BUDGET, Reason.IN_DOUBT}),
    State.PAUSED: frozenset({Reason.USER, Reason.POLICY, Reason.SHUTDOWN}),
    State.DONE: frozenset({Reason.OK, Reason.FAILED, Reason.CANCELLED, Reason.KILLED, Reason.REJECTED}),
}


def why_illegal(was: State, to: State, reason: Reason) -> str | None:
    """None: the change is legal."""
    if to not in LEGAL[was]:
        return f"{to} cannot follow {was}"
    if reason not in REASONS[to]:
        return f"{to} has no reason {reason.value!r}"
    return None


class Effect(StrEnum):
    """What may be done with an intent whose outcome nobody knows."""

    INTERNAL = "internal"  # in the log's own transaction: there is no such intent
    PURE = "pure"  # run it again
    IDEMPOTENT = "idempotent"  # run it again with the same key
    CHECKABLE = "checkable"  # ask the driver whether it happened
    OPAQUE = "opaque"  # never again: a person decides


class Verb(StrEnum):
    """What a syscall does; `resource` says to what."""

    GENERATE = "generate"  # a model's id
    TOOL = "tool"  # a tool's name
    SPAWN = "spawn"  # a program's hash, or "" for the process's own
    WAIT = "wait"  # children's ids
    SEND = "send"  # a process's id
    SLEEP = "sleep"
    ASK = "ask"  # a person
    READ = "read"  # a segment's hash: the rest of a large result
    RECEIVE = "receive"  # a message
    PIN = "pin"  # a segment: a goal, a promise, an open question


class Verdict(StrEnum):
    """What a person says of an effect in doubt."""

    HAPPENED = "happened"
    DID_NOT = "did_not"
    RETRY = "retry"
    ABANDON = "abandon"


class SignalKind(StrEnum):
    MESSAGE = "message"  # words for the process
    ANSWER = "answer"  # to what it asks: a question, an approval, an effect in doubt
    TOP_UP = "top_up"  # its budget was changed
    PAUSE = "pause"
    RESUME = "resume"
    CANCEL = "cancel"  # its parent is gone
    KILL = "kill"
    CHILD_EXIT = "child_exit"
    TIMER = "timer"
    ADOPT = "adopt"  # a fork becomes real: its withheld effects may happen


class Origin(IntEnum):
    """Where words came from; the lower, the less they may do."""

    EXTERNAL = 0
    TOOL = 1
    USER = 2


class Secrecy(IntEnum):
    PUBLIC = 0
    PRIVATE = 1
    CREDENTIAL = 2


class Label(msgspec.Struct, frozen=True, array_like=True):
    """Of words, arguments and results. Joined, they are as little trusted and as secret as their worst part."""

    origin: Origin = Origin.USER
    secrecy: Secrecy = Secrecy.PRIVATE

    def join(self, other: Label) -> Label:
        return Label(min(self.origin, other.origin), max(self.secrecy, other.secrecy))
