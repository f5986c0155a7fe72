"""OpenAI's Responses API: `/v1/responses` and what hangs under it.

The request is in `responses_request.py`, the walk from it to an answer in `responses_answer.py`, background answers in
`responses_background.py`, conversations in `responses_conversations.py`. State is kept by `nimbos/responses`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimbos.accounts import Authority
from nimbos.api import body as bodies
from nimbos.api import responses_request as requests
from nimbos.api.access import account_of
from nimbos.api.errors import body_of
from nimbos.api.exchange import ask_headers, event_stream, json_reply
from nimbos.api.responses_answer import ROUTE, Call, Responder, Turn, reply_of
from nimbos.api.responses_background import BackgroundResponses
from nimbos.api.responses_compact import Compactor
from nimbos.api.responses_conversations import ConversationRoutes
from nimbos.api.responses_items import check_context
from nimbos.api.responses_query import check_query, page_of, paging, retrieval
from nimbos.api.responses_record import items_of
from nimbos.api.responses_wire import Deleted, Event, TokenCount, event, failure
from nimbos.api.sse import Framing, or_gone
from nimbos.batches import AnswerJournal, Endpoint, Reply
from nimbos.config import ServerSettings
from nimbos.errors import InvalidRequest, UnsupportedField
from nimbos.responses import Background, Conversations, Store
from nimbos.runtime import Runtime
from nimbos.service import Service
from nimbos.types import Account, Origin

FRAMING = Framing(error=failure)


class ResponseRoutes:
    def __init__(
        self,
        service: Service,
        settings: ServerSettings,
        store: Store,
        background: Background,
        responder: Responder,
        authority: Authority,
    ) -> None:
        self._service = service
        self._settings = settings
        self._store = store
        self._background = background
        self._responder = responder
        self._queue = BackgroundResponses(responder, store, background, authority)
        self._compactor = Compactor(service, responder)

    def attend(self) -> None:
        """Background responses are done from now on. Within a running loop."""
        self._background.attend(self._queue.run)

    async def create(self, request: Request) -> Response:
        body = bodies.decode(await self._read(request), requests.ResponsesBody, refused=requests.REFUSED)
        call = Call(
            account=account_of(request), header_class=request.headers.get("x-nimbos-class"), origin=Origin(route=ROUTE)
        )
        turn = await or_gone(request, self._responder.turn(call, body))
        if body.background:
            return await self._create_in_background(request, turn, call)
        if body.stream:
            return await event_stream(
                request,
                _written(self._responder.tell(turn)),
                headers=lambda: ask_headers(turn.question),
                settings=self._settings,
                framing=FRAMING,
            )
        whole = await or_gone(request, self._responder.whole(turn))
        return json_reply(whole, headers=ask_headers(turn.question))

    async def perform(self, call: Call, content: bytes) -> Reply:
        """A request without HTTP, as a line of a batch. Raises: NimbosError."""
        body = bodies.decode(content, requests.ResponsesBody, refused=requests.REFUSED)
        for name in ("stream", "background"):
            if getattr(body, name):
                raise UnsupportedField(name, why="not for a line of a batch: nobody waits for it")
        turn = await self._responder.turn(call, body)
        return reply_of(turn, await self._responder.whole(turn))

    async def retrieve(self, request: Request) -> Response:
        account = account_of(request)
        wanted = retrieval(request)
        kept = await self._store.fetch(account.id, request.path_params["response_id"])
        whole = await self._queue.response_of(kept)
        if not wanted.stream:
            return json_reply(whole)
        await self._queue.check_readable(kept)
        events = self._queue.read(whole, account, after=wanted.starting_after)
        return await event_stream(request, events, headers=dict, settings=self._settings, framing=FRAMING)

    async def delete(self, request: Request) -> Response:
        check_query(request)
        response_id = request.path_params["response_id"]
        await self._background.delete(account_of(request).id, response_id)
        return json_reply(Deleted(id=response_id, object="response"))

    async def cancel(self, request: Request) -> Response:
        account = account_of(request)
        response_id = request.path_params["response_id"]
        kept = await self._store.fetch(account.id, response_id)
        if not kept.background:
            raise InvalidRequest(
                f"The response {response_id} was not made with `background: true`; closing its connection cancels it.",
                param="response_id",
            )
        await self._background.cancel(account.id, response_id)
        return json_reply(await self._queue.response_of(await self._store.fetch(account.id, response_id)))

    async def input_items(self, request: Request) -> Response:
        account = account_of(request)
        wanted = paging(request)
        kept = await self._store.fetch(account.id, request.path_params["response_id"])
        placed = await self._store.placed_at(kept.input_node)
        return json_reply(await page_of(self._store, account.id, placed, wanted))

    async def input_tokens(self, request: Request) -> Response:
        body = bodies.decode(await self._read(request), requests.CountBody)
        account = account_of(request)
        requests.check_context_fields(body)
        past = await self._responder.past(account, body)
        items = [*items_of(past.pieces), *await self._responder.own_items(account, body)]
        check_context(items)
        count = await or_gone(request, self._responder.count(account, body, items))
        return json_reply(TokenCount(input_tokens=count))

    async def compact(self, request: Request) -> Response:
        content = await self._read(request)
        account = account_of(request)
        header_class = request.headers.get("x-nimbos-class")
        compacted, headers = await or_gone(
            request, self._compactor.compact(account, content, header_class=header_class)
        )
        return json_reply(compacted, headers=headers)

    async def _create_in_background(self, request: Request, turn: Turn, call: Call) -> Response:
        begun = await self._queue.queue(turn, call)
        if not turn.body.stream:
            return json_reply(begun)
        events = self._queue.read(begun, turn.account, after=-1)
        return await event_stream(request, events, headers=dict, settings=self._settings, framing=FRAMING)

    async def _read(self, request: Request) -> bytes:
        check_query(request)
        return await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )


def made(runtime: Runtime) -> ResponseRoutes:
    """One for each server: what it attends to, it attends to once."""
    responder = Responder(runtime.service, runtime.responses, Conversations(runtime.responses))
    settings = runtime.settings.server
    authority = Authority(runtime.database)
    return ResponseRoutes(runtime.service, settings, runtime.responses, runtime.background, responder, authority)


def routes(runtime: Runtime) -> list[Route]:
    """Call it once, within a running loop: background responses begin to be done."""
    responses = made(runtime)
    responses.attend()
    conversations = ConversationRoutes(runtime.responses, Conversations(runtime.responses), runtime.settings.server)
    one = f"{ROUTE}/{{response_id}}"
    return [
        Route(ROUTE, responses.create, methods=["POST"]),
        Route(f"{ROUTE}/compact", responses.compact, methods=["POST"]),
        Route(f"{ROUTE}/input_tokens", responses.input_tokens, methods=["POST"]),
        Route(one, responses.retrieve, methods=["GET"]),
        Route(one, responses.delete, methods=["DELETE"]),
        Route(f"{one}/cancel", responses.cancel, methods=["POST"]),
        Route(f"{one}/input_items", responses.input_items, methods=["GET"]),
        *conversations.routes(),
    ]


def endpoints(runtime: Runtime) -> list[Endpoint]:
    """What a line of a batch may name."""
    return [Endpoint(path=ROUTE, perform=partial(perform, runtime), refuse=body_of)]


async def perform(
    runtime: Runtime, account: Account, body: bytes, *, origin: Origin, journal: AnswerJournal | None = None
) -> Reply:
    """A line of a batch. Raises: NimbosError."""
    call = Call(account=account, header_class=None, origin=origin, journal=journal)
    return await made(runtime).perform(call, body)


async def _written(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for told in events:
            yield event(told)
