"""From a request's body to its answer's events: the past is looked up, the question asked, the answer told and kept.

Streamed, whole, in the background and in a batch it is the same `tell`. Read `responses_events.py` for the events,
`responses_fit.py` for contexts that are too long, `nimbos/responses/store.py` for what is kept.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

from msgspec.structs import replace

from nimbos.api import openai_wire as wire
from nimbos.api import responses_request as requests
from nimbos.api.dialogue import Asked, Question, answer, understand
from nimbos.api.responses_events import Teller
from nimbos.api.responses_fit import dropped_of, fit, writable
from nimbos.api.responses_items import Item, check_context, read_items, restored
from nimbos.api.responses_record import begun_of, items_of, pieces_of, split, status_of
from nimbos.api.responses_wire import Event, Extension, Response, Truncated
from nimbos.batches import AnswerJournal, Reply
from nimbos.errors import NimbosError, PromptTooLong, StorageUnavailable
from nimbos.responses import Answered, Conversations, Past, Piece, Store
from nimbos.service import Service
from nimbos.types import Account, Origin, Sampling

ROUTE = "/v1/responses"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Who asks, and how. `header_class`: of `x-nimbos-class`."""

    account: Account
    header_class: str | None
    origin: Origin
    journal: AnswerJournal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A request that was understood. `own`: its items, and `items` the whole context, but for `dropped`.
    `response`: as it begins."""

    account: Account
    body: requests.ResponsesBody
    past: Past
    own: tuple[Piece, ...]
    items: Sequence[Item]
    dropped: list[str]
    sampling: Sampling
    asked: Asked
    question: Question
    response: Response

    def answered(self, response: Response) -> Answered:
        """What is to be kept of it, with `response` as it stands now."""
        echo, body = split(response)
        return Answered(
            id=response.id,
            account=self.account.id,
            status=status_of(response),
            past=self.past,
            asked=self.own,
            output=pieces_of(response.output),
            echo=echo,
            body=body,
            conversation=self.body.conversation_id,
            background=response.background,
            store=self.body.store is not False,
        )


class Responder:
    def __init__(self, service: Service, store: Store, conversations: Conversations) -> None:
        self._service = service
        self._store = store
        self._conversations = conversations

    async def turn(self, call: Call, body: requests.ResponsesBody) -> Turn:
        """Raises: InvalidRequest, UnsupportedField, NotFound, Conflict; what `Store.check` and `understand` raise."""
        requests.check(body)
        past = await self.past(call.account, body)
        asked = await self.own_items(call.account, body)
        items = (*items_of(past.pieces), *asked)
        check_context(items)
        own = pieces_of(asked)
        if _keeps(body):
            await self._store.check(call.account.id, past, own)
        return await self._understood(call, body, past, own=own, items=items)

    async def again(self, call: Call, body: requests.ResponsesBody, begun: Response, past: Past) -> Turn:
        """A response that was stored when it began; `past`: with its own items."""
        return await self._understood(call, body, past, own=(), items=tuple(items_of(past.pieces)), begun=begun)

    async def _understood(
        self,
        call: Call,
        body: requests.ResponsesBody,
        past: Past,
        *,
        own: tuple[Piece, ...],
        items: Sequence[Item],
        begun: Response | None = None,
    ) -> Turn:
        written = items
        if body.truncation == "auto":
            written = writable(items, [len(piece.content) for piece in (*past.pieces, *own)])
        sampling = requests.sampling_of(body)
        asked = requests.asked(
            body, list(written), call.account, sampling, header_class=call.header_class, origin=call.origin
        )
        question = await understand(self._service, call.account, asked, journal=call.journal)
        return Turn(
            account=call.account,
            body=body,
            past=past,
            own=own,
            items=written,
            dropped=dropped_of(items, written),
            sampling=sampling,
            asked=asked,
            question=question,
            response=begun or begun_of(body, question, sampling),
        )

    async def past(self, account: Account, body: requests.ContextFields) -> Past:
        """Raises: NotFound, Conflict, InvalidRequest."""
        if body.previous_response_id is not None:
            return await self._store.past_of(account.id, body.previous_response_id)
        if body.conversation_id is not None:
            return await self._conversations.past(account.id, body.conversation_id)
        return Past()

    async def own_items(self, account: Account, body: requests.ContextFields) -> list[Item]:
        """The input's items; references become what they refer to. Raises: NotFound; what `read_items` raises."""
        return await self.resolved(account, read_items(body.input or []))

    async def resolved(self, account: Account, items: list[Item]) -> list[Item]:
        found: list[Item] = []
        for item in items:
            if item["type"] == "item_reference":
                piece = await self._store.named(account.id, item["id"])
                item = restored(piece.id, piece.content)
            found.append(item)
        return found

    async def count(self, account: Account, body: requests.ContextFields, items: list[Item]) -> int:
        """Tokens of the prompt, also where it is too long. Raises: what `understand` raises."""
        asked = Asked(
            model=body.model,
            request=lambda card: requests.chat_request(body, items, card),
            sampling=Sampling(),
            origin=Origin(route=f"{ROUTE}/input_tokens"),
        )
        question = await understand(self._service, account, asked)
        try:
            return await self._service.count(account, question.ask)
        except PromptTooLong as error:
            return error.have

    async def tell(self, turn: Turn) -> AsyncGenerator[Event, None]:
        """The answer's events; before the last of them the response is kept. Closing it cancels the ask, and then
        nothing is kept.

        Raises: what is known before the model has begun, and StorageUnavailable.
        """
        teller = teller_of(turn.response, turn.body)
        try:
            async with aclosing(self.computed(turn, teller)) as events:
                async for event in events:
                    if event["type"] in ENDS:
                        await self._keep(turn, event["response"])
                    yield event
        except StorageUnavailable:
            raise
        except NimbosError as error:
            if not teller.begun:
                raise
            failed = teller.fail(error)
            with suppress(StorageUnavailable):  # the failure is told anyway
                await self._keep(turn, failed["response"])
            yield failed

    async def whole(self, turn: Turn) -> Response:
        """Raises: whatever ended the answer early, as there is no stream to say it in."""
        teller = teller_of(turn.response, turn.body)
        async with aclosing(self.computed(turn, teller)) as events:
            async for event in events:
                if event["type"] in ENDS:
                    await self._keep(turn, teller.response)
                    if turn.question.journal is not None:
                        turn.question.journal.answered(reply_of(turn, teller.response))
        return teller.response

    async def computed(self, turn: Turn, teller: Teller) -> AsyncGenerator[Event, None]:
        """The answer's events, and nothing kept. With a journal the last of them comes before the ask is settled: then
        go on to the end. Raises: what ends it early.
        """
        question = turn.question
        happenings = answer(self._service, question)
        try:
            try:
                happening = await anext(happenings)
            except PromptTooLong as error:
                await happenings.aclose()
                if turn.body.truncation != "auto":
                    raise
                question, truncated = await fit(self._service, turn.asked, turn.question, turn.body, turn.items, error)
                happenings = answer(self._service, question)
                happening = await anext(happenings)
            else:
                truncated = Truncated(
                    dropped_items=[],
                    prompt_tokens=question.admission.prompt_tokens,
                    limit_tokens=question.card.context_tokens - 1,
                )
            if dropped := [*turn.dropped, *truncated.dropped_items]:
                teller.response.x_nimbos = Extension(truncated=replace(truncated, dropped_items=dropped))
            for event in teller.begin():
                yield event
            for event in teller.add(happening, question):
                yield event
            async for happening in happenings:
                for event in teller.add(happening, question):
                    yield event
        finally:
            await happenings.aclose()

    async def _keep(self, turn: Turn, response: Response) -> None:
        if _keeps(turn.body):
            await self._store.keep(turn.answered(response))


def _keeps(body: requests.ResponsesBody) -> bool:
    return body.store is not False or body.conversation_id is not None


def teller_of(response: Response, body: requests.ResponsesBody) -> Teller:
    sealed = requests.ENCRYPTED in (body.include or [])
    return Teller(response, summary=requests.summary_asked(body) is not None, sealed=sealed)


ENDS = frozenset(["response.completed", "response.incomplete", "response.failed"])


def reply_of(turn: Turn, response: Response) -> Reply:
    return Reply(200, wire.encode(response), turn.question.ask.id)
