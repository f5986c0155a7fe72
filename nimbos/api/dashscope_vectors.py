"""DashScope's embeddings and rerank; multimodal embeddings are refused by name."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any, Literal

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from nimbos.api import body as bodies
from nimbos.api import dashscope_wire as told
from nimbos.api import errors
from nimbos.api.access import account_of
from nimbos.api.dashscope_request import read_model
from nimbos.api.exchange import headers_of, json_reply
from nimbos.api.fields import class_of
from nimbos.api.lenient import Ignored, object_at, read_known
from nimbos.api.sse import or_gone
from nimbos.api.vectors import check_dimensions, embed, embedding_ask
from nimbos.config import ServerSettings
from nimbos.errors import InvalidRequest, NimbosError, UnsupportedField
from nimbos.service import Service
from nimbos.types import Account, Admission, Ask, AskClass, Final, Kind, Origin, ScoreChunk, Text, Usage, new_id

DOCUMENTS_MAX = 500

_NO_INSTRUCTION = {"instruct": "write it into the texts themselves"}


class EmbeddingParameters(msgspec.Struct, kw_only=True):
    """`text_type` is a hint: these models make the same vector of a query and of a document."""

    text_type: Literal["query", "document"] | None = None
    dimension: int | None = None
    output_type: str | None = None


class _EmbeddingInput(msgspec.Struct, kw_only=True):
    texts: list[str] | str


class RerankParameters(msgspec.Struct, kw_only=True):
    return_documents: bool | None = None
    top_n: int | None = None


class _RerankInput(msgspec.Struct, kw_only=True):
    query: str
    documents: list[str | dict[str, Any]]


class EmbeddingBody(msgspec.Struct, kw_only=True):
    """The whole body, for our description of the API, as the next one."""

    model: str
    input: _EmbeddingInput
    parameters: EmbeddingParameters | None = None


class RerankBody(msgspec.Struct, kw_only=True):
    model: str
    input: _RerankInput
    parameters: RerankParameters | None = None


class Embeddings:
    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self._service = service
        self._settings = settings

    async def create(self, request: Request) -> Response:
        table = await _table(request, self._settings)
        ignored, account = Ignored(), account_of(request)
        model = read_model(table, ignored, request.headers)
        given = read_known(
            object_at(table, "input"),
            _EmbeddingInput,
            ignored,
            at="input",
            refused={"file": "send the texts", "url": "send the texts"},
        )
        parameters = read_known(
            object_at(table, "parameters"), EmbeddingParameters, ignored, at="parameters", refused=_NO_INSTRUCTION
        )
        if parameters.output_type not in (None, "dense"):
            raise UnsupportedField("parameters.output_type", why=f"{parameters.output_type!r:.60}; there is 'dense'")
        ask_class = _class_of(request, account)
        card = await or_gone(request, self._service.card(model, account))
        check_dimensions(card, parameters.dimension, param="parameters.dimension")
        texts = [given.texts] if isinstance(given.texts, str) else given.texts
        ask = embedding_ask(card, account, texts, param="input.texts", ask_class=ask_class)
        admission, origin = Admission(), Origin(route=request.url.path)
        work = embed(self._service, account, ask, dimensions=parameters.dimension, origin=origin, admission=admission)
        try:
            made = await or_gone(request, work)
        except NimbosError as error:
            return errors.response_to(error, told.shape_of(ask.id))
        rows = [told.Embedding(text_index=number, embedding=vector) for number, vector in enumerate(made.floats())]
        reply = told.EmbeddingsReply(
            output=told.Embeddings(rows), usage=told.TotalUsage(made.usage.input), request_id=ask.id
        )
        return json_reply(reply, headers={**headers_of(ask, admission), **ignored.header()})


class Rerank:
    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self._service = service
        self._settings = settings

    async def create(self, request: Request) -> Response:
        table = await _table(request, self._settings)
        ignored, account = Ignored(), account_of(request)
        model = read_model(table, ignored, request.headers)
        given = read_known(object_at(table, "input"), _RerankInput, ignored, at="input")
        parameters = read_known(
            object_at(table, "parameters"), RerankParameters, ignored, at="parameters", refused=_NO_INSTRUCTION
        )
        documents = _documents(given.documents)
        if parameters.top_n is not None and parameters.top_n < 1:
            raise InvalidRequest("`parameters.top_n` must be 1 or more.", param="parameters.top_n")
        ask_class = _class_of(request, account)
        card = await or_gone(request, self._service.card(model, account))
        if card.kind is not Kind.RERANK:
            raise InvalidRequest(f"The model {card.id!r} cannot rank; it is of the kind {card.kind.value!r}.")
        ask = Ask(
            id=new_id("ask"),
            account=account.id,
            model=card.id,
            kind=Kind.RERANK,
            parts=tuple(Text(text, special=False) for text in (given.query, *documents)),
            ask_class=ask_class,
        )
        admission = Admission()
        try:
            scores, usage = await or_gone(
                request, self._scores(account, ask, Origin(route=request.url.path), admission)
            )
        except NimbosError as error:
            return errors.response_to(error, told.shape_of(ask.id))
        reply = _ranking(ask, scores, usage, documents, parameters)
        return json_reply(reply, headers={**headers_of(ask, admission), **ignored.header()})

    async def _scores(
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


def _ranking(
    ask: Ask, scores: dict[int, float], usage: Usage, documents: list[str], parameters: RerankParameters
) -> told.RankingReply:
    """The best first; of equal ones the earlier."""
    best = sorted(scores, key=lambda index: (-scores[index], index))[: parameters.top_n]
    results = [
        told.Ranked(
            index=index,
            relevance_score=scores[index],
            document=told.Document(documents[index]) if parameters.return_documents else UNSET,
        )
        for index in best
    ]
    return told.RankingReply(output=told.Ranking(results), usage=told.TotalUsage(usage.input), request_id=ask.id)


async def refuse_multimodal(_: Request) -> Response:
    raise UnsupportedField(
        "multimodal-embedding", why="not supported: this server's models read text; use text-embedding"
    )


async def _table(request: Request, settings: ServerSettings) -> dict[str, Any]:
    content = await bodies.read(request, limit_bytes=settings.max_body_bytes, stall_s=settings.stall_write_s)
    return bodies.table_of(content)


def _class_of(request: Request, account: Account) -> AskClass:
    return class_of(None, None, request.headers.get("x-nimbos-class"), account)


def _documents(given: list[str | dict[str, Any]]) -> list[str]:
    """Raises: InvalidRequest, also for documents that are not text."""
    if not 1 <= len(given) <= DOCUMENTS_MAX:
        raise InvalidRequest(
            f"`input.documents` has {len(given)} entries; there may be 1 to {DOCUMENTS_MAX}.", param="input.documents"
        )
    texts: list[str] = []
    for number, document in enumerate(given):
        at = f"input.documents[{number}]"
        text = document.get("text") if isinstance(document, dict) else document
        if not isinstance(text, str):
            raise UnsupportedField(at, why="not text, which is all that this server's models read")
        if not text:
            raise InvalidRequest(f"`{at}` is an empty string.", param=at)
        texts.append(text)
    return texts
