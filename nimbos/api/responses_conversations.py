"""`/v1/conversations`: named contexts, to which responses add what was said. Items are as in `responses_items.py`."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimbos.api import body as bodies
from nimbos.api.access import account_of
from nimbos.api.exchange import json_reply
from nimbos.api.responses_items import Item, check_context, read_items, restored
from nimbos.api.responses_query import check_query, listed, page_of, paging
from nimbos.api.responses_record import pieces_of
from nimbos.api.responses_request import metadata_of
from nimbos.api.responses_wire import Conversation as ConversationBody
from nimbos.api.responses_wire import Deleted
from nimbos.config import ServerSettings
from nimbos.errors import InvalidRequest
from nimbos.responses import Conversation, Conversations, Store

_ROUTE = "/v1/conversations"
_ITEMS_AT_ONCE = 20


class CreateBody(msgspec.Struct, kw_only=True):
    items: list[Any] | None = None
    metadata: dict[str, str] | None = None


class UpdateBody(msgspec.Struct, kw_only=True):
    metadata: dict[str, str] | None = None


class ItemsBody(msgspec.Struct, kw_only=True):
    items: list[Any]


class ConversationRoutes:
    def __init__(self, store: Store, conversations: Conversations, settings: ServerSettings) -> None:
        self._store = store
        self._conversations = conversations
        self._settings = settings

    def routes(self) -> list[Route]:
        one = f"{_ROUTE}/{{conversation_id}}"
        return [
            Route(_ROUTE, self.create, methods=["POST"]),
            Route(one, self.retrieve, methods=["GET"]),
            Route(one, self.update, methods=["POST"]),
            Route(one, self.delete, methods=["DELETE"]),
            Route(f"{one}/items", self.add_items, methods=["POST"]),
            Route(f"{one}/items", self.list_items, methods=["GET"]),
            Route(f"{one}/items/{{item_id}}", self.retrieve_item, methods=["GET"]),
            Route(f"{one}/items/{{item_id}}", self.delete_item, methods=["DELETE"]),
        ]

    async def create(self, request: Request) -> Response:
        body = bodies.decode(await self._read(request) or b"{}", CreateBody)
        account = account_of(request).id
        items = await self._items(account, body.items or [])
        check_context(items)
        pieces = pieces_of(items)
        made = await self._conversations.create(account, metadata=metadata_of(body.metadata), pieces=pieces)
        return json_reply(_shown(made))

    async def retrieve(self, request: Request) -> Response:
        check_query(request)
        return json_reply(_shown(await self._conversations.get(account_of(request).id, _id(request))))

    async def update(self, request: Request) -> Response:
        body = bodies.decode(await self._read(request), UpdateBody)
        metadata = metadata_of(body.metadata)
        return json_reply(_shown(await self._conversations.describe(account_of(request).id, _id(request), metadata)))

    async def delete(self, request: Request) -> Response:
        check_query(request)
        await self._conversations.delete(account_of(request).id, _id(request))
        return json_reply(Deleted(id=_id(request), object="conversation.deleted"))

    async def add_items(self, request: Request) -> Response:
        body = bodies.decode(await self._read(request, "include"), ItemsBody)
        account = account_of(request).id
        if not 1 <= len(body.items) <= _ITEMS_AT_ONCE:
            raise InvalidRequest(
                f"`items` has {len(body.items)} entries; there must be 1 to {_ITEMS_AT_ONCE}.", param="items"
            )
        items = await self._items(account, body.items)
        past = await self._conversations.past(account, _id(request))
        check_context([*(restored(piece.id, piece.content) for piece in past.pieces), *items])
        await self._conversations.add(account, _id(request), past, pieces_of(items))
        return json_reply(listed(items, has_more=False))

    async def list_items(self, request: Request) -> Response:
        account = account_of(request).id
        wanted = paging(request)
        placed = await self._conversations.placed(account, _id(request))
        return json_reply(await page_of(self._store, account, placed, wanted))

    async def retrieve_item(self, request: Request) -> Response:
        check_query(request, "include")
        found = await self._conversations.item(account_of(request).id, _id(request), request.path_params["item_id"])
        return json_reply(restored(found.id, found.content))

    async def delete_item(self, request: Request) -> Response:
        check_query(request)
        item_id = request.path_params["item_id"]
        return json_reply(_shown(await self._conversations.take_away(account_of(request).id, _id(request), item_id)))

    async def _items(self, account: str, given: list[Any]) -> list[Item]:
        """References become what they refer to."""
        items = []
        for item in read_items(given, param="items"):
            if item["type"] == "item_reference":
                piece = await self._store.named(account, item["id"])
                item = restored(piece.id, piece.content)
            items.append(item)
        return items

    async def _read(self, request: Request, *known: str) -> bytes:
        check_query(request, *known)
        return await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )


def _id(request: Request) -> str:
    conversation_id: str = request.path_params["conversation_id"]
    return conversation_id


def _shown(conversation: Conversation) -> ConversationBody:
    return ConversationBody(
        id=conversation.id, created_at=conversation.created_ms // 1000, metadata=conversation.metadata
    )
