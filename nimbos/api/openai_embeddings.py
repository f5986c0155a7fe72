"""`POST /v1/embeddings`."""

from __future__ import annotations

import base64
from contextlib import aclosing
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from nimbos.api import body as bodies
from nimbos.api import openai_wire as wire
from nimbos.api.access import account_of
from nimbos.api.exchange import headers_of, json_reply
from nimbos.api.fields import Tier, class_of
from nimbos.api.prompts import prompts_of
from nimbos.api.sse import or_gone
from nimbos.api.vectors import floats, shortened
from nimbos.batches import AnswerJournal, Reply
from nimbos.config import ServerSettings
from nimbos.errors import InvalidRequest, UnsupportedField
from nimbos.runtime import Runtime
from nimbos.service import Service
from nimbos.types import Account, Admission, Ask, Final, Kind, Origin, Usage, VectorChunk, new_id

INPUTS_MAX = 2_048
ORIGIN = Origin(route="/v1/embeddings")


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    service_tier: Tier | None = None


class Embeddings:
    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self._service = service
        self._settings = settings

    async def create(self, request: Request) -> Response:
        content = await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )
        body = bodies.decode(content, EmbeddingsBody)
        account = account_of(request)
        wanted = self.understand(account, body, header_class=request.headers.get("x-nimbos-class"))
        ask = await or_gone(request, wanted)
        admission = Admission()
        reply = await or_gone(request, self.embed(account, ask, body, admission=admission))
        return json_reply(reply, headers=headers_of(ask, admission))

    async def understand(self, account: Account, body: EmbeddingsBody, *, header_class: str | None) -> Ask:
        parts = prompts_of(body.input, param="input", most=INPUTS_MAX, special=False)
        ask_class = class_of(body.service_tier, None, header_class, account)
        card = await self._service.card(body.model, account)
        if card.kind is not Kind.EMBED:
            raise InvalidRequest(
                f"The model {card.id!r} makes text, not embeddings; `nimbos models` shows which do.", param="model"
            )
        if body.dimensions is not None and not 1 <= body.dimensions <= card.embedding_size:
            raise UnsupportedField(
                "dimensions", why=f"{body.dimensions}; this model has {card.embedding_size}, and fewer can be taken"
            )
        return Ask(
            id=new_id("ask"),
            account=account.id,
            model=card.id,
            kind=Kind.EMBED,
            parts=tuple(parts),
            ask_class=ask_class,
        )

    async def embed(
        self,
        account: Account,
        ask: Ask,
        body: EmbeddingsBody,
        *,
        admission: Admission | None = None,
        origin: Origin = ORIGIN,
        journal: AnswerJournal | None = None,
    ) -> wire.EmbeddingList:
        vectors: dict[int, bytes] = {}
        listed: wire.EmbeddingList | None = None
        generated = self._service.generate(account, ask, origin=origin, admission=admission, journal=journal)
        async with aclosing(generated) as chunks:
            async for chunk in chunks:
                if isinstance(chunk, VectorChunk):
                    vectors[chunk.index] = shortened(chunk.values, body.dimensions)
                elif isinstance(chunk, Final):
                    listed = _listed(ask, vectors, chunk.usage, body.encoding_format)
                    if journal is not None:
                        journal.answered(Reply(200, wire.encode(listed), ask.id))
        assert listed is not None
        return listed


async def perform(
    runtime: Runtime, account: Account, body: bytes, *, origin: Origin, journal: AnswerJournal | None = None
) -> Reply:
    """The route without HTTP, for a line of a batch. Raises: what the route would answer with an error."""
    decoded = bodies.decode(body, EmbeddingsBody)
    route = Embeddings(runtime.service, runtime.settings.server)
    ask = await route.understand(account, decoded, header_class=None)
    listed = await route.embed(account, ask, decoded, origin=origin, journal=journal)
    return Reply(200, wire.encode(listed), ask.id)


def _listed(ask: Ask, vectors: dict[int, bytes], usage: Usage, encoding: str | None) -> wire.EmbeddingList:
    data = [
        wire.EmbeddingBody(index=index, embedding=_written(vectors[index], encoding)) for index in range(len(ask.parts))
    ]
    counted = wire.EmbeddingUsage(prompt_tokens=usage.input, total_tokens=usage.input)
    return wire.EmbeddingList(data=data, model=ask.model, usage=counted)


def _written(values: bytes, encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(values).decode("ascii")
    return floats(values)
