"""An agent: think, call what the model wants, think again, until an answer calls nothing; that ends it.

    Begin ─▶ Think ─▶ Call … ─▶ Think ─▶ … ─▶ Answer ─▶ exit
               ▲  Listen (somebody said something)  │
               └──────── an answer that does not fit ◀┘

`decide` is pure: what is next is a function of the view alone, so whoever claims the process after a crash goes on at
the same place. `Agent` performs one step after the other; each is in the log before the next is decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from nimbos.errors import (
    BrokenProgram,
    EngineFailed,
    Forbidden,
    InvalidRequest,
    ModelUnusable,
    NotFound,
    Overloaded,
    PromptTooLong,
)
from nimbos.kernel.answering import Thought
from nimbos.kernel.answers import Misfit, NothingFits, value_of
from nimbos.kernel.context import Window, estimate, load, tokens_of, window_of
from nimbos.kernel.events import CtxChanged, Segment, SignalConsumed
from nimbos.kernel.eviction import make_room
from nimbos.kernel.fold import Received, View
from nimbos.kernel.gate import Gate, Outcome
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.requests import request_of, tools_shown
from nimbos.kernel.segments import Segments, text_of
from nimbos.kernel.showing import CUT, MISFIT, TOOL, headed, returned, shown, spoken
from nimbos.kernel.think import Interrupted, Thinker, ThinkRequest, wait_for_room
from nimbos.kernel.together import perform
from nimbos.kernel.tools import WorkerDied
from nimbos.kernel.words import Reason, SignalKind
from nimbos.service import Service

COUNT_ABOVE = 0.5  # of the room, by estimate: from there on a prompt is counted before it is asked
_GIVEN_SHARE = 2  # so much of the room may be what an agent is given, or told at once
_BYTES_PER_TOKEN = 3


@dataclass(frozen=True, slots=True)
class Begin:
    """Nothing is in view: the program and its goal come first."""


@dataclass(frozen=True, slots=True)
class Listen:
    signals: tuple[Received, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """What the last answer calls; `together.py` says how many of it at once."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`segment`: the last message, which calls nothing."""

    segment: Segment


@dataclass(frozen=True, slots=True)
class GiveUp:
    why: str


@dataclass(frozen=True, slots=True)
class Think:
    """`corrected`: the last answer was not what it must be, so nothing else is let through now."""

    corrected: bool = False


Step: TypeAlias = Begin | Listen | Call | Answer | GiveUp | Think


def decide(view: View, *, turns_most: int) -> Step:
    """What is next. Calls that are open are brought to an end before (`Gate.finish_open`)."""
    if not view.context:
        return Begin()
    if view.wanted:
        return Call()
    said = tuple(signal for signal in view.signals if signal.signal is SignalKind.MESSAGE)
    if said:
        return Listen(said)
    last = view.context[-1]
    if last.kind == "assistant" and not last.id.endswith(CUT):
        return Answer(last)
    if view.turns >= turns_most:
        return GiveUp(
            f"It has thought {view.turns} times without coming to an answer, and its program allows {turns_most} "
            "(`limits.turns`). Its events show what it repeats: say more clearly when it is done, or raise the limit."
        )
    return Think(corrected=last.id.endswith(MISFIT))


class Agent:
    """One for a server."""

    def __init__(self, *, service: Service, thinker: Thinker, gate: Gate, segments: Segments) -> None:
        self._service = service
        self._thinker = thinker
        self._gate = gate
        self._segments = segments

    async def drive(self, holding: Holding) -> None:
        """Raises: Parked, Exited; whatever ends the run so that another one goes on."""
        try:
            await self._gate.finish_open(holding, also=self._telling(holding))
            while True:
                await holding.take_mail()
                step = decide(holding.view, turns_most=holding.program.manifest.limits.turns)
                try:
                    await self._perform(holding, step)
                except Overloaded as error:
                    await wait_for_room(holding, error)
        except (InvalidRequest, NotFound, Forbidden, ModelUnusable, EngineFailed, Overloaded) as error:
            await holding.exit(Reason.FAILED, error=error.message)
        except (BrokenProgram, WorkerDied) as error:
            await holding.exit(Reason.FAILED, error=f"The program's tools cannot be used: {error}")

    async def _perform(self, holding: Holding, step: Step) -> None:
        match step:
            case Begin():
                await self._begin(holding)
            case Listen(signals):
                await self._listen(holding, signals)
            case Call():
                await perform(self._gate, holding, also=self._telling(holding))
            case Answer(segment):
                await self._answer(holding, segment)
            case GiveUp(why):
                await holding.exit(Reason.FAILED, error=why)
            case Think(corrected):
                await self._think(holding, corrected=corrected)

    async def _begin(self, holding: Holding) -> None:
        """The stable part: the program, then the goal, which stays in view."""
        added: list[Segment] = []
        instructions = holding.program.instructions.strip()
        if instructions:
            message = {"role": "system", "content": instructions}
            added.append(await shown(self._segments, holding, message, id="system", kind="system"))
        given = await self._segments.get(holding.view.account, holding.view.input)
        room = await self._room_bytes(holding)
        added.append(await headed(self._segments, holding, given, head_bytes=room, id="goal", kind="goal", pinned=True))
        await holding.append(Draft(body=CtxChanged(add=tuple(added))))

    async def _listen(self, holding: Holding, signals: Sequence[Received]) -> None:
        """Each message becomes the user's; one from another process says from whom it is. What the model had begun to
        say when it was paused stands before them."""
        room, drafts = await self._room_bytes(holding), await self._begun(holding)
        for signal in signals:
            said = await self._segments.get(holding.view.account, signal.body) if signal.body else ""
            stranger = signal.source.startswith("process:")
            label = TOOL if stranger else None
            if stranger:
                said = f"[Message from {signal.source}] {text_of(said)}"
            id = f"signal.{signal.seq}"
            heard = await headed(
                self._segments, holding, said, head_bytes=room // len(signals), id=id, kind="user", label=label
            )
            drafts.append(Draft(body=SignalConsumed(received=signal.seq), cause=signal.seq))
            drafts.append(Draft(body=CtxChanged(add=(heard,)), cause=signal.seq, label=heard.label))
        await holding.append(*drafts)

    async def _begun(self, holding: Holding) -> list[Draft]:
        """The words of a turn that was cut off, unless they were a call."""
        turn = holding.view.turn
        if turn is None or not turn.text.strip() or (turn.failed is not None and not turn.failed.again):
            return []
        id = f"{turn.ask_id}{CUT}"
        if id in holding.view.shown.places or turn.text.lstrip().startswith("{") or "<tool_call>" in turn.text:
            return []
        tokens = len(turn.emitted)
        return [await spoken(self._segments, holding, f"{turn.text.rstrip()} …", "", (), id=id, tokens=tokens)]

    async def _think(self, holding: Holding, *, corrected: bool) -> None:
        request, window = await self._request(holding, corrected=corrected)
        have = tokens_of(holding.view.context) + estimate(msgspec.json.encode(request.tools))
        if have > COUNT_ABOVE * window.room:
            have = await self._thinker.count(holding, request)
            if have > window.room:
                await make_room(holding, self._thinker, self._segments, window=window, have_tokens=have)
                return
        try:
            await self._thinker.think(holding, request, also=self._saying(holding))
        except Interrupted:
            return  # the mail is taken next
        except PromptTooLong as error:
            await make_room(holding, self._thinker, self._segments, window=window, have_tokens=error.have)

    async def _answer(self, holding: Holding, segment: Segment) -> None:
        """Exits with it, or tells the model what is wrong with it: an answer that says nothing may come once."""
        message = await self._segments.get(holding.view.account, segment.hash)
        said_before = holding.view.context[-2] if len(holding.view.context) > 1 else segment
        text = str(message.get("content") or "")
        try:
            if not text.strip() and not said_before.id.endswith(MISFIT):
                raise Misfit("The answer is empty.")
            value = value_of(text, holding.program.answer)
        except NothingFits as broken:
            await holding.exit(Reason.FAILED, error=str(broken))
            return
        except Misfit as misfit:
            said = {"role": "user", "content": f"{misfit} Give the answer again, and nothing but the answer."}
            note = await shown(self._segments, holding, said, id=f"{segment.id}{MISFIT}", kind="note")
            await holding.append(Draft(body=CtxChanged(add=(note,))))
            return
        await holding.exit(Reason.OK, result=await self._segments.put(holding.view.account, value))

    def _saying(self, holding: Holding) -> _Saying:
        return _Saying(self._segments, holding)

    def _telling(self, holding: Holding) -> _Telling:
        return _Telling(self._segments, holding)

    async def next_request(self, holding: Holding) -> ThinkRequest:
        """What the model is asked where the view stands, if it is asked there: for replays."""
        step = decide(holding.view, turns_most=holding.view.turns + 1)
        request, _ = await self._request(holding, corrected=isinstance(step, Think) and step.corrected)
        return request

    async def _request(self, holding: Holding, *, corrected: bool) -> tuple[ThinkRequest, Window]:
        program = holding.program
        messages = await load(self._segments, holding.view.account, holding.view.context)
        offered = tools_shown(await self._gate.tools(holding), holding.view)
        request = request_of(program, messages, [tool.wire for tool in offered], corrected=corrected)
        return request, await self._window(holding)

    async def _window(self, holding: Holding) -> Window:
        needs = holding.program.manifest.model
        card = await self._service.card(holding.view.model, holding.account)
        return window_of(card.context_tokens, needs.context_tokens, needs.max_tokens)

    async def _room_bytes(self, holding: Holding) -> int:
        return (await self._window(holding)).room // _GIVEN_SHARE * _BYTES_PER_TOKEN


@dataclass(frozen=True, slots=True)
class _Saying:
    """Puts what the model said into its view, in the transaction that settles the ask."""

    segments: Segments
    holding: Holding

    async def __call__(self, thought: Thought) -> Sequence[Draft]:
        return (
            await spoken(
                self.segments,
                self.holding,
                thought.text,
                thought.thinking,
                thought.calls,
                id=thought.ask_id,
                tokens=thought.tokens,
            ),
        )


@dataclass(frozen=True, slots=True)
class _Telling:
    """Puts what came of a call into view, in the transaction that writes its outcome."""

    segments: Segments
    holding: Holding

    async def __call__(self, outcome: Outcome) -> Sequence[Draft]:
        return await returned(self.segments, self.holding, outcome)
