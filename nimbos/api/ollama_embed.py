"""`POST /api/embed` and its elder `POST /api/embeddings`."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from nimbos.api import body as bodies
from nimbos.api import ollama_wire as told
from nimbos.api.access import account_of
from nimbos.api.exchange import headers_of, json_reply
from nimbos.api.fields import class_of
from nimbos.api.lenient import Ignored, object_at, read_known
from nimbos.api.ollama_request import plain_name, read_options
from nimbos.api.sse import or_gone
from nimbos.api.vectors import Vectors, check_dimensions, embed, embedding_ask
from nimbos.config import ServerSettings
from nimbos.service import Service
from nimbos.types import Admission, Origin


class EmbedCall(msgspec.Struct, kw_only=True):
    """A text that is too long is an error also with `truncate`, which is then named as ignored."""

    model: str
    input: str | list[str] | None = None
    dimensions: int | None = None
    truncate: bool | None = None
    keep_alive: float | str | None = None


class EmbeddingsCall(msgspec.Struct, kw_only=True):
    model: str
    prompt: str | None = None
    keep_alive: float | str | None = None


class Embedding:
    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self._service = service
        self._settings = settings

    async def embed(self, request: Request) -> Response:
        clock, ignored = told.Clock(), Ignored()
        table = await self._table(request, ignored)
        call = read_known(table, EmbedCall, ignored)
        if call.truncate:
            ignored.add("truncate", known=True)
        texts = [call.input] if isinstance(call.input, str) and call.input else call.input or []
        if not texts:
            await or_gone(request, self._service.card(plain_name(call.model), account_of(request)))
            return json_reply(_reply(call.model, clock, None), headers=ignored.header())
        made, headers = await self._vectors(
            request, call.model, list(texts), param="input", dimensions=call.dimensions, clock=clock
        )
        return json_reply(_reply(call.model, clock, made), headers={**headers, **ignored.header()})

    async def embeddings(self, request: Request) -> Response:
        clock, ignored = told.Clock(), Ignored()
        call = read_known(await self._table(request, ignored), EmbeddingsCall, ignored)
        if not call.prompt:
            await or_gone(request, self._service.card(plain_name(call.model), account_of(request)))
            return json_reply(told.EmbeddingsReply([]), headers=ignored.header())
        made, headers = await self._vectors(
            request, call.model, [call.prompt], param="prompt", dimensions=None, clock=clock
        )
        return json_reply(told.EmbeddingsReply(made.floats()[0]), headers={**headers, **ignored.header()})

    async def _table(self, request: Request, ignored: Ignored) -> dict[str, Any]:
        """The body without its options, which are checked and do nothing for a vector."""
        content = await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )
        table = bodies.table_of(content)
        read_options(object_at(table, "options"), ignored)
        return {name: value for name, value in table.items() if name != "options"}

    async def _vectors(
        self, request: Request, model: str, texts: list[str], *, param: str, dimensions: int | None, clock: told.Clock
    ) -> tuple[Vectors, dict[str, str]]:
        account, admission = account_of(request), Admission()
        ask_class = class_of(None, None, request.headers.get("x-nimbos-class"), account)
        card = await or_gone(request, self._service.card(plain_name(model), account))
        clock.load()
        check_dimensions(card, dimensions, param="dimensions")
        ask = embedding_ask(card, account, texts, param=param, ask_class=ask_class)
        origin = Origin(route=request.url.path)
        work = embed(self._service, account, ask, dimensions=dimensions, origin=origin, admission=admission)
        made = await or_gone(request, work)
        return made, headers_of(ask, admission)


def _reply(model: str, clock: told.Clock, made: Vectors | None) -> told.EmbedReply:
    ended = time.perf_counter_ns()
    return told.EmbedReply(
        model=model,
        embeddings=made.floats() if made is not None else [],
        total_duration=ended - clock.came,
        load_duration=(clock.loaded or ended) - clock.came,
        prompt_eval_count=made.usage.input if made is not None else 0,
    )
