"""Segments: kept once for their account, read by nobody else, in one canonical form."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nimbos.blobs import open_blobs
from nimbos.config import Settings
from nimbos.db import Database, Transaction
from nimbos.errors import Conflict, InvalidRequest, NotFound, PayloadTooLarge
from nimbos.kernel import segments as kept
from nimbos.kernel.segments import JSON_DEPTH_MAX, Segments, canonical, text_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
async def segments(database: Database, database_settings: Settings) -> AsyncIterator[Segments]:
    yield Segments(database, open_blobs(database_settings, database))


@pytest.mark.parametrize("value", ["words", {"b": [1, None], "a": "é\x00"}, "x" * 100_000, []])
async def test_what_is_put_is_read_back(segments: Segments, database: Database, value: Any) -> None:
    hash = await segments.put("proj_one", value)
    assert hash == await segments.put("proj_one", value)
    assert await segments.get("proj_one", hash) == value
    again = Segments(database, segments._blobs)  # with nothing in memory
    assert await again.get("proj_one", hash) == value


async def test_no_account_reads_what_is_another_s(segments: Segments, database: Database) -> None:
    for value in ("short", "x" * 100_000):
        hash = await segments.put("proj_one", value)
        assert hash != await segments.put("proj_two", value)
        for reader in (segments, Segments(database, segments._blobs)):
            with pytest.raises(NotFound):
                await reader.get("proj_two", hash)
        with pytest.raises(NotFound):
            await segments.get("proj_one", "0" * 64)


async def test_what_is_written_with_what_names_it_is_there_exactly_when_that_is(
    segments: Segments, database: Database
) -> None:
    undone = await segments.prepare("proj_one", "words")

    def fails() -> Transaction[None]:
        yield from undone.writing()
        raise Conflict("not now")

    with pytest.raises(Conflict):
        await database.run(fails)
    with pytest.raises(NotFound):
        await segments.get("proj_one", undone.hash)
    again = await segments.prepare("proj_one", "words")
    assert again.row is not None, "nothing was written, so nothing may be left out"
    await database.run(again.writing)
    assert segments.written(again) == undone.hash == await segments.put("proj_one", "words")
    assert await Segments(database, segments._blobs).get("proj_one", again.hash) == "words"
    assert (await segments.prepare("proj_one", "words")).row is None
    large = await segments.prepare("proj_one", "x" * 100_000)
    assert large.row is None, "a blob is written at once"
    assert await segments.get("proj_one", large.hash) == "x" * 100_000


async def test_many_are_read_at_once_and_only_ones_own(segments: Segments, database: Database) -> None:
    own = [await segments.put("proj_one", f"words {number}") for number in range(5)]
    theirs, large = await segments.put("proj_two", "words"), await segments.put("proj_one", "x" * 100_000)
    reader = Segments(database, segments._blobs)
    await reader.look_up("proj_one", [*own, theirs, large, "0" * 64])
    assert {key.partition("\n")[2] for key in reader._cache} == set(own)
    assert await reader.get_all("proj_one", [*own, large]) == [
        *(f"words {number}" for number in range(5)),
        "x" * 100_000,
    ]


async def test_what_is_no_value_or_too_large_is_refused(segments: Segments, monkeypatch: pytest.MonkeyPatch) -> None:
    deep: Any = []
    for _ in range(JSON_DEPTH_MAX + 2):
        deep = [deep]
    for wrong in (deep, {"a": object()}, "\ud800"):
        with pytest.raises(InvalidRequest):
            await segments.put("proj_one", wrong)
    monkeypatch.setattr(kept, "SEGMENT_BYTES_MAX", 10)
    with pytest.raises(PayloadTooLarge):
        await segments.put("proj_one", "more than ten bytes")


@given(value=JSON)
def test_there_is_one_way_to_write_a_value(value: Any) -> None:
    written = canonical(value)
    assert canonical(_turned(value)) == written
    assert text_of(value) == (value if isinstance(value, str) else written.decode())


def _turned(value: Any) -> Any:
    """The same value, its keys in another order."""
    if isinstance(value, dict):
        return {key: _turned(value[key]) for key in reversed(list(value))}
    return [_turned(item) for item in value] if isinstance(value, list) else value


def test_a_value_of_millions_of_others_is_refused_before_they_are_walked() -> None:
    value: list[Any] = [[]] * (kept.JSON_VALUES_MAX + 1)
    with pytest.raises(InvalidRequest, match=f"{kept.JSON_VALUES_MAX}"):
        canonical(value)
