"""A third party's conformance suite, `llm-comply`, on the three chat formats. What does not pass is listed in
docs/compatibility.md, with the reason."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live import OWNER_SECRET, PATIENCE_S, Live, serving

# Names for which the suite also tries thinking.
OPENAI, ANTHROPIC = "deepseek-r1", "claude-sonnet-4"
SCRIPT: dict[str, Any] = {
    "replies": [
        {"match": "weather", "tool_calls": [{"name": "get_weather", "arguments": {"location": "San Francisco"}}]},
        {"match": "reasoning", "thinking": "15 times 37 is 555.", "text": "555."},
    ],
    "default": {"text": "Hello, my friend."},
}
FORMATS = {
    "openai-chat": [OPENAI],
    "open-responses": [OPENAI],
    "anthropic": [ANTHROPIC, "--auth-header", "x-api-key", "--no-bearer", "-H", "anthropic-version:2023-06-01"],
}
PICTURES = {
    "openai-chat": "chat-image-input",
    "open-responses": "image-input",
    "anthropic": "anth-image-input",
}
# Empty fields that the suite's schemas want and our answers leave out; the page lists them too.
LEFT_OUT = {
    "openai-chat": {"annotations"},
    "open-responses": {"presence_penalty", "frequency_penalty"},
    "anthropic": set(),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("home"), {OPENAI: SCRIPT, ANTHROPIC: SCRIPT}) as running:
        yield running


def comply(server: Live, format_: str) -> list[dict[str, Any]]:
    model, *more = FORMATS[format_]
    command = [sys.executable, "-m", "llm_comply.cli", "--format", format_, "-u", f"{server.url}/v1", "-m", model]
    done = subprocess.run(
        [*command, "-k", OWNER_SECRET, "--json", *more],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env={},
    )
    assert done.stdout, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    return found


def left_out(error: str) -> str:
    """The field that an error is about; the error itself where it is about no missing field."""
    missing = re.search(r"'(\w+)' is a required property|missing '(\w+)' field", error)
    return error if missing is None else missing[1] or missing[2]


@pytest.mark.parametrize("format_", FORMATS)
def test_all_passes_but_pictures_and_fields_that_are_left_out(server: Live, format_: str) -> None:
    results = {result["id"]: result for result in comply(server, format_)}
    assert len(results) >= 9
    assert {result["status"] for result in results.values()} <= {"passed", "failed"}
    pictures = results.pop(PICTURES[format_])
    assert pictures["status"] == "failed"
    assert "HTTP 400" in pictures["errors"][0]
    told = [error for result in results.values() for error in (*result.get("errors", ()), *result.get("warnings", ()))]
    assert {left_out(error) for error in told} == LEFT_OUT[format_]


def test_what_does_not_pass_is_listed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    listed = set(re.findall(r"`([\w-]+)`", page.split("## Conformance from outside\n")[1].split("\n## ")[0]))
    names = {name for fields in LEFT_OUT.values() for name in fields}
    assert {*names, *PICTURES.values()} == listed - {"llm-comply"}
