"""The chain: every column of a row is in its hash, and no two rows are written alike."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings

from nimbos.errors import PayloadTooLarge
from nimbos.kernel.chain import BODY_BYTES, columns_of, encoded, event_of, link
from nimbos.kernel.events import Event, Note
from nimbos.kernel.words import Label, Origin, Secrecy
from nimbos.types import Usage
from tests.kernel.histories import Story, histories, logged

FULL = msgspec.structs.replace(
    logged([Note(about="said", text="words")])[0],
    cause=1,
    call_id="c",
    label=Label(Origin.TOOL, Secrecy.PUBLIC),
    blob="b",
    usage=Usage(input=1),
    prev_hash="p",
)
OTHERS: dict[str, object] = {
    "pid": "proc_2",
    "seq": 2,
    "epoch": 1,
    "ts_ms": 5,
    "kind": "notes",
    "cause": None,
    "call_id": "d",
    "actor": "user:1",
    "label": Label(Origin.EXTERNAL, Secrecy.PUBLIC),
    "body": FULL.body + b" ",
    "blob": None,
    "usage": Usage(input=1, recomputed=1),
    "version": 2,
    "prev_hash": "q",
}


@pytest.mark.parametrize("name", [name for name in Event.__struct_fields__ if name != "hash"])
def test_every_column_is_hashed(name: str) -> None:
    assert link(columns_of(msgspec.structs.replace(FULL, **{name: OTHERS[name]}))) != link(columns_of(FULL))


def test_what_stands_in_one_column_cannot_stand_in_the_next() -> None:
    one = msgspec.structs.replace(FULL, call_id='a","b', actor="c")
    other = msgspec.structs.replace(FULL, call_id="a", actor='b","c')
    assert link(columns_of(one)) != link(columns_of(other))


@settings(max_examples=50, deadline=None)
@given(histories())
def test_rows_come_back_as_events(story: Story) -> None:
    for event in [*logged(story.bodies), FULL]:
        columns = columns_of(event)
        assert event_of(columns) == event
        assert event_of(columns).hash == event.hash
        if event is not FULL:
            assert link(columns) == event.hash


def test_the_hash_is_the_same_for_ever() -> None:
    """Logs that were written must be found whole by every later version: if this fails, old logs look tampered with."""
    assert link(columns_of(FULL)) == "e400583310c0e8d9af56afba1d6d6df1ef7ee58c79a8903c4583dd38d10f5c3a"
    assert FULL.body == b'{"about":"said","text":"words","type":"note"}'


def test_what_is_too_large_for_the_log_is_refused() -> None:
    encoded(Note(about="said", text="x" * (BODY_BYTES - 100)))
    with pytest.raises(PayloadTooLarge, match="event note"):
        encoded(Note(about="said", text="x" * BODY_BYTES))
