"""`GET /openapi.json`: our own description of the API, made of the routes and of the structs that bodies are read into.

Fields that are refused by name are not in it: docs/api.md has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import nimbos
from nimbos.api import anthropic_errors, dashscope_wire, errors, ollama_wire
from nimbos.api.openapi_operations import JSON, Operation, operations, plain_path
from nimbos.api.openapi_queries import Query, queries

_REF = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)\}")
_KEYLESS = ("/health", "/v1/console/login")
_UNSAID: dict[str, Any] = {}  # any JSON
_ERRORS: tuple[tuple[str, type[msgspec.Struct]], ...] = (
    ("/api/v1/", dashscope_wire.ErrorBody),
    ("/api/", ollama_wire.ErrorBody),
    ("/v1/messages", anthropic_errors.ErrorBody),
    ("/", errors.ErrorBody),
)


class Description:
    """Made at its first use: it names every struct of the API."""

    def __init__(self) -> None:
        self._routes: list[Route] = []
        self._written: bytes | None = None

    def routes(self, others: list[Route]) -> list[Route]:
        """All routes of the app: the others, and this one."""
        self._routes = [*others, Route("/openapi.json", self.get, methods=["GET"])]
        return self._routes

    async def get(self, _: Request) -> Response:
        if self._written is None:
            self._written = msgspec.json.encode(document(self._routes))
        return Response(self._written, media_type=JSON)


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """An OpenAPI 3.1 document. What no table tells of is described as taking and giving any JSON."""
    known, asked = operations(), queries()
    named = [
        (method, plain_path(route.path), known.get(f"{method} {plain_path(route.path)}", Operation()))
        for route in routes
        for method in sorted((route.methods or set()) - {"HEAD"})
    ]
    references, components = _components([operation for _, _, operation in named])
    paths: dict[str, dict[str, Any]] = {}
    for method, path, operation in named:
        query = asked.get(f"{method} {path}", ())
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, operation, query, references)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Nimbos", "version": nimbos.__version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _components(used: list[Operation]) -> tuple[dict[type, Any], dict[str, Any]]:
    """A reference for each struct, and what is behind the references."""
    structs: dict[type, None] = {}
    for operation in used:
        for struct in (operation.takes, operation.gives):
            if isinstance(struct, type):
                structs[struct] = None
    structs |= dict.fromkeys(struct for _, struct in _ERRORS)
    schemas, components = msgspec.json.schema_components(structs, ref_template=_REF)
    return dict(zip(structs, schemas, strict=True)), components


def _operation(
    method: str, path: str, operation: Operation, query: Query, references: dict[type, Any]
) -> dict[str, Any]:
    error = next(struct for prefix, struct in _ERRORS if path.startswith(prefix))
    given = references[operation.gives] if operation.gives is not None else _UNSAID
    content = {JSON: {"schema": given}, **{media: {"schema": _UNSAID} for media in operation.media}}
    described: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_"),
        "tags": [_tag(path)],
        "responses": {
            "200": {"description": "Done.", "content": content},
            "default": {"description": "Refused or failed.", "content": {JSON: {"schema": references[error]}}},
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PARAMETER.findall(path)
    ]
    parameters += [parameter.described() for parameter in query]
    if parameters:
        described["parameters"] = parameters
    if operation.takes is not None:
        described["requestBody"] = _body(operation.takes, references)
    if path in _KEYLESS:
        described["security"] = []
    return described


def _body(takes: type[msgspec.Struct] | str, references: dict[type, Any]) -> dict[str, Any]:
    if isinstance(takes, str):
        return {"required": True, "content": {takes: {"schema": {"type": "object"}}}}
    return {"required": True, "content": {JSON: {"schema": references[takes]}}}


def _tag(path: str) -> str:
    """Whose words a route speaks."""
    if path.startswith("/api/"):
        return "dashscope" if path.startswith("/api/v1/") else "ollama"
    if path.startswith("/v1/messages"):
        return "anthropic"
    if path.startswith(("/v1/organization", "/v1/console")):
        return "administration"
    if path.startswith(("/v1/processes", "/v1/programs")):
        return "agents"
    return "openai" if path.startswith("/v") else "server"
