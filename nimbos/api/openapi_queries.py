"""What each route reads behind the `?`, for our description of the API. A test holds that nothing else is read.

A list (`many`) is the name again and again, as `group_by=model&group_by=project_id`. Read `queries` at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nimbos.api import (
    anthropic_batches,
    anthropic_models,
    batches,
    files,
    own_usage,
    process_events,
    processes,
    programs,
)
from nimbos.api.admin import audit, usage
from nimbos.api.admin.desk import LIST_MAX
from nimbos.api.responses_query import LIMIT_MAX
from nimbos.api.responses_request import INCLUDES
from nimbos.ledger import PAGE_MOST, ROWS_MOST

_BY = ("key", "model", "project", "day", "class", "process")
_SECONDS_MAX = 2**40
_MILLISECONDS_MAX = 10**15


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """`schema`: JSON Schema of its value, or of each where there may be `many`."""

    name: str
    schema: Mapping[str, Any]
    many: bool = False
    required: bool = False

    def described(self) -> dict[str, Any]:
        schema = {"type": "array", "items": self.schema} if self.many else self.schema
        return {"name": self.name, "in": "query", "required": self.required, "schema": schema}


Query = tuple[Parameter, ...]


def _text(name: str) -> Parameter:
    return Parameter(name=name, schema={"type": "string"})


def _texts(name: str) -> Parameter:
    return replace(_text(name), many=True)


def _number(name: str, low: int, high: int) -> Parameter:
    return Parameter(name=name, schema={"type": "integer", "minimum": low, "maximum": high})


def _choice(name: str, *values: str) -> Parameter:
    return Parameter(name=name, schema={"type": "string", "enum": list(values)})


def _flag(name: str) -> Parameter:
    return _choice(name, "true", "false")


def _page(most: int) -> Query:
    return _text("after"), _number("limit", 1, most)


def _anthropic_page(most: int) -> Query:
    return _text("after_id"), _text("before_id"), _number("limit", 1, most)


def _order() -> Parameter:
    return _choice("order", "asc", "desc")


def _include() -> Parameter:
    return replace(_choice("include", *sorted(INCLUDES)), many=True)


def _items() -> Query:
    return _include(), _text("after"), _number("limit", 1, LIMIT_MAX), _order()


def _span_ms() -> Query:
    return _number("since_ms", 0, _MILLISECONDS_MAX), _number("until_ms", 0, _MILLISECONDS_MAX)


def _frame(*widths: str, most: int) -> Query:
    return (
        replace(_number("start_time", 0, _SECONDS_MAX), required=True),
        _number("end_time", 0, _SECONDS_MAX),
        _choice("bucket_width", *widths),
        _number("limit", 1, most),
        _number("page", 0, _SECONDS_MAX),
        _texts("project_ids"),
        _texts("api_key_ids"),
        _texts("models"),
    )


def _grouped(groups: tuple[str, ...]) -> Parameter:
    return replace(_choice("group_by", *groups), many=True)


def _dialects() -> dict[str, Query]:
    conversation = "/v1/conversations/{conversation_id}/items"
    return {
        "GET /v1/models": _anthropic_page(anthropic_models.LIMIT_MAX),
        "GET /v1/responses/{response_id}": (
            _include(),
            _flag("stream"),
            _number("starting_after", 0, 10**9 - 1),
            _flag("include_obfuscation"),
        ),
        "GET /v1/responses/{response_id}/input_items": _items(),
        f"GET {conversation}": _items(),
        f"POST {conversation}": (_include(),),
        f"GET {conversation}/{{item_id}}": (_include(),),
        "GET /v1/files": (*_page(files.LIST_MAX), _order(), _text("purpose")),
        "GET /v1/batches": _page(batches.LIST_MAX),
        "GET /v1/messages/batches": _anthropic_page(anthropic_batches.LIST_MAX),
    }


def _agents() -> dict[str, Query]:
    return {
        "GET /v1/processes": (
            *_page(processes.LIST_MAX),
            _choice("state", *(state for state in processes.STATES if state)),
            _text("prefix"),
        ),
        "GET /v1/processes/{pid}/events": (
            _number("after", 0, 10**process_events.SEQ_DIGITS_MAX - 1),
            _number("limit", 1, processes.EVENTS_MAX),
            _flag("stream"),
            _flag("watch"),
        ),
        "GET /v1/processes/{pid}/tree": _page(processes.LIST_MAX),
        "GET /v1/programs": _page(programs.LIST_MAX),
    }


def _administration() -> dict[str, Query]:
    project, page = "/v1/organization/projects/{project_id}", _page(LIST_MAX)
    alerts = (*page, _order(), _text("before"))
    keys = (*page, _choice("owner_project_access", "active", "inactive", "any"))
    return {
        "GET /v1/organization/projects": (*page, _flag("include_archived")),
        f"GET {project}/users": page,
        "GET /v1/organization/users": (*page, _texts("emails")),
        f"GET {project}/api_keys": keys,
        "GET /v1/organization/api_keys": (*keys, _flag("include_revoked")),
        f"GET {project}/service_accounts": page,
        "GET /v1/organization/admin_api_keys": (*page, _order()),
        f"GET {project}/rate_limits": (*page, _text("before")),
        f"GET {project}/spend_alerts": alerts,
        "GET /v1/organization/budgets": (_text("process_id"),),
        "GET /v1/organization/spend_alerts": alerts,
        "GET /v1/organization/audit_logs": (
            *page,
            _text("before"),
            *(_texts(name) for name in audit.FILTERS),
            *(_number(f"effective_at[{word}]", 0, _SECONDS_MAX) for word in audit.MOMENTS),
            _flag("tenant_only"),
        ),
    }


def _usage() -> dict[str, Query]:
    frame = (
        *_frame("1m", "1h", "1d", most=max(most for _, most in usage.BUCKETS.values())),
        _texts("user_ids"),
    )
    tokens = (*frame, _grouped(usage.TOKEN_GROUPS))
    rest = [_texts(name) for name in ("batch", "sizes", "sources", "vector_store_ids", "context_levels")]
    report = "/v1/organization/usage"
    pages = (_number("limit", 1, ROWS_MOST), _number("page", 0, PAGE_MOST))
    return {
        "GET /v1/usage": (_choice("by", *own_usage.BY), *_span_ms(), *pages),
        f"GET {report}": (
            _choice("by", *_BY),
            *_span_ms(),
            *pages,
            *(_texts(name) for name in ("project", "key", "model", "class", "process")),
        ),
        f"GET {report}/asks": (_choice("format", "csv", "json"), *_span_ms()),
        "GET /v1/organization/costs": (
            *_frame("1d", most=usage.COST_BUCKETS[1]),
            _texts("line_items"),
            _grouped(usage.COST_GROUPS),
        ),
        f"GET {report}/completions": (
            *frame,
            _grouped((*usage.TOKEN_GROUPS, *usage.COMPLETION_GROUPS)),
            _flag("batch"),
        ),
        f"GET {report}/embeddings": tokens,
        f"GET {report}/moderations": tokens,
        **{f"GET {report}/{name}": (*frame, _grouped(groups), *rest) for name, groups in usage.EMPTY.items()},
    }


def queries() -> dict[str, Query]:
    """By method and path, as `GET /v1/models`; of the routes that read one."""
    return {**_dialects(), **_agents(), **_administration(), **_usage()}
