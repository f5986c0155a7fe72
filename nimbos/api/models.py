"""`GET /v1/models` and `GET /v1/models/{id}`: what can be asked for, scripted models first.

A client that sends `anthropic-version` reads Anthropic's form of it (`anthropic_models.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from nimbos.accounts import allowed_model
from nimbos.api import anthropic_models
from nimbos.api.access import account_of
from nimbos.api.anthropic_errors import VERSION_HEADER
from nimbos.api.exchange import json_reply
from nimbos.errors import ModelNotFound
from nimbos.service import Service
from nimbos.sources import Listed


class Facts(msgspec.Struct, kw_only=True):
    kind: str
    architecture: str
    parameters: int
    quantisation: str
    context_tokens: int
    licence: str
    size_bytes: int


class ModelBody(msgspec.Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str
    x_nimbos: Facts | UnsetType = UNSET


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[ModelBody]


class Models:
    def __init__(self, service: Service, aliases: Mapping[str, str]) -> None:
        self._service = service
        self._aliases = aliases

    async def list(self, request: Request) -> Response:
        models = await self._shown(request)
        if VERSION_HEADER in request.headers:
            return json_reply(anthropic_models.page(models, self._aliases, request.query_params))
        return json_reply(ModelList(data=[_body(listed) for listed in models]))

    async def retrieve(self, request: Request) -> Response:
        wanted = request.path_params["model"]
        models = await self._shown(request)
        if VERSION_HEADER in request.headers:
            return json_reply(anthropic_models.one(models, self._aliases, wanted))
        for listed in models:
            if listed.id == wanted:
                return json_reply(_body(listed))
        raise ModelNotFound(wanted, have=tuple(listed.id for listed in models))

    async def _shown(self, request: Request) -> Sequence[Listed]:
        """Those that the key may ask."""
        account = account_of(request)
        return [listed for listed in await self._service.models() if allowed_model(account, listed.id)]


def _body(listed: Listed) -> ModelBody:
    body = ModelBody(id=listed.id, created=listed.created, owned_by=listed.owner)
    if listed.model is not None:
        facts = listed.model.facts
        body.x_nimbos = Facts(
            kind=facts.kind,
            architecture=facts.architecture,
            parameters=facts.parameters,
            quantisation=facts.quantisation,
            context_tokens=facts.context_tokens,
            licence=facts.licence,
            size_bytes=listed.model.size_bytes,
        )
    return body
