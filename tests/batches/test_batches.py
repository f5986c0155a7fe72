"""Batches through the official client: each line answered once, bad lines as rows of the error file, no job lost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from nimbos.batches import TEST_MODEL
from tests.live import PATIENCE_S, Live, error_of, serving

SCRIPT: dict[str, Any] = {
    "replies": [
        {"match": "slow", "text": "on and " * 50, "tokens_per_second": 100},
        {"match": "endless", "text": "on and on " * 20, "tokens_per_second": 20},
    ],
    "default": {"text": "Hello there, friend!"},
}
OVER = {"completed", "failed", "expired", "cancelled"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("home"), {"demo": SCRIPT}) as running:
        yield running


def chat_line(custom_id: str, text: str = "hi", **fields: Any) -> dict[str, Any]:
    body = {"model": "demo", "messages": [{"role": "user", "content": text}], **fields}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def content_of(lines: list[Any]) -> bytes:
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


def upload(live: Live, lines: list[Any]) -> openai.types.FileObject:
    return live.client.files.create(file=("lines.jsonl", content_of(lines)), purpose="batch")


def submit(live: Live, lines: list[Any], endpoint: Any = "/v1/chat/completions", **fields: Any) -> openai.types.Batch:
    file = upload(live, lines)
    return live.client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


def until(live: Live, batch_id: str, wanted: Callable[[openai.types.Batch], bool]) -> openai.types.Batch:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        batch = live.client.batches.retrieve(batch_id)
        if wanted(batch):
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)


def over(live: Live, batch_id: str) -> openai.types.Batch:
    return until(live, batch_id, lambda batch: batch.status in OVER)


def rows_of(live: Live, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in live.client.files.content(file_id).text.splitlines()]


def test_a_batch_answers_every_line_in_order_in_openais_shape(served: Live) -> None:
    made = submit(served, [chat_line(f"line-{n}") for n in range(40)], metadata={"for": "test"})
    assert made.status == "validating"
    assert made.object == "batch"
    done = over(served, made.id)
    assert done.status == "completed"
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (40, 40, 0)
    assert done.metadata == {"for": "test"}
    assert done.error_file_id is None
    times = (done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at)
    assert None not in times and list(times) == sorted(times)  # type: ignore[type-var]
    assert done.expires_at == done.created_at + 86_400
    rows = rows_of(served, done.output_file_id)
    assert [row["custom_id"] for row in rows] == [f"line-{n}" for n in range(40)]
    for row in rows:
        assert set(row) == {"id", "custom_id", "response", "error"}
        assert row["error"] is None
        assert row["response"]["status_code"] == 200
        assert row["response"]["request_id"].startswith("ask_")
        answer = openai.types.chat.ChatCompletion.model_validate(row["response"]["body"])
        assert answer.choices[0].message.content == "Hello there, friend!"
        assert answer.usage is not None and answer.usage.completion_tokens > 0
    assert len({row["id"] for row in rows}) == 40
    output = served.client.files.retrieve(done.output_file_id or "")
    assert output.purpose == "batch_output"


def test_lines_are_asked_at_class_batch_whatever_they_say(served: Live) -> None:
    before = len(served.sources["demo"].asks)
    done = over(served, submit(served, [chat_line("a"), chat_line("b", service_tier="priority")]).id)
    asks = served.sources["demo"].asks[before:]
    assert {ask.ask_class.value for ask in asks} == {"batch"}
    (refused,) = rows_of(served, done.error_file_id)
    assert refused["custom_id"] == "b"
    assert refused["response"]["status_code"] == 403
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (1, 1)


def test_bad_lines_become_error_rows_and_the_good_ones_are_answered(served: Live) -> None:
    lines = [
        chat_line("good"),
        b"{not json",
        b"",
        chat_line("good"),
        {**chat_line("get"), "method": "GET"},
        {**chat_line("elsewhere"), "url": "/v1/embeddings"},
        {**chat_line("body"), "body": [1]},
        {**chat_line("more"), "more": 1},
        {key: value for key, value in chat_line("none").items() if key != "custom_id"},
        chat_line(""),
        chat_line("nul\0"),
        chat_line("model", model="missing"),
        chat_line("stream", stream=True),
        chat_line("field", tempratur=1),
        b'"text"',
        b"\xff\xfe",
        chat_line("last"),
    ]
    done = over(served, submit(served, lines).id)
    assert done.status == "completed"
    assert [row["custom_id"] for row in rows_of(served, done.output_file_id)] == ["good", "last"]
    errors = rows_of(served, done.error_file_id)
    told = [
        (row["custom_id"], row["error"]["code"] if row["error"] else row["response"]["status_code"]) for row in errors
    ]
    assert told == [
        (None, "invalid_json_line"),
        ("good", "duplicate_custom_id"),
        ("get", "invalid_method"),
        ("elsewhere", "invalid_url"),
        ("body", "invalid_body"),
        ("more", "invalid_line"),
        (None, "invalid_line"),
        (None, "invalid_custom_id"),
        (None, "invalid_custom_id"),
        ("model", 404),
        ("stream", 400),
        ("field", 400),
        (None, "invalid_line"),
        (None, "invalid_json_line"),
    ]
    missing = errors[9]["response"]["body"]["error"]
    assert (missing["code"], missing["param"]) == ("model_not_found", "model")
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (16, 2, 14)


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [(b"", "empty_file", None), (b"\n\n", "empty_file", None), (b"\n{", "invalid_json_line", 2)],
)
def test_a_file_without_a_good_line_fails_and_says_why(
    served: Live, content: bytes, code: str, line: int | None
) -> None:
    file = served.client.files.create(file=("lines.jsonl", content), purpose="batch")
    made = served.client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    done = over(served, made.id)
    assert done.status == "failed"
    assert done.failed_at is not None
    assert done.errors is not None and done.errors.data is not None
    assert [(error.code, error.line) for error in done.errors.data] == [(code, line)]
    assert (done.output_file_id, done.error_file_id) == (None, None)
    served.client.files.delete(file.id)


def test_the_test_model_answers_without_being_asked_and_only_small_files(served: Live) -> None:
    done = over(served, submit(served, [chat_line(f"{n}", model=TEST_MODEL) for n in range(101)]).id)
    assert len(rows_of(served, done.output_file_id)) == 100
    (refused,) = rows_of(served, done.error_file_id)
    assert (refused["custom_id"], refused["error"]["code"]) == ("100", "test_model_limit")
    assert served.chat(model=TEST_MODEL).status_code == 200
    assert TEST_MODEL not in [model.id for model in served.client.models.list()]


def test_completions_are_answered_too(served: Live) -> None:
    body = {"model": "demo", "prompt": ["one", "two"], "max_tokens": 3}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    done = over(served, submit(served, [line], "/v1/completions").id)
    (row,) = rows_of(served, done.output_file_id)
    assert len(row["response"]["body"]["choices"]) == 2


def test_a_batch_that_is_cancelled_keeps_what_is_done(served: Live) -> None:
    made = submit(served, [chat_line("fast"), *(chat_line(f"slow-{n}", "slow") for n in range(60))])
    until(served, made.id, lambda batch: (batch.request_counts or made.request_counts).completed >= 1)  # type: ignore[union-attr]
    cancelled = served.client.batches.cancel(made.id)
    assert cancelled.status == "cancelling"
    assert served.client.batches.cancel(made.id).status in ("cancelling", "cancelled")
    done = over(served, made.id)
    assert done.status == "cancelled"
    assert done.cancelled_at is not None and done.cancelling_at is not None
    good, bad = rows_of(served, done.output_file_id), rows_of(served, done.error_file_id)
    assert "fast" in [row["custom_id"] for row in good]
    assert {row["error"]["code"] for row in bad} == {"batch_cancelled"}
    assert sorted(row["custom_id"] for row in (*good, *bad)) == sorted(["fast", *(f"slow-{n}" for n in range(60))])
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (len(good), len(bad))
    with pytest.raises(openai.ConflictError):
        served.client.batches.cancel(made.id)


def test_batches_are_listed_newest_first_in_pages(served: Live) -> None:
    made = [submit(served, [chat_line("a", model=TEST_MODEL)]).id for _ in range(3)]
    first = served.client.batches.list(limit=2)
    assert [batch.id for batch in first.data] == [made[2], made[1]]
    assert first.has_more
    listed = [batch.id for batch in served.client.batches.list(limit=2)]
    assert listed[:3] == made[::-1]
    assert len(set(listed)) == len(listed)


def test_what_cannot_be_a_batch_is_refused_by_name(served: Live) -> None:
    file = upload(served, [chat_line("a")])
    good = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    wrong: list[tuple[dict[str, Any], int, str | None]] = [
        ({"input_file_id": "file_none"}, 404, "file_id"),
        ({"endpoint": "/v1/messages"}, 400, "endpoint"),
        ({"endpoint": "/nowhere"}, 400, "endpoint"),
        ({"completion_window": "1s"}, 400, "completion_window"),
        ({"completion_window": "15d"}, 400, "completion_window"),
        ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata"),
        ({"metadata": {"a": "b" * 513}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "output_expires_after"),
        ({"modle": 1}, 400, "modle"),
    ]
    for change, status, param in wrong:
        error = error_of(served.post("/v1/batches", {**good, **change}), status)
        assert error["param"] == param, change
    other = served.client.files.create(file=("a.txt", b"text"), purpose="user_data")
    assert error_of(served.post("/v1/batches", {**good, "input_file_id": other.id}), 400)["param"] == "input_file_id"


def test_a_short_batch_is_not_starved_by_a_long_one(served: Live) -> None:
    long = submit(served, [chat_line(f"{n}", "endless") for n in range(200)])
    until(served, long.id, lambda batch: batch.status == "in_progress")
    short = submit(served, [chat_line("a"), chat_line("b")])
    assert over(served, short.id).status == "completed"
    assert served.client.batches.retrieve(long.id).status == "in_progress"
    served.client.batches.cancel(long.id)
    over(served, long.id)


def test_a_batch_goes_on_after_a_restart_and_hands_back_what_it_had_begun(tmp_path: Path) -> None:
    lines = [chat_line(f"{n:02}", "slow" if n % 3 else "hi") for n in range(50)]
    with serving(tmp_path, {"demo": SCRIPT}, database_url="") as first:
        made = submit(first, lines)
        until(first, made.id, lambda batch: (batch.request_counts or made.request_counts).completed >= 3)  # type: ignore[union-attr]
        first.stop()
    with serving(tmp_path, {"demo": SCRIPT}, database_url="") as second:
        done = over(second, made.id)
        assert done.status == "completed"
        rows = rows_of(second, done.output_file_id)
    assert [row["custom_id"] for row in rows] == [f"{n:02}" for n in range(50)]
