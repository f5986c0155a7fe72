"""What kind of work a model does, looked up where its asks are and not in the whole ledger."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest

from nimbos.api.admin.kinds import Kinds
from nimbos.db import Bound, Database, Row
from nimbos.ledger import Span, usage_buckets
from nimbos.ledger import ledger as module
from nimbos.ledger.reports import Width
from nimbos.types import Kind, Origin, Usage
from tests.ledger.books import ACCOUNT, CARD, Books, an_ask

MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
BEGIN_MS = int(datetime(2026, 3, 30, tzinfo=UTC).timestamp() * 1000)
WIDTHS: tuple[tuple[Width, int], ...] = (("1m", MINUTE_MS), ("1h", HOUR_MS), ("1d", DAY_MS))
TEXT, VECTORS = (Kind.GENERATE, "/v1/chat/completions"), (Kind.EMBED, "/v1/embeddings")
VERDICTS = (Kind.GENERATE, "/v1/moderations")


async def test_a_model_that_is_rarely_asked_is_looked_for_in_its_hour(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    books, now_ms = Books(database), BEGIN_MS
    monkeypatch.setattr(module, "_now_ms", lambda: now_ms)

    async def ask(model: str, kind: Kind, route: str) -> None:
        asked, card, origin = (
            an_ask(model=model, kind=kind),
            msgspec.structs.replace(CARD, id=model),
            Origin(route=route),
        )
        await books.run(lambda: books.ledger.reserve(ACCOUNT, asked, origin=origin, prompt_tokens=1, card=card))
        await books.settle(asked.id, Usage(input=1))

    for number in range(26):
        now_ms = BEGIN_MS + number * HOUR_MS + 10 * MINUTE_MS
        await ask("demo", *TEXT)
        now_ms += 30 * MINUTE_MS
        if number == 17:
            await ask("vectors", *VECTORS)
        if number == 25:
            await ask("judge", *VERDICTS)
            await ask("vectors", *VERDICTS)  # not its first
    spans: list[int] = []
    read = database.read

    async def noted(query: Bound) -> list[Row]:
        if "route" in query.prepared("sqlite")[0]:
            spans.append(int(query.values["until_ms"] or 0) - int(query.values["since_ms"] or 0))
        return await read(query)

    monkeypatch.setattr(database, "read", noted)
    for width, width_ms in WIDTHS:
        kinds, found = Kinds(database, width_ms=width_ms), {}
        span = Span(since_ms=BEGIN_MS, until_ms=BEGIN_MS + 26 * HOUR_MS)
        for row in await usage_buckets(database, width=width, span=span, group_by=("model",)):
            found[row.group[0]] = await kinds.of(row.group[0], row.start_ms)
        assert found == {"demo": "completions", "vectors": "embeddings", "judge": "moderations"}
        assert spans == [min(width_ms, HOUR_MS)] * 3
        spans.clear()
