"""An ask in two books at once: what the ledger writes of it and what the process's log says are one transaction each.

    reserve   model.intent
    settle    model.done with what follows from it; or what was said so far and model.failed; and budget.settled

A part of the ledger's transactions (`nimbos.ledger.Journal`): they may run again, and in another thread than the
server's loop, so what they write is ready before they do. Read `think.py` for who fills it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nimbos.db import Transaction
from nimbos.errors import AnswerFailed
from nimbos.kernel.events import BudgetSettled, ModelFailed, ModelIntent, ModelPartial
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.ledger import Extended, Progress, Settled, Settlement
from nimbos.types import Ask, Channel, TokenChunk, Usage

TOKENS, COST, SECONDS = "tokens", "cost_micros", "seconds_ms"


@dataclass(slots=True, eq=False)
class Growing:
    """What came of an answer and is not in the log yet. Token ids go on from; words, as no door turns ids back."""

    ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)

    def add(self, chunk: TokenChunk) -> None:
        self.ids.extend(chunk.ids)
        if chunk.text:
            (self.thinking if chunk.channel is Channel.THINKING else self.text).append(chunk.text)

    def clear(self) -> None:
        """What there was is in the log."""
        self.ids, self.text, self.thinking = [], [], []

    def partial(self, ask_id: str) -> ModelPartial:
        return ModelPartial(
            ask_id=ask_id, ids=tuple(self.ids), text="".join(self.text), thinking="".join(self.thinking)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Failing:
    """How an ask that did not get to its end is told of. `again`: it may go on with what is there. `after`: what
    follows from that, in the same transaction."""

    code: str
    message: str
    again: bool = True
    after: tuple[Draft, ...] = ()


class AskJournal:
    """For one ask. `growing`: what is not in the log; `done`: what is written when the answer is whole; `failing`: what
    is told else; `void`: the log may or may not have what was written last, so the ask is settled without it."""

    def __init__(self, holding: Holding, intent: ModelIntent) -> None:
        self.growing = Growing()
        self.done: tuple[Draft, ...] | None = None
        self.failing: Failing | None = None
        self.void = False
        self.usage = Usage()
        self._holding = holding
        self._intent = intent

    @property
    def paid(self) -> Usage:
        """An answer goes on here, and `think.py` says in the ask what that has paid for."""
        return Usage()

    def reserved(self, ask: Ask, *, prompt_tokens: int) -> Transaction[None]:
        yield from self._holding.appending(Draft(body=self._intent))

    def extended(self, ask_id: str, progress: Progress, extended: Extended) -> Transaction[None]:
        yield from ()

    def settled(self, settlement: Settlement, settled: Settled) -> Transaction[None]:
        """Raises: Fenced when another has the process now; the ask is settled all the same."""
        self.usage = settlement.usage
        if self.void:
            return
        drafts = self._ending(settlement) if self.done is None else self.done
        yield from self._holding.appending(
            *drafts,
            settled_draft(
                settlement.ask_id, settlement.usage, cost_micros=settled.cost_micros, compute_ms=settlement.compute_ms
            ),
        )

    def _ending(self, settlement: Settlement) -> tuple[Draft, ...]:
        ask_id = self._intent.ask_id
        again = settlement.outcome != AnswerFailed.code  # what cannot go on does not go on the second time
        failing = self.failing or Failing(code=settlement.outcome, message="It did not get to its end.", again=again)
        failed = ModelFailed(ask_id=ask_id, code=failing.code, message=failing.message, again=failing.again)
        kept = (Draft(body=self.growing.partial(ask_id)),) if self.growing.ids and failing.again else ()
        return (*kept, Draft(body=failed), *failing.after)


def settled_draft(ask_id: str, usage: Usage, *, cost_micros: int, compute_ms: int) -> Draft:
    """What an ask used in the end, by the meters of budgets; the event's own usage says it by kinds of tokens."""
    used = {TOKENS: usage.input + usage.output, COST: cost_micros, SECONDS: compute_ms}
    body = BudgetSettled(used={meter: amount for meter, amount in used.items() if amount}, ask_id=ask_id)
    return Draft(body=body, usage=usage)
