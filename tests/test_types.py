"""Ids: those of a version and a variant that others know, in the order they were made in."""

from __future__ import annotations

import time
import uuid

from nimbos.types import id_at, new_id


def test_ids_have_the_order_they_were_made_in_also_within_a_millisecond() -> None:
    made = [(time.time_ns(), new_id("ask")) for _ in range(2_000)]
    assert [id for _, id in made] == [id for _, id in sorted(made)]
    milliseconds = {moment_ns // 1_000_000 for moment_ns, _ in made}
    assert len(milliseconds) < len(made) == len({id for _, id in made})


def test_an_id_is_a_uuid_of_its_moment() -> None:
    before_ms = time.time_ns() // 1_000_000
    prefix, _, digits = new_id("ask").partition("_")
    found = uuid.UUID(digits)
    assert (prefix, found.version, found.variant) == ("ask", 7, uuid.RFC_4122)
    assert before_ms <= found.int >> 80 <= time.time_ns() // 1_000_000


def test_an_id_of_a_moment_and_a_seed_is_always_the_same() -> None:
    assert id_at("file", 1_000, bytes(range(10))) == id_at("file", 1_000, bytes(range(10)))
    assert id_at("file", 1_000, bytes(10)) < id_at("file", 1_001, bytes(10))
