"""Our own description of the API: complete, valid, and true for what schemathesis makes up from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from nimbos.api import build
from nimbos.api.openapi_operations import operations, plain_path
from tests.conftest import DEMO
from tests.live import Live, serving

CHECKS = [
    schemathesis.checks.not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


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
        def ask(case: schemathesis.Case) -> None:
            case.call_and_validate(base_url=server.url, headers=server.headers, checks=CHECKS, timeout=60)

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


def test_what_schemathesis_makes_up_is_answered_as_described(server: Live, described: dict[str, Any]) -> None:
    explore(server, described, 3)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_much_that_schemathesis_makes_up_is_answered_as_described(server: Live, described: dict[str, Any]) -> None:
    explore(server, described, 80)
