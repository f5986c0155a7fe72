"""Background responses: queued with their request, computed by whichever server claims them, read as events.

`Background` (nimbos/responses) holds the claims and the journal; this knows what to compute and how to write an event.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from nimbos.accounts import Authority, allowed_route
from nimbos.api import responses_request as requests
from nimbos.api.responses_answer import ENDS, Call, Responder, Turn, teller_of
from nimbos.api.responses_events import Teller
from nimbos.api.responses_record import items_of, joined, pieces_of, split, status_of
from nimbos.api.responses_wire import Event, Response, event
from nimbos.db import Transaction
from nimbos.errors import (
    EngineFailed,
    Forbidden,
    InvalidRequest,
    NimbosError,
    NotFound,
    NotReady,
    Overloaded,
    StorageUnavailable,
)
from nimbos.ledger import Attempt, Attempts
from nimbos.responses import Background, Ending, Kept, Live, Store
from nimbos.types import Account, Origin
from nimbos.work import Claim, ClaimLost

_LAPSES_MAX = 5  # servers that died while they computed it
_WAIT_S = 86_400  # for a limit to allow it
_END_LINES = (b"event: response.completed\n", b"event: response.incomplete\n", b"event: response.failed\n")
_TRANSIENT = (ClaimLost, NotReady, StorageUnavailable)


class Queued(msgspec.Struct, frozen=True, kw_only=True):
    """A claim's payload. `body` is the request without its input, which is stored, and with the seed that was drawn.
    `attempts`: at its answer, before this one."""

    account: Account
    body: requests.ResponsesBody
    header_class: str | None
    origin: Origin
    attempts: Attempts = Attempts()


class BackgroundResponses:
    def __init__(self, responder: Responder, store: Store, background: Background, authority: Authority) -> None:
        self._responder = responder
        self._authority = authority
        self._store = store
        self._background = background

    async def queue(self, turn: Turn, call: Call) -> Response:
        """The response, which is written down when this returns."""
        body = msgspec.structs.replace(turn.body, input=None, seed=turn.sampling.seed)
        queued = Queued(account=call.account, body=body, header_class=call.header_class, origin=call.origin)
        await self._background.queue(turn.answered(turn.response), msgspec.msgpack.encode(queued))
        return turn.response

    async def run(self, claim: Claim) -> None:
        """Raises: ClaimLost; what another attempt may mend."""
        queued = msgspec.msgpack.decode(claim.payload, type=Queued)
        try:
            kept = await self._store.fetch(queued.account.id, claim.ref)
        except NotFound:
            await self._background.drop(claim)
            return
        teller = teller_of(joined(kept.echo, kept.body, status="queued", output=[]), queued.body)
        live = await self._background.journal.open(claim.ref, claim)
        try:
            for told in teller.begin():
                live.add(event(told))
            ending = self._background.ending(live, kept, await self._attempt(queued, claim))
            try:
                await self._compute(queued, claim, kept, teller, live, ending)
            except _TRANSIENT:
                raise
            except NimbosError as error:
                if isinstance(error, Overloaded) and time.time() - kept.created_ms / 1000 < _WAIT_S:
                    raise  # its turn will come
                await _end(ending, live, teller.fail(error))
            await ending.finish()
        finally:
            self._background.journal.close(claim.ref, live)

    async def read(self, response: Response, account: Account, *, after: int) -> AsyncGenerator[bytes, None]:
        """The events behind number `after`, to the end. Where the end was not an answer's own (cancelled), or was
        passed already in an earlier attempt, the response as it stands is the last event."""
        last = after
        ended = False
        async with aclosing(self._background.journal.read(response.id, after=after)) as events:
            async for written in events:
                last += 1
                ended = written.startswith(_END_LINES)
                yield written
        if ended:
            return
        try:
            kept = await self._store.fetch(account.id, response.id)
        except NotFound:
            return  # deleted
        whole = await self.response_of(kept)
        kind = whole.status if f"response.{whole.status}" in ENDS else "incomplete"
        yield event({"type": f"response.{kind}", "sequence_number": last + 1, "response": whole})

    async def response_of(self, kept: Kept) -> Response:
        output = items_of(tuple(await self._store.output_of(kept)))
        return joined(kept.echo, kept.body, status=kept.status, output=output)

    async def check_readable(self, kept: Kept) -> None:
        """Raises: InvalidRequest when there are no events to be had."""
        if not kept.background:
            raise InvalidRequest(
                f"The response {kept.id} was not made with `background: true`, so it has no events to read again.",
                param="stream",
            )
        over = kept.status not in ("queued", "in_progress", "cancelled")  # which may have ended before it began
        if over and not await self._background.journal.any(kept.id):
            raise InvalidRequest(
                f"The events of {kept.id} are no longer kept. Retrieve it without `stream`.", param="stream"
            )

    async def _attempt(self, queued: Queued, claim: Claim) -> Attempt:
        def keep(known: Callable[[], Attempts]) -> Transaction[None]:
            def payload() -> bytes:
                return msgspec.msgpack.encode(msgspec.structs.replace(queued, attempts=known()))

            yield from self._background.keep(claim, payload)

        return Attempt(await self._background.settled(queued.attempts), keep)

    async def _compute(
        self, queued: Queued, claim: Claim, kept: Kept, teller: Teller, live: Live, ending: Ending
    ) -> None:
        """The last event is told before the ask is settled, so that the settlement writes the end."""
        if claim.lapses > _LAPSES_MAX:
            raise EngineFailed(f"{claim.lapses} servers ended while this was computed; it is not tried again.")
        account = await self._authority.check(queued.account)
        if not allowed_route(account, queued.origin.route):
            raise Forbidden(f"This key may not use {queued.origin.route} any more.")
        call = Call(account=account, header_class=queued.header_class, origin=queued.origin, journal=ending)
        past = await self._store.past_at(queued.account.id, kept.input_node)
        turn = await self._responder.again(call, queued.body, teller.response, past)
        async with aclosing(self._responder.computed(turn, teller)) as events:
            async for told in events:
                if told["type"] in ENDS:
                    await _end(ending, live, told)
                else:
                    live.add(event(told))
                    await self._background.journal.flush_when_due(kept.id, live)


async def _end(ending: Ending, live: Live, told: Event) -> None:
    live.add(event(told))
    response: Response = told["response"]
    _, body = split(response)
    await ending.prepare(status=status_of(response), body=body, output=pieces_of(response.output))
