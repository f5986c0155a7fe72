"""The rules for signals and children: each signal is received once, consumed once; a child's exit comes as one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nimbos.kernel.events import SignalConsumed, SignalReceived
from nimbos.kernel.folding.records import Child, Received
from nimbos.kernel.words import REASONS, SignalKind, State


@dataclass(slots=True, kw_only=True)
class Mail:
    """`waiting`: received and not consumed. `heard`: source and id of all that were received."""

    waiting: list[Received] = field(default_factory=list)
    heard: set[tuple[str, str]] = field(default_factory=set)
    children: dict[str, Child] = field(default_factory=dict)

    def copy(self) -> Mail:
        return Mail(waiting=list(self.waiting), heard=set(self.heard), children=dict(self.children))

    def receive(self, received: SignalReceived, *, seq: int, ts_ms: int) -> str | None:
        """Why it cannot be."""
        name = (received.source, received.external_id)
        if name in self.heard:
            return f"signal {received.external_id} was received before"
        if received.signal is SignalKind.CHILD_EXIT:
            if received.reason not in REASONS[State.DONE]:
                return f"a child's exit has no reason {received.reason.value!r}"
            if (child := self.children.get(received.about)) is not None:
                self.children[received.about] = replace(child, exited=received.reason, result=received.body)
        self.heard.add(name)
        self.waiting.append(
            Received(
                seq=seq,
                signal=received.signal,
                source=received.source,
                external_id=received.external_id,
                about=received.about,
                body=received.body,
                reason=received.reason,
                ts_ms=ts_ms,
            )
        )
        return None

    def consume(self, consumed: SignalConsumed) -> Received | str:
        found = next((signal for signal in self.waiting if signal.seq == consumed.received), None)
        if found is None:
            return f"no signal of event {consumed.received} waits"
        self.waiting.remove(found)
        return found

    def spawned(self, pid: str, call_id: str) -> str | None:
        if pid in self.children:
            return f"{pid} is its child already"
        self.children[pid] = Child(call_id=call_id)
        return None

    def fork(self) -> None:
        """A fork has a mailbox of its own; the children of its past remain their parent's."""
        self.heard = set()
        self.children = {pid: replace(child, foreign=True) for pid, child in self.children.items()}
