"""Background responses: queued with their request, computed by whichever server claims them, read as events.

`Background` (nimbos/responses) holds the claims and the journal; this knows what to compute and how to write an event.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from nimbos.api import responses_request as requests
from nimbos.api.responses_answer import ENDS, Responder, Turn, items_of, joined, pieces_of, split, status_of, teller_of
from nimbos.api.responses_events import Teller
from nimbos.api.responses_wire import Event, Response, event
from nimbos.errors import EngineFailed, InvalidRequest, NimbosError, NotFound, NotReady, Overloaded, StorageUnavailable
from nimbos.responses import Background, Kept, Live, Store
from nimbos.types import Account, Origin
from nimbos.work import Claim, ClaimLost

_LAPSES_MAX = 5  # servers that died while they computed it
_WAIT_S = 86_400  # for a limit to allow it
_END_LINES = (b"event: response.completed\n", b"event: response.incomplete\n", b"event: response.failed\n")
_TRANSIENT = (ClaimLost, NotReady, StorageUnavailable)


class Queued(msgspec.Struct, frozen=True, kw_only=True):
    """A claim's payload. `body` is the request without its input, which is stored, and with the seed that was drawn."""

    account: Account
    body: requests.ResponsesBody
    header_class: str | None
    origin: Origin


class BackgroundResponses:
    def __init__(self, responder: Responder, store: Store, background: Background) -> None:
        self._responder = responder
        self._store = store
        self._background = background

    async def queue(self, turn: Turn, *, header_class: str | None, origin: Origin) -> Response:
        """The response, which is written down when this returns."""
        body = msgspec.structs.replace(turn.body, input=None, seed=turn.sampling.seed)
        queued = Queued(account=turn.account, body=body, header_class=header_class, origin=origin)
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
        begun = joined(kept.echo, kept.body, status="queued", output=[])
        teller = teller_of(begun, queued.body)
        live = await self._background.journal.open(claim.ref, claim)
        try:
            for told in teller.begin():
                live.add(event(told))
            last = await self._last(queued, claim, kept, teller, live)
            live.add(event(last))
            await self._settle(live, kept, last["response"])
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

    async def _last(self, queued: Queued, claim: Claim, kept: Kept, teller: Teller, live: Live) -> Event:
        """The event that ends it; those before it are told on the way."""
        try:
            if claim.lapses > _LAPSES_MAX:
                raise EngineFailed(f"The server died {claim.lapses} times while it computed this answer.")
            past = await self._store.past_at(queued.account.id, kept.input_node)
            turn = await self._responder.again(
                queued.account,
                queued.body,
                teller.response,
                past,
                header_class=queued.header_class,
                origin=queued.origin,
            )
            async with aclosing(self._responder.computed(turn, teller)) as events:
                async for told in events:
                    if told["type"] in ENDS:
                        return told
                    live.add(event(told))
                    await self._background.journal.flush_when_due(kept.id, live)
            raise AssertionError("an answer without an end")
        except _TRANSIENT:
            raise
        except Overloaded as error:
            if time.time() - kept.created_ms / 1000 < _WAIT_S:
                raise  # its turn will come
            return teller.fail(error)
        except NimbosError as error:
            return teller.fail(error)

    async def _settle(self, live: Live, kept: Kept, response: Response) -> None:
        _, body = split(response)
        output = pieces_of(response.output)
        await self._background.settle(live, kept, status=status_of(response), body=body, output=output)
