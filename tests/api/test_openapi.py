"""Our own description of the API: complete, valid, and true for what schemathesis makes up from it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from starlette.datastructures import QueryParams
from starlette.requests import Request

from nimbos.api import build, query, responses_query
from nimbos.api.admin.desk import Query
from nimbos.api.openapi_operations import operations, plain_path
from tests.conftest import DEMO
from tests.live import Live, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("home"), {"demo": DEMO}) as running:
        yield running


@pytest.fixture(scope="module")
def described(server: Live) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get("/openapi.json").json()
    return found


def names(described: dict[str, Any]) -> set[str]:
    return {f"{method.upper()} {path}" for path, item in described["paths"].items() for method in item}


def test_every_route_is_in_it_and_told_of_in_the_table(server: Live, described: dict[str, Any]) -> None:
    served = {
        f"{method} {plain_path(route.path)}"  # type: ignore[attr-defined]
        for route in build(server.runtime).routes
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    assert len(served) > 60
    assert names(described) == served
    assert set(operations()) == served


def test_it_is_a_document_that_others_can_read(described: dict[str, Any]) -> None:
    assert described["openapi"].startswith("3.1")
    references = set(json_references(described))
    schemas = described["components"]["schemas"]
    assert references <= {f"#/components/schemas/{name}" for name in schemas}
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    ids = [operation["operationId"] for item in described["paths"].values() for operation in item.values()]
    assert len(ids) == len(set(ids))


def json_references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from json_references(value)
    elif isinstance(node, list):
        for value in node:
            yield from json_references(value)


def test_a_key_is_needed_to_read_it(server: Live) -> None:
    assert server.http.get("/openapi.json", headers={"authorization": "Bearer nb-wrong"}).status_code == 401


def explore(server: Live, described: dict[str, Any], examples: int) -> None:
    """Every operation, `examples` times, with models that are there and that are not."""
    import schemathesis  # a second that each worker of a run would spend, as each collects this file
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    no_server_error = schemathesis.checks.not_a_server_error
    checks = [no_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
    schema = schemathesis.openapi.from_dict(with_models(described, ["demo", "nowhere"]))
    explored = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        explored += 1

        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            case.call_and_validate(base_url=server.url, headers=server.headers, checks=checks, timeout=60)

        ask()
    assert explored > 60


def with_models(described: dict[str, Any], models: list[str]) -> dict[str, Any]:
    """The description with a choice of models in bodies, so that not every ask ends at a name."""
    changed = json.loads(json.dumps(described))
    bodies = (operation.get("requestBody") for item in changed["paths"].values() for operation in item.values())
    for reference in set(json_references(list(bodies))):
        model = changed["components"]["schemas"][reference.rsplit("/", 1)[1]]["properties"].get("model")
        if model is not None and model.get("type") == "string":
            model["enum"] = models
    return changed


def test_what_schemathesis_makes_up_is_answered_as_described(
    server: Live, described: dict[str, Any], reading: Reading
) -> None:
    explore(server, described, 3)
    assert reading.undescribed(described) == set()


def test_each_query_parameter_that_is_read_is_described_and_each_described_is_read(
    server: Live, described: dict[str, Any], reading: Reading
) -> None:
    """Each route once with what it must have, and once with all that is described for it: a value may be refused before
    the next name is looked for."""
    for path, item in described["paths"].items():
        for method, operation in item.items():
            asked = [one for one in operation.get("parameters", ()) if one["in"] == "query"]
            for sent in ([one for one in asked if one["required"]], asked):
                server.http.request(
                    method,
                    path.replace("{project_id}", "proj_default").format_map(Anything()),
                    params={one["name"]: example(one["schema"]) for one in sent},
                    headers={"anthropic-version": "2023-06-01"} if path == "/v1/models" else {},
                )
    assert reading.undescribed(described) == set()
    assert reading.unread(described) == set()


def test_each_query_parameter_is_in_the_docs(described: dict[str, Any]) -> None:
    docs = "".join(page.read_text() for page in (Path(__file__).parents[2] / "docs").glob("*.md"))
    assert {name for _, name in queries_of(described) if f"`{name}" not in docs} == set()


def test_a_parameter_that_nobody_described_is_noticed(
    server: Live, described: dict[str, Any], reading: Reading
) -> None:
    without = json.loads(json.dumps(described))
    listing = without["paths"]["/v1/files"]["get"]
    listing["parameters"] = [one for one in listing["parameters"] if one["name"] != "purpose"]
    assert server.http.get("/v1/files").status_code == 200
    assert reading.undescribed(without) == {("GET /v1/files", "purpose")}


class Anything(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return f"no_{name}"


def example(schema: dict[str, Any]) -> Any:
    if schema["type"] == "array":
        return example(schema["items"])
    return schema.get("enum", [schema.get("minimum", "x")])[0]


class Reading:
    """Which query parameters each route has looked for, whether they were there or not."""

    def __init__(self) -> None:
        self.looked_for: set[tuple[str, str]] = set()  # "GET /v1/files", "after"

    def undescribed(self, described: dict[str, Any]) -> set[tuple[str, str]]:
        return self.read(described) - queries_of(described)

    def unread(self, described: dict[str, Any]) -> set[tuple[str, str]]:
        return queries_of(described) - self.read(described)

    def read(self, described: dict[str, Any]) -> set[tuple[str, str]]:
        """By operation: of those that a request fits, that with the fewest parameters in its path."""
        templates = sorted(described["paths"], key=lambda path: path.count("{"))
        patterns = [(one, re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(one)))) for one in templates]
        operations: dict[str, str] = {}
        for request in {request for request, _ in self.looked_for}:
            method, path = request.split(" ", 1)
            fitting = (
                template
                for template, pattern in patterns
                if method.lower() in described["paths"][template] and pattern.fullmatch(path)
            )
            operations[request] = f"{method} {next(fitting, path)}"
        return {(operations[request], name) for request, name in self.looked_for}


def queries_of(described: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (f"{method.upper()} {path}", one["name"])
        for path, item in described["paths"].items()
        for method, operation in item.items()
        for one in operation.get("parameters", ())
        if one["in"] == "query"
    }


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Reading:
    """Everything that reads a query goes through one of these three: `only`, `check_query` and Starlette's own."""
    found, request_of = Reading(), ContextVar[str]("request_of")
    params = Request.query_params.fget  # type: ignore[attr-defined]

    class Noted(QueryParams):
        def get(self, key: Any, default: Any = None) -> Any:
            found.looked_for.add((request_of.get(), key))
            return super().get(key, default)

        def __getitem__(self, key: Any) -> Any:
            found.looked_for.add((request_of.get(), key))
            return super().__getitem__(key)

        def __contains__(self, key: Any) -> bool:
            found.looked_for.add((request_of.get(), key))
            return super().__contains__(key)

    def noted(request: Request) -> QueryParams:
        request_of.set(f"{request.method} {request.url.path}")
        return Noted(params(request))

    def noting(names_of: Callable[..., Any]) -> Callable[..., Any]:
        def call(request: Request, *names: str) -> Any:
            found.looked_for |= {(f"{request.method} {request.url.path}", name) for name in names}
            return names_of(request, *names)

        return call

    def texts(query: Query, name: str) -> list[str]:
        found.looked_for.add((request_of.get(), name))
        return original(query, name)

    original = Query.texts
    monkeypatch.setattr(Query, "texts", texts)
    monkeypatch.setattr(Request, "query_params", property(noted))
    for name, function in (("only", query.only), ("check_query", responses_query.check_query)):
        for module in [one for key, one in list(sys.modules.items()) if key.startswith("nimbos.api")]:
            if getattr(module, name, None) is function:
                monkeypatch.setattr(module, name, noting(function))
    return found


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_much_that_schemathesis_makes_up_is_answered_as_described(server: Live, described: dict[str, Any]) -> None:
    explore(server, described, 80)
