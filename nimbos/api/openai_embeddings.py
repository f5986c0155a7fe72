"""`POST /v1/embeddings`."""

from __future__ import annotations

import base64
from contextlib import aclosing
from typing import Literal

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from nimbos.api import body as bodies
from nimbos.api import openai_wire as wire
from nimbos.api.access import account_of
from nimbos.api.exchange import headers_of, json_reply
from nimbos.api.fields import Tier, class_of
from nimbos.api.prompts import prompts_of
from nimbos.api.sse import or_gone
from nimbos.config import ServerSettings
from nimbos.errors import InvalidRequest, UnsupportedField
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
        ask = await or_gone(request, self._understand(request, body, account))
        admission = Admission()
        reply = await or_gone(request, self._embed(account, ask, body, admission))
        return json_reply(reply, headers=headers_of(ask, admission))

    async def _understand(self, request: Request, body: EmbeddingsBody, account: Account) -> Ask:
        parts = prompts_of(body.input, param="input", most=INPUTS_MAX, special=False)
        ask_class = class_of(body.service_tier, None, request.headers.get("x-nimbos-class"), account)
        card = await self._service.card(body.model)
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

    async def _embed(
        self, account: Account, ask: Ask, body: EmbeddingsBody, admission: Admission
    ) -> wire.EmbeddingList:
        vectors: dict[int, bytes] = {}
        usage = Usage()
        async with aclosing(self._service.generate(account, ask, origin=ORIGIN, admission=admission)) as chunks:
            async for chunk in chunks:
                if isinstance(chunk, VectorChunk):
                    vectors[chunk.index] = _cut(chunk.values, body.dimensions)
                elif isinstance(chunk, Final):
                    usage = usage + chunk.usage
        data = [
            wire.EmbeddingBody(index=index, embedding=_written(vectors[index], body.encoding_format))
            for index in range(len(ask.parts))
        ]
        counted = wire.EmbeddingUsage(prompt_tokens=usage.input, total_tokens=usage.input)
        return wire.EmbeddingList(data=data, model=ask.model, usage=counted)


def _cut(values: bytes, dimensions: int | None) -> bytes:
    """The first `dimensions` values at length 1 again, as OpenAI does it."""
    if dimensions is None:
        return values
    vector = np.frombuffer(values, dtype="<f4")[:dimensions]
    length = float(np.linalg.norm(vector))
    return (vector / length if length else vector).astype("<f4").tobytes()


def _written(values: bytes, encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(values).decode("ascii")
    return [float(value) for value in np.frombuffer(values, dtype="<f4")]
