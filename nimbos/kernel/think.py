"""Asking the model on behalf of a process, through the same door as everyone, until the answer is whole.

    think ─▶ plan ─▶ ask ─▶ answering ─▶ thought
              ▲       └── cut off: pause, budget, an engine or server that died; what was said is in the log
              └────────── goes on behind it, with another ask that pays for nothing twice

Knows no program. `answering.py` follows one ask, `journal.py` writes it, `agent.py` decides what is asked.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import msgspec

from nimbos.chat import ChatRequest, Dial, Plan
from nimbos.db import Database
from nimbos.errors import AnswerFailed, BudgetExhausted, EngineFailed, Overloaded, PromptTooLong, StorageUnavailable
from nimbos.kernel import budgets, mailbox
from nimbos.kernel.answering import Also, Answering, Thought
from nimbos.kernel.events import ModelIntent, SignalConsumed
from nimbos.kernel.fold import Turn, View
from nimbos.kernel.folding.records import Purpose
from nimbos.kernel.holding import Holding
from nimbos.kernel.journal import AskJournal, settled_draft
from nimbos.kernel.log import Draft
from nimbos.kernel.mailbox import CONTROL
from nimbos.kernel.segments import Segments
from nimbos.kernel.words import Reason, SignalKind, State
from nimbos.ledger import Spent, spent
from nimbos.service import Service
from nimbos.types import Ask, AskClass, Grammar, ModelCard, Sampling, new_id

TRIES = 3  # of an answer over which the engine fails
WAIT_IN_PLACE_S = 2.0  # what an overloaded engine or a held budget is waited for without parking
_SEED_BYTES = 7
_FINGERPRINT_CHARACTERS = 32


class Interrupted(Exception):
    """Somebody said something while the model was speaking. What it had said of this turn is in the log."""


class ThinkRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`messages`, `tools`, `tool_choice`, `parallel_tool_calls`: in OpenAI's shape. `model`: "" is the process's.
    `response_format`: a JSON Schema as text. `grammar`: instead of it, without tools. `context_tokens`: how much of the
    window is used, 0 for all. `sampling.seed` 0: the answer's own."""

    messages: Sequence[dict[str, Any]]
    model: str = ""
    tools: Sequence[dict[str, Any]] = ()
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    response_format: str | None = None
    grammar: Grammar | None = None
    thinking: Dial = Dial()
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    context_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as the model will see it."""

    card: ModelCard
    plan: Plan
    request: ThinkRequest


async def nothing(thought: Thought) -> Sequence[Draft]:
    return ()


class Thinker:
    """One for a server."""

    def __init__(self, *, service: Service, database: Database, segments: Segments) -> None:
        self._service = service
        self._database = database
        self._segments = segments
        self._tidied: WeakSet[Holding] = WeakSet()

    async def think(
        self,
        holding: Holding,
        request: ThinkRequest,
        *,
        step: str = "",
        purpose: Purpose = "turn",
        also: Also = nothing,
    ) -> Thought:
        """The model's answer, which is in the log when this returns, with what `also` makes of it. An answer that was
        begun goes on, if it is asked the same way. A turn ends when somebody sends the process a message.

        Raises: Interrupted; Parked, when budget or engine must be waited for; Overloaded, where waiting does not help;
        PromptTooLong, InvalidRequest, ModelNotFound, ModelUnusable, Forbidden, EngineFailed; what `Holding.append`
        raises.
        """
        await self._tidy(holding)
        failures = 0
        while True:
            try:
                thought = await self._attempt(holding, request, step=step, purpose=purpose, also=also)
            except BudgetExhausted as error:
                await budgets.exhausted(holding, error)
            except Overloaded as error:
                await wait_for_room(holding, error)
            except AnswerFailed:
                raise
            except EngineFailed:
                failures += 1
                if failures >= TRIES:
                    raise
            else:
                if thought is not None:
                    return thought
                await self._park_if_spent(holding)

    async def plan(self, holding: Holding, request: ThinkRequest) -> Asked:
        """Raises: ModelNotFound, ModelUnusable, Forbidden, InvalidRequest, Overloaded."""
        model = request.model or holding.view.model
        card = await self._service.card(model, holding.account)
        chat = await self._service.chat(model)
        plan = await chat.plan(
            ChatRequest(
                messages=list(request.messages),
                tools=list(request.tools) or None,
                tool_choice=request.tool_choice,
                parallel_tool_calls=request.parallel_tool_calls,
                response_format=request.response_format,
                grammar=request.grammar,
                thinking=request.thinking,
                max_tokens=request.max_tokens,
                context_tokens=request.context_tokens,
            )
        )
        return Asked(card=card, plan=plan, request=request)

    async def count(self, holding: Holding, request: ThinkRequest) -> int:
        """Tokens of the prompt, also of one that is too long. Raises: as `plan`."""
        asked = await self.plan(holding, request)
        try:
            return await self._service.count(holding.account, _ask_of(holding, asked, seed=0, before=None))
        except PromptTooLong as error:
            return error.have

    async def _attempt(
        self, holding: Holding, request: ThinkRequest, *, step: str, purpose: Purpose, also: Also
    ) -> Thought | None:
        """None: it was ended by its budget, in its middle."""
        asked = await self.plan(holding, request)
        fingerprint = hash_of(asked)
        before = _to_go_on_with(holding.view, fingerprint, purpose=purpose, step=step)
        ask = _ask_of(holding, asked, seed=request.sampling.seed, before=before)
        if before is not None:
            ask = await self._with_what_is_paid(holding.view, ask, asked.card, before)
        kept = None if purpose == "turn" else await self._segments.put(holding.account.id, _kept(request))
        intent = ModelIntent(
            ask_id=ask.id,
            model=asked.card.id,
            limit_tokens=request.max_tokens,
            continues=before.ask_id if before is not None else "",
            step=step,
            purpose=purpose,
            request=kept,
            asked=fingerprint,
        )
        journal = AskJournal(holding, intent)
        answering = Answering(holding, self._segments, ask, asked.plan, journal, before=before, also=also)
        await self._follow(holding, answering, journal, asked.card, interruptible=purpose == "turn")
        if answering.thought is not None:
            return replace(answering.thought, usage=journal.usage)
        if journal.failing is not None:
            raise Interrupted
        return None

    async def _follow(
        self, holding: Holding, answering: Answering, journal: AskJournal, card: ModelCard, *, interruptible: bool
    ) -> None:
        """Until the ask is settled, and what that wrote is folded. Raises: what ended it."""
        consuming = asyncio.create_task(answering.consume(self._service, card.model_hash))
        told = asyncio.create_task(self._told(holding)) if interruptible else None
        try:
            await asyncio.wait({consuming, *({told} if told else ())}, return_when=asyncio.FIRST_COMPLETED)
            if not consuming.done():
                journal.failing = await answering.interrupted()
        finally:
            await _put_away(told, consuming)
        if not consuming.cancelled() and (error := consuming.exception()) is not None:
            if not journal.void:
                await self._refresh(holding, answering)
            raise error
        await self._refresh(holding, answering)

    async def _refresh(self, holding: Holding, answering: Answering) -> None:
        """Raises: StorageUnavailable when the settlement waits for the database: it may still be written, so this run
        knows nothing any more."""
        await holding.refresh()
        open_ask = holding.view.asks.open.get(answering.ask_id)
        if open_ask is not None and open_ask.failed is None:
            raise StorageUnavailable("log", reason="what the model said could not be written yet.")

    async def _told(self, holding: Holding) -> None:
        """Returns when a message waits, and nothing for which the whole run is stopped anyway."""
        while True:
            try:
                kinds = mailbox.kinds_of(await self._database.read(mailbox.KINDS(process=holding.pid)))
            except StorageUnavailable:
                kinds = frozenset()
            if SignalKind.MESSAGE in kinds and not kinds & CONTROL:
                return
            await holding.mail.wait()
            holding.mail.clear()

    async def _with_what_is_paid(self, view: View, ask: Ask, card: ModelCard, before: Turn) -> Ask:
        """What this process paid for with the asks that this one goes on with is not paid for again: the prompt, and
        tokens that were counted and never reached the log. A fork pays for its own, whatever its past has paid."""
        found = [await self._spent(ask_id) for ask_id in before.ask_ids]
        own = [one for one in found if one is not None and one.process == view.pid]
        prompt = sum(one.usage.input for one in own)
        # Settled late, or on another server: whoever spoke had read the prompt. But not for a fork: it would be free.
        if before.emitted and None in found and view.forked_from is None:
            prompt = card.context_tokens
        lost = sum(one.usage.output for one in own) - len(before.emitted) if len(own) == len(found) else 0
        return msgspec.structs.replace(
            ask, paid_prompt_tokens=min(prompt, card.context_tokens), paid_output_tokens=max(0, lost)
        )

    async def _spent(self, ask_id: str) -> Spent | None:
        return await self._database.run(lambda: spent(ask_id))

    async def _tidy(self, holding: Holding) -> None:
        """Once in a run: asks that a death cut off are settled in the log as the ledger has settled them, and timers
        that only woke the process are consumed."""
        if holding in self._tidied:
            return
        self._tidied.add(holding)
        view, drafts = holding.view, list[Draft]()
        for ask_id in [one for one, settled in view.asks.settled.items() if not settled]:
            found = await self._spent(ask_id)
            if found is not None and found.process == holding.pid:
                drafts.append(
                    settled_draft(ask_id, found.usage, cost_micros=found.cost_micros, compute_ms=found.compute_ms)
                )
        for signal in view.signals:
            if signal.signal is SignalKind.TIMER and not signal.about:
                drafts.append(Draft(body=SignalConsumed(received=signal.seq), cause=signal.seq))
        if drafts:
            await holding.append(*drafts)

    async def _park_if_spent(self, holding: Holding) -> None:
        """A budget ended the answer: whose, the process's own or one above; the others refuse the next ask."""
        error = await self._database.run(lambda: budgets.spent(holding.view))
        if error is not None:
            await budgets.exhausted(holding, error)


def _kept(request: ThinkRequest) -> Any:
    """As a segment has it."""
    return msgspec.to_builtins(request, str_keys=True)


def hash_of(asked: Asked) -> str:
    """Token ids of an answer mean something to the same model alone, and behind the same question."""
    question = msgspec.json.encode(asked.request, order="deterministic")
    return hashlib.sha256(f"{asked.card.model_hash}\n".encode() + question).hexdigest()[:_FINGERPRINT_CHARACTERS]


def _to_go_on_with(view: View, fingerprint: str, *, purpose: Purpose, step: str) -> Turn | None:
    """What was said of this very answer already."""
    turn = view.asks.find(purpose=purpose, step=step)
    if turn is None or turn.asked != fingerprint:
        return None
    return turn if turn.failed is None or turn.failed.again else None


def _ask_of(holding: Holding, asked: Asked, *, seed: int, before: Turn | None) -> Ask:
    view, plan, request = holding.view, asked.plan, asked.request
    ask_id = new_id("ask")
    root = before.ask_ids[0] if before is not None else ask_id
    return Ask(
        id=ask_id,
        account=holding.account.id,
        model=asked.card.id,
        parts=plan.parts,
        emitted={0: before.emitted} if before is not None and before.emitted else {},
        ask_class=_class_of(holding),
        limit_tokens=request.max_tokens,
        sampling=msgspec.structs.replace(request.sampling, seed=seed_for(view, seed, root)),
        stop=plan.stop,
        grammar=plan.grammar,
        thinking=plan.thinking,
    )


def _class_of(holding: Holding) -> AskClass:
    """A person who looks is waiting, if the key may have somebody wait."""
    scopes = holding.account.scopes
    may = f"class:{AskClass.INTERACTIVE}" in scopes or not any(scope.startswith("class:") for scope in scopes)
    return AskClass.INTERACTIVE if holding.watched and may else holding.view.ask_class


def seed_for(view: View, seed: int, root: str) -> int:
    """`seed`: as the program wants it, 0 for none. `root`: the ask with which the answer began; perhaps in a past that
    forks share, which are to part there."""
    if view.forked_from is not None:
        return _seed(f"{seed or root}\n{view.pid}")
    return seed or _seed(root)


def _seed(word: str) -> int:
    """The same for an answer that goes on: sampling is a function of seed and position."""
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:_SEED_BYTES], "big")


async def wait_for_room(holding: Holding, error: Overloaded) -> None:
    """Raises: Parked, unless it is for a moment only; the error itself, where waiting does not mend it."""
    seconds = error.retry_after_s
    if seconds is None:
        raise error
    if seconds <= WAIT_IN_PLACE_S:
        await asyncio.sleep(seconds)
    else:
        await holding.park(State.WAITING, Reason.MODEL, due_ms=holding.now_ms() + int(seconds * 1000))


async def _put_away(*tasks: asyncio.Task[None] | None) -> None:
    """Ends them, and waits until what they held is put away. What they raised is the caller's to tell, or, if the
    caller is stopped in this moment, nobody's."""
    live = [task for task in tasks if task is not None]
    for task in live:
        task.cancel()
        task.add_done_callback(_seen)
    await asyncio.wait(live)


def _seen(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()
