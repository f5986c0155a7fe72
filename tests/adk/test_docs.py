"""The pages about programs say everything, and their examples run as they stand there."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nimbos import adk
from nimbos.adk import Program, read_program
from nimbos.kernel.manifest import Manifest
from nimbos.kernel.program import program_of
from tests.live import Live, serving
from tests.processing import Processes

DOCS = Path(__file__).parent.parent.parent / "docs"
FIRST = (DOCS / "first-agent.md").read_text()
PROGRAMS = (DOCS / "programs.md").read_text()
SCRIPT: dict[str, Any] = {
    "replies": [
        {"match": "film", "times": 1, "text": "", "tool_calls": [{"name": "disk", "arguments": {}}]},
        {"match": "GiB are free", "text": "There is room."},
        {"match": "Join these", "text": "All of it."},
        {"match": "page", "text": "A note."},
    ],
    "default": {"text": "Hm."},
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("home"), {"demo": SCRIPT}) as running:
        yield running


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for its, block in found if its == language]


def keys_of(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(struct):
        inner = field.type
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            yield from keys_of(inner, f"{prefix}{field.encode_name}.")
        else:
            yield f"{prefix}{field.encode_name}"


def test_every_key_of_the_manifest_is_described_and_no_other() -> None:
    table = PROGRAMS.split("## The manifest", 1)[1].split("\n## ", 1)[0]
    assert set(re.findall(r"^\| `([a-z_.]+)` \|", table, re.MULTILINE)) == set(keys_of(Manifest))


def test_everything_that_the_kit_shows_is_described() -> None:
    undescribed = {name for name in adk.__all__ if not re.search(rf"\b{name}\b", PROGRAMS)}
    assert undescribed <= {"BadTool", "Child", "Ended", "Tool"}  # what functions take, return and raise


def write_first(folder: Path) -> None:
    folder.mkdir()
    (manifest,), (instructions,) = blocks(FIRST, "toml"), blocks(FIRST, "")
    (folder / "nimbos.toml").write_text(manifest)
    (folder / "instructions.md").write_text(instructions)
    (folder / "tools.py").write_text(blocks(FIRST, "python")[0])


def test_the_first_agent_runs_as_written(live: Live, tmp_path: Path) -> None:
    write_first(tmp_path / "disk")
    processes = Processes(live.http)
    pid = processes.spawn(processes.put(texts_of(tmp_path / "disk")), "Is there room for a film of 4 GiB?")
    told = processes.over(pid)
    assert (told["reason"], told["result"]) == ("ok", "There is room.")


def test_the_first_agent_in_python_is_the_same_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_first(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    exec(blocks(FIRST, "python")[1], {})
    assert capsys.readouterr().out.strip() == program_of(read_program("disk"))[0].hash


def test_the_durable_function_runs_as_written(live: Live) -> None:
    (main,) = [text for text in blocks(PROGRAMS, "python") if "async def main(input)" in text]
    part = {f"agents/reader/{path}": c for path, c in Program("reader", instructions="Note it.").files().items()}
    files = {
        "nimbos.toml": 'name = "pages"\nentry = "main.py:main"\n',
        "main.py": main.replace("3600", "0.1"),
        "tools.py": (
            "from nimbos.adk import tool\n\n\n@tool(effect='opaque')\n"
            "def send(text: str) -> str:\n    'Sends it.'\n    return f'sent: {text}'\n"
        ),
        **{path: content.decode() for path, content in part.items()},
    }
    processes = Processes(live.http)
    pid = processes.spawn(processes.put(files), {"pages": ["page one", "page two"]})
    (question,) = processes.until(pid, "asking")["asks"]
    assert question["question"].startswith("Shall I send it?")
    assert processes.signal(pid, "answer", body="yes", about=question["about"]).status_code == 200
    told = processes.over(pid)
    assert (told["reason"], told["result"]) == ("ok", "All of it.")


def test_all_python_on_the_pages_is_python() -> None:
    found = [*blocks(FIRST, "python"), *blocks(PROGRAMS, "python")]
    assert len(found) >= 4
    for text in found:
        ast.parse(text)


def texts_of(folder: Path) -> dict[str, str]:
    return {path: content.decode() for path, content in read_program(os.fspath(folder)).items()}
