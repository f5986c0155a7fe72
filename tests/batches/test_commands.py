"""`nimbos batch`, as a user runs it against a server of the same home, which is a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.batches.test_batches import SCRIPT, chat_line, content_of
from tests.cli.command import NIMBOS, called, environment, refused, run
from tests.live import OWNER_SECRET, PATIENCE_S, write_script


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("batch")
    home = folder / "home"
    home.mkdir(mode=0o700)
    script = write_script(folder, "demo", SCRIPT)
    server = subprocess.Popen(
        [NIMBOS, "up", "-m", f"scripted:{script}", "--port", "0"],
        env=environment(home, NIMBOS_API_KEY=OWNER_SECRET),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    while "Nimbos is up" not in server.stdout.readline():
        assert server.poll() is None
    yield home
    server.send_signal(signal.SIGTERM)
    server.wait(PATIENCE_S)
    server.stdout.close()


def status(home: Path, batch_id: str) -> Any:
    shown = called(home, "batch", "show", batch_id, "--json", NIMBOS_API_KEY=OWNER_SECRET)
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout)["status"]


def refusal(home: Path, *arguments: str) -> str:
    return refused(called(home, "batch", *arguments, NIMBOS_API_KEY=OWNER_SECRET))


def test_a_file_is_submitted_watched_and_its_answers_fetched(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(content_of([chat_line("a"), chat_line("b"), chat_line("c", model="missing")]))
    done = run(home, "batch", "submit", str(file), "--wait", NIMBOS_API_KEY=OWNER_SECRET)
    assert done.returncode == 0, done.stderr
    batch_id = done.stdout.strip()
    assert batch_id.startswith("batch_")
    assert "completed, 2 of 3 done, 1 failed" in done.stderr
    answers = tmp_path / "answers.jsonl"
    assert called(home, "batch", "output", batch_id, "-o", str(answers), NIMBOS_API_KEY=OWNER_SECRET).returncode == 0
    assert [json.loads(line)["custom_id"] for line in answers.read_text().splitlines()] == ["a", "b"]
    errors = run(home, "batch", "output", batch_id, "--errors", NIMBOS_API_KEY=OWNER_SECRET).stdout
    assert [json.loads(line)["custom_id"] for line in errors.splitlines()] == ["c"]
    assert status(home, batch_id) == "completed"
    assert batch_id in called(home, "batch", "list", NIMBOS_API_KEY=OWNER_SECRET).stdout
    assert "cannot be cancelled" in refusal(home, "cancel", batch_id)


def test_ctrl_c_leaves_the_batch_alone_and_says_so(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(content_of([chat_line(f"{n}", "endless") for n in range(200)]))
    watcher = subprocess.Popen(
        [NIMBOS, "batch", "submit", str(file), "--wait"],
        env=environment(home, NIMBOS_API_KEY=OWNER_SECRET),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watcher.stdout is not None and watcher.stderr is not None
    batch_id = watcher.stdout.readline().strip()
    watcher.stderr.readline()  # it watches
    watcher.send_signal(signal.SIGINT)
    _, told = watcher.communicate(timeout=PATIENCE_S)
    assert watcher.returncode == 130
    assert f"goes on without you: nimbos batch show {batch_id}" in told
    assert status(home, batch_id) == "in_progress"
    done = called(home, "batch", "cancel", batch_id, NIMBOS_API_KEY=OWNER_SECRET)
    assert done.stdout == f"{batch_id} is cancelling.\n"
    deadline = time.monotonic() + PATIENCE_S
    while status(home, batch_id) != "cancelled":
        assert time.monotonic() < deadline


def test_what_cannot_be_submitted_is_one_line(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"{}\n")
    assert "--endpoint" in refusal(home, "submit", str(file))
    assert "/v1/nowhere" in refusal(home, "submit", str(file), "--endpoint", "/v1/nowhere")
    chat = ("--endpoint", "/v1/chat/completions")
    failed = called(home, "batch", "submit", str(file), *chat, "--wait", NIMBOS_API_KEY=OWNER_SECRET)
    assert failed.returncode == 1
    assert "line 1: The line is no request" in failed.stderr
    assert "no batch 'batch_none'" in refusal(home, "show", "batch_none")


def test_without_a_server_it_says_how_to_start_one(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    assert "nimbos up" in refusal(tmp_path / "home", "list")
