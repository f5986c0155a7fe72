"""The rules for a model's asks: one in flight for each purpose and step, continued or begun anew, settled once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nimbos.kernel.events import ModelDone, ModelFailed, ModelIntent, ModelPartial
from nimbos.kernel.folding.records import Recorded, Turn


@dataclass(slots=True, kw_only=True)
class Asks:
    """`open`: by the id of the last ask. `settled`: of every ask there ever was, whether its usage is known."""

    open: dict[str, Turn] = field(default_factory=dict)
    settled: dict[str, bool] = field(default_factory=dict)

    def copy(self) -> Asks:
        return Asks(open=dict(self.open), settled=dict(self.settled))

    def find(self, *, purpose: str, step: str = "") -> Turn | None:
        return next((turn for turn in self.open.values() if turn.purpose == purpose and turn.step == step), None)

    def intent(self, intent: ModelIntent, *, seq: int, epoch: int, steps: dict[str, Recorded]) -> str | None:
        """Why it cannot be."""
        if intent.ask_id in self.settled:
            return f"ask {intent.ask_id} was asked before"
        if intent.step in steps:
            return f"step {intent.step} has an outcome"
        if (intent.purpose == "step") is not bool(intent.step):
            return "a step's purpose is step, and only a step's"
        before = self.find(purpose=intent.purpose, step=intent.step)
        if intent.continues and (before is None or before.ask_id != intent.continues):
            return f"there is no ask {intent.continues} to continue"
        if before is not None and before.failed is None and before.epoch == epoch:
            return f"ask {before.ask_id} is in flight"
        if before is not None:
            del self.open[before.ask_id]
        self.open[intent.ask_id] = _opened(intent, before if intent.continues else None, seq=seq, epoch=epoch)
        self.settled[intent.ask_id] = False
        return None

    def partial(self, partial: ModelPartial) -> str | None:
        turn = self.open.get(partial.ask_id)
        if turn is None or turn.failed is not None:
            return f"ask {partial.ask_id} is not in flight"
        self.open[partial.ask_id] = replace(
            turn,
            emitted=turn.emitted + partial.ids,
            text=turn.text + partial.text,
            thinking=turn.thinking + partial.thinking,
        )
        return None

    def done(self, done: ModelDone) -> Turn | str:
        """The ask that is over, or why it cannot be."""
        turn = self.open.get(done.ask_id)
        if turn is None or turn.failed is not None:
            return f"ask {done.ask_id} is not in flight"
        return self.open.pop(done.ask_id)

    def failed(self, failed: ModelFailed) -> Turn | str:
        """What may be tried again, and an agent's turn, stay open: they say what is missing."""
        turn = self.open.get(failed.ask_id)
        if turn is None or turn.failed is not None:
            return f"ask {failed.ask_id} is not in flight"
        if failed.again or turn.purpose == "turn":
            self.open[failed.ask_id] = replace(turn, failed=failed)
        else:
            del self.open[failed.ask_id]
        return turn

    def fork(self) -> None:
        """What is in flight is the parent's: a fork has what came of it so far."""
        self.open = {ask_id: replace(turn, epoch=0) for ask_id, turn in self.open.items()}

    def settle(self, ask_id: str) -> str | None:
        if self.settled.get(ask_id, True):
            return f"ask {ask_id} was settled, or never asked"
        self.settled[ask_id] = True
        return None


def _opened(intent: ModelIntent, before: Turn | None, *, seq: int, epoch: int) -> Turn:
    return Turn(
        ask_ids=(*(before.ask_ids if before else ()), intent.ask_id),
        model=intent.model,
        seq=seq,
        epoch=epoch,
        purpose=intent.purpose,
        step=intent.step,
        request=intent.request,
        limit_tokens=intent.limit_tokens,
        asked=intent.asked,
        emitted=before.emitted if before else (),
        text=before.text if before else "",
        thinking=before.thinking if before else "",
    )
