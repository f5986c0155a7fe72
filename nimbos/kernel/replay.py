"""Replays: a log folded again without doing anything, and its questions put to another model, to see where they part.

Each question is what the log says that the model was asked: the view before its `model.intent`, or the request that a
step kept. So both models are always asked the same, also behind the place where they part, and nothing that the other
one wants is done. What it costs is the account's, and not the process's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import msgspec

from nimbos.chat import Delta, Plan, Splitter, fold
from nimbos.errors import AnswerFailed, InvalidRequest
from nimbos.kernel.agent import Agent
from nimbos.kernel.answering import CALLS_MAX
from nimbos.kernel.chain import decoded
from nimbos.kernel.events import ModelDone, ModelIntent
from nimbos.kernel.fold import View
from nimbos.kernel.gate import Gate
from nimbos.kernel.holding import Holding, Shared
from nimbos.kernel.log import Holder
from nimbos.kernel.mailbox import queue_of
from nimbos.kernel.processes import Head
from nimbos.kernel.programs import Programs
from nimbos.kernel.segments import Segments
from nimbos.kernel.think import Thinker, ThinkRequest, hash_of, seed_for
from nimbos.kernel.tools import ToolWorkers, Workspaces
from nimbos.service import Service
from nimbos.types import Account, Ask, AskClass, Origin, TokenChunk, new_id
from nimbos.work import Claim

ROUTE = "/v1/processes/replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """`calls`: name and arguments, in order; the ids are each ask's own. `error`: it could not be asked."""

    text: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One answer in the log, and what came of the same question now. `seq`: of its `model.intent`. `now` None: nobody
    was asked. `same_question`: that the very same was asked is proven by the hash in the log; None: it cannot be told,
    as it was another model. `common_characters`: of the two texts, from their beginning."""

    seq: int
    ask_id: str
    purpose: str
    step: str
    model: str
    then: Said
    now: Said | None = None
    same_question: bool | None = None
    common_characters: int = 0

    @property
    def same(self) -> bool:
        return self.now is not None and self.now == self.then


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """The end of a replay. `agrees`: the fold is what the head says."""

    events: int
    state: str
    reason: str
    agrees: bool
    turns: int
    calls: int


class Replays:
    def __init__(self, shared: Shared, *, service: Service, programs: Programs, workspaces: Workspaces) -> None:
        self._shared = shared
        self._service = service
        self._programs = programs
        self._workspaces = workspaces

    async def replay(self, account: Account, head: Head, *, model: str = "") -> AsyncGenerator[Replayed | Folded, None]:
        """Its answers in order, and then the end. `model`: who is asked again; "": nobody. Close the iterator
        (`contextlib.aclosing`).

        Raises: ModelNotFound, ModelUnusable, Forbidden, Overloaded, BudgetExhausted, StorageUnavailable, Illegal,
        FromNewerVersion, BrokenProgram.
        """
        view, intents = View(), dict[str, tuple[ModelIntent, int, View]]()
        async with AsyncExitStack() as closing:
            onlooker = await self._onlooker(account, head, model, closing) if model else None
            async for event in self._shared.log.all(head.pid):
                body = decoded(event)
                if isinstance(body, ModelIntent):
                    begun = intents.pop(body.continues, None)
                    intents[body.ask_id] = begun or (body, event.seq, view.copy() if onlooker else view)
                view.apply(event)
                if isinstance(body, ModelDone):
                    root, seq, before = intents.pop(body.ask_id)
                    message = await self._shared.segments.get(view.account, body.message)
                    told = Replayed(
                        seq=seq,
                        ask_id=body.ask_id,
                        purpose=root.purpose,
                        step=root.step,
                        model=root.model,
                        then=_said(message),
                    )
                    yield told if onlooker is None else await onlooker.ask_again(told, root, before)
        yield Folded(
            events=view.seq,
            state=view.state.value,
            reason=view.reason.value,
            agrees=view.seq > head.seq or (view.hash, view.state, view.reason) == (head.hash, head.state, head.reason),
            turns=view.turns,
            calls=view.calls_made,
        )

    async def _onlooker(self, account: Account, head: Head, model: str, closing: AsyncExitStack) -> _Onlooker:
        """Its tools are described by a worker of its own, in an empty folder."""
        await self._service.card(model, account)
        pid = new_id("replay")
        closing.push_async_callback(self._workspaces.drop, pid)
        workers = ToolWorkers(self._programs, self._workspaces)
        thinker = Thinker(service=self._service, database=self._shared.database, segments=self._shared.segments)
        gate = Gate(self._shared, programs=self._programs, workers=workers)
        queue = queue_of(head.account)
        claim = Claim(kind=queue, ref=head.pid, payload=b"", owner=pid, epoch=0, lapses=0)  # nobody's: writes nothing
        holder = Holder(pid=pid, claim=claim, epoch=0)
        holding = Holding(self._shared, account=account, view=View(), holder=holder, closing=closing)
        holding.program = await self._programs.load(head.program)
        agent = Agent(service=self._service, thinker=thinker, gate=gate, segments=self._shared.segments)
        return _Onlooker(
            holding=holding,
            agent=agent,
            thinker=thinker,
            service=self._service,
            segments=self._shared.segments,
            model=model,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Onlooker:
    """Somebody with the process's view at any moment, who asks another model what that would have said."""

    holding: Holding
    agent: Agent
    thinker: Thinker
    service: Service
    segments: Segments
    model: str

    async def ask_again(self, told: Replayed, root: ModelIntent, before: View) -> Replayed:
        self.holding.view = before
        try:
            request = await self._request(root)
            asked = await self.thinker.plan(self.holding, msgspec.structs.replace(request, model=self.model))
            now = await self._answer(asked.plan, request, root, asked.card.id)
        except (InvalidRequest, AnswerFailed) as error:
            return replace(told, now=Said(error=error.message))
        proven = None
        if asked.card.id == root.model:
            proven = hash_of(replace(asked, request=request)) == root.asked
        pairs = zip(told.then.text, now.text, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return replace(told, now=now, same_question=proven, common_characters=common)

    async def _request(self, root: ModelIntent) -> ThinkRequest:
        if root.request is None:
            return await self.agent.next_request(self.holding)
        kept = await self.segments.get(self.holding.view.account, root.request)
        return msgspec.convert(kept, ThinkRequest, strict=False)

    async def _answer(self, plan: Plan, request: ThinkRequest, root: ModelIntent, model: str) -> Said:
        """With the numbers that chance had then: the same model says the same."""
        seed = seed_for(self.holding.view, request.sampling.seed, root.ask_id)
        ask = Ask(
            id=new_id("ask"),
            account=self.holding.account.id,
            model=model,
            parts=plan.parts,
            ask_class=AskClass.BATCH,
            limit_tokens=request.max_tokens,
            sampling=msgspec.structs.replace(request.sampling, seed=seed),
            stop=plan.stop,
            grammar=plan.grammar,
            thinking=plan.thinking,
        )
        splitter, pieces = Splitter(plan), list[Delta]()
        generated = self.service.generate(self.holding.account, ask, origin=Origin(route=ROUTE))
        async with aclosing(generated) as chunks:
            async for chunk in chunks:
                if isinstance(chunk, TokenChunk):
                    pieces += splitter.feed(chunk)
        folded = fold([*pieces, *splitter.finish()])
        return Said(
            text=folded.content or "",
            calls=tuple((call.name, call.arguments) for call in folded.tool_calls[:CALLS_MAX]),
        )


def _said(message: Mapping[str, Any]) -> Said:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return Said(
        text=str(message.get("content") or ""),
        calls=tuple((function["name"], function["arguments"]) for function in functions),
    )
