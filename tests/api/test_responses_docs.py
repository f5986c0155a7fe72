"""docs/responses.md says what there is: every route, every field, every item."""

from __future__ import annotations

import re

import pytest

from nimbos.api import responses_items as items
from nimbos.api import responses_request as requests
from nimbos.api.responses_compact import CompactBody
from nimbos.api.responses_conversations import CreateBody
from nimbos.api.responses_wire import Extension, Truncated
from nimbos.config import ServerSettings
from nimbos.responses.journal import KEPT_S
from nimbos.responses.nodes import BYTES_MAX, ITEMS_MAX
from nimbos.responses.room import PROJECT_BYTES, ROW_BYTES
from nimbos.responses.store import KEEP_S
from tests.test_docs import missing, page, section

PAGE = "docs/responses.md"


@pytest.mark.parametrize(
    "struct",
    [
        requests.ResponsesBody,
        requests.CountBody,
        CompactBody,
        CreateBody,
        requests.Reasoning,
        requests.CacheOptions,
        requests.BackgroundOptions,
        requests.TextConfig,
        requests.StreamOptions,
    ],
)
def test_every_field_of_a_request_is_described(struct: type) -> None:
    text = page(PAGE).replace("`prompt_cache_…`", "`prompt_cache_key`")
    assert not missing(struct.__struct_fields__, text)  # type: ignore[attr-defined]


def test_every_field_that_is_refused_and_every_include_is_named() -> None:
    request = section(PAGE, "## The request")
    assert not missing(requests.REFUSED, request)
    assert "`reasoning.encrypted_content`" in request


def test_every_item_that_is_taken_is_described() -> None:
    assert not missing(items._FIELDS, section(PAGE, "## Items"))


def test_what_is_added_is_described() -> None:
    for name in (*Extension.__struct_fields__, *Truncated.__struct_fields__):
        assert name in page(PAGE), name


def test_routes_are_those_of_the_api_page() -> None:
    listed = re.compile(r"^\| `((?:GET|POST|DELETE) /v1/(?:responses|conversations)[^`]*)` \|", re.MULTILINE)
    here = set(listed.findall(page(PAGE)))
    assert here == set(listed.findall(page("docs/api.md")))
    assert len(here) == 15


def test_numbers_are_those_of_the_code() -> None:
    text = page(PAGE)
    assert KEEP_S == 30 * 86_400 and "30 days" in text
    assert KEPT_S == 86_400 and "read again until a day after the last of them" in text
    assert (ITEMS_MAX, BYTES_MAX) == (items.ITEMS_MAX, 64 << 20) and "10,000 items and 64 MiB" in text
    assert PROJECT_BYTES == ServerSettings().responses_bytes == 10 << 30 and "may take 10 GiB" in text
    assert ROW_BYTES == 1 << 10 and "counts 1 KiB besides" in text
