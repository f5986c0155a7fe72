"""`POST /v1/rerank`: documents by how well they answer a query, in the shape that Jina and Cohere share."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimbos.api import body as bodies
from nimbos.api.access import account_of
from nimbos.api.exchange import headers_of, json_reply
from nimbos.api.fields import Tier, class_of
from nimbos.api.sse import or_gone
from nimbos.config import ServerSettings
from nimbos.errors import InvalidRequest, UnsupportedField
from nimbos.runtime import Runtime
from nimbos.service import Service
from nimbos.types import Account, Admission, Ask, Final, Kind, Origin, ScoreChunk, Text, Usage, new_id

PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")
DOCUMENTS_MAX = 1_000
_CUTTING = "a document that is too long is told, not cut: cut it yourself, where it hurts least"
REFUSED = {
    "max_tokens_per_doc": _CUTTING,
    "max_chunks_per_doc": _CUTTING,
    "truncation": _CUTTING,
    "rank_fields": "send the text to be ranked as `text`",
    "return_embeddings": "rerankers make no vectors",
    "instruction": "a reranker is asked as it was trained to be",
}


class RerankBody(msgspec.Struct, kw_only=True):
    model: str
    query: str | dict[str, Any]
    documents: list[str | dict[str, Any]]
    top_n: int | None = None
    return_documents: bool | None = None
    user: str | None = None
    service_tier: Tier | None = None


class Document(msgspec.Struct):
    text: str


class Result(msgspec.Struct, kw_only=True):
    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class TokensRead(msgspec.Struct):
    """Jina's `usage`."""

    prompt_tokens: int
    total_tokens: int


class ApiVersion(msgspec.Struct):
    version: str = "2"


class BilledUnits(msgspec.Struct):
    input_tokens: int


class Meta(msgspec.Struct, kw_only=True):
    """Cohere's."""

    billed_units: BilledUnits
    tokens: BilledUnits
    api_version: ApiVersion = msgspec.field(default_factory=ApiVersion)


class Ranking(msgspec.Struct, kw_only=True):
    id: str
    model: str
    results: list[Result]
    usage: TokensRead
    meta: Meta
    object: str = "list"


class Rerank:
    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self._service = service
        self._settings = settings

    async def create(self, request: Request) -> Response:
        content = await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )
        body = bodies.decode(content, RerankBody, refused=REFUSED)
        account, texts = account_of(request), _texts(body.documents)
        header_class = request.headers.get("x-nimbos-class")
        ask = await or_gone(request, self._understand(account, body, texts, header_class=header_class))
        admission, origin = Admission(), Origin(route=request.url.path)
        scores, usage = await or_gone(request, self._score(account, ask, origin, admission))
        best = sorted(scores, key=lambda index: (-scores[index], index))[: body.top_n]
        results = [
            Result(
                index=index,
                relevance_score=scores[index],
                document=Document(texts[index]) if body.return_documents else UNSET,
            )
            for index in best
        ]
        billed = BilledUnits(usage.input)
        reply = Ranking(
            id=ask.id,
            model=ask.model,
            results=results,
            usage=TokensRead(usage.input, usage.input),
            meta=Meta(billed_units=billed, tokens=billed),
        )
        return json_reply(reply, headers=headers_of(ask, admission))

    async def _understand(
        self, account: Account, body: RerankBody, texts: list[str], *, header_class: str | None
    ) -> Ask:
        query = _text_of(body.query, "query")
        if body.top_n is not None and body.top_n < 1:
            raise InvalidRequest("`top_n` must be 1 or more.", param="top_n")
        ask_class = class_of(body.service_tier, None, header_class, account)
        card = await self._service.card(body.model, account)
        if card.kind is not Kind.RERANK:
            raise InvalidRequest(
                f"The model {card.id!r} is no reranker; `nimbos models` shows which are, and "
                "`nimbos pull qwen3-reranker:0.6b` gets one.",
                param="model",
            )
        return Ask(
            id=new_id("ask"),
            account=account.id,
            model=card.id,
            kind=Kind.RERANK,
            parts=tuple(Text(text, special=False) for text in (query, *texts)),
            ask_class=ask_class,
        )

    async def _score(
        self, account: Account, ask: Ask, origin: Origin, admission: Admission
    ) -> tuple[dict[int, float], Usage]:
        scores: dict[int, float] = {}
        usage = Usage()
        async with aclosing(self._service.generate(account, ask, origin=origin, admission=admission)) as chunks:
            async for chunk in chunks:
                if isinstance(chunk, ScoreChunk):
                    scores[chunk.index] = chunk.score
                elif isinstance(chunk, Final):
                    usage = usage + chunk.usage
        return scores, usage


def routes(runtime: Runtime) -> list[Route]:
    create = Rerank(runtime.service, runtime.settings.server).create
    return [Route(path, create, methods=["POST"]) for path in PATHS]


def _texts(documents: list[str | dict[str, Any]]) -> list[str]:
    """Raises: InvalidRequest, UnsupportedField for what is not text."""
    if not 1 <= len(documents) <= DOCUMENTS_MAX:
        raise InvalidRequest(
            f"`documents` has {len(documents)} entries; there may be 1 to {DOCUMENTS_MAX}.", param="documents"
        )
    return [_text_of(document, f"documents[{number}]") for number, document in enumerate(documents)]


def _text_of(given: str | dict[str, Any], at: str) -> str:
    text = given.get("text") if isinstance(given, dict) else given
    if not isinstance(text, str) or (isinstance(given, dict) and len(given) > 1):
        raise UnsupportedField(at, why="not a text or an object with `text` alone, which is all that is read here")
    if not text.strip():
        raise InvalidRequest(f"`{at}` is empty.", param=at)
    return text
