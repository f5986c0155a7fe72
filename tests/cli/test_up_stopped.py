"""`nimbos up` and the signals that end it before it serves: nothing is lost, nothing stays, and no trace is printed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import httpx2
import pytest

from nimbos.config import Settings
from nimbos.hub import Hub
from tests import tiny_gguf
from tests.cli.command import NIMBOS, environment, make_home
from tests.hub.fake_hub import FakeHub, running, stall
from tests.live import PATIENCE_S, write_script

NAME = "owner/repo/big-Q4_0.gguf"
MIB = 2**20
TIB = 2**40
T = TypeVar("T")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path)


@pytest.fixture
def site() -> Iterator[FakeHub]:
    with running() as hub:
        yield hub
        hub.released.set()


@contextmanager
def started(home: Path, *arguments: str, **more: str) -> Iterator[subprocess.Popen[str]]:
    command = [NIMBOS, "up", "--port", "0", *arguments]
    with subprocess.Popen(
        command, env=environment(home, **more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def until(up: subprocess.Popen[str], condition: Callable[[], T | None]) -> T:
    """What is true of it then. Another process cannot set our events: it is asked, for as long as `up` lives."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline_s
        try:
            up.wait(timeout=0.01)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"It ended with {up.returncode}: {up.communicate()[1]}")
    return found


def to_reader(pipe: Path) -> IO[Any] | None:
    """The pipe's other end, when somebody reads it."""
    try:
        return open(pipe, "wb", opener=lambda path, _: os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


@pytest.mark.parametrize("number", CODES)
def test_while_it_pulls_what_came_is_kept(home: Path, site: FakeHub, number: signal.Signals) -> None:
    source = site.add(NAME, b"GGUF" + bytes(8 * MIB))
    site.fail(NAME, stall(3 * MIB))
    hub = Hub(Settings(home=str(home)), environment={})
    with started(home, "--model", source, HF_ENDPOINT=site.url, HF_TOKEN="") as up:
        until(up, site.stalled.is_set)
        until(up, lambda: hub.partial_bytes(source) >= 2 * MIB)
        up.send_signal(number)
        printed, told = up.communicate(timeout=PATIENCE_S)
    assert (up.returncode, printed) == (CODES[number], "")
    assert told.splitlines()[-1] == (
        f"Stopped. {hub.partial_bytes(source) / 1e6:,.1f} MB are kept; the same `nimbos up` goes on from there."
    )
    assert "Traceback" not in told
    assert hub.models() == []
    assert not (home / "run" / "server.json").exists()


@pytest.mark.parametrize("number", CODES)
def test_while_it_hashes_a_large_file_it_ends_at_once(home: Path, number: signal.Signals, tmp_path: Path) -> None:
    """All of it takes a quarter of an hour. What the file says of itself is remembered right before."""
    model = tiny_gguf.write("qwen2", tmp_path)
    os.truncate(model, TIB)
    facts = Settings(home=str(home)).cache_dir / "gguf"
    with started(home, "--model", str(model)) as up:
        until(up, lambda: [*facts.glob("*.json")])
        up.send_signal(number)
        assert up.communicate(timeout=PATIENCE_S) == ("", "")
    assert up.returncode == CODES[number]
    (remembered,) = facts.glob("*.json")
    assert json.loads(remembered.read_text())["sha256"] == ""


@pytest.mark.parametrize("number", CODES)
def test_while_its_parts_are_put_together_it_leaves_nothing(home: Path, number: signal.Signals, tmp_path: Path) -> None:
    """The keys come out of a pipe, which is opened in the middle of the start and then waits for us."""
    os.mkfifo(home / "keys.toml")
    script = write_script(tmp_path, "play", {"default": {"text": "Hello."}})
    with started(home, "--model", f"scripted:{script}") as up:
        with until(up, partial(to_reader, home / "keys.toml")):
            up.send_signal(number)
        assert up.communicate(timeout=PATIENCE_S) == ("", "")
    assert up.returncode == CODES[number]
    left = [*(home / "run").glob("meter-*"), *(home / "run").glob("server.json")]
    assert left == []


@pytest.mark.parametrize("number", CODES)
def test_while_the_first_engine_starts_it_ends_like_a_server(
    home: Path, number: signal.Signals, tmp_path: Path
) -> None:
    """The library is a pipe as well, and opened by the engine."""
    library = tmp_path / "libllama.so"
    os.mkfifo(library)
    (home / "config.toml").write_text(f'[engine]\nthreads = 1\ncells = 4096\nlibrary = "{library}"\n')
    model = tiny_gguf.write("qwen2", tmp_path)
    trace = home / "run" / "server.json"
    with started(home, "--model", str(model)) as up, until(up, partial(to_reader, library)):
        until(up, trace.exists)
        url = json.loads(trace.read_text())["url"]
        assert httpx2.get(f"{url}/health").status_code == 503
        up.send_signal(number)
        assert up.communicate(timeout=PATIENCE_S) == ("", "")
    assert up.returncode == 0
    assert not trace.exists()
