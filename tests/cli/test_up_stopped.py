"""`nimbos up` and the signals that end it before it serves: nothing is lost, nothing stays, and no trace is printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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


def until(condition: Callable[[], bool]) -> None:
    """Another process cannot set our events."""
    while not condition():
        os.sched_yield()


@pytest.mark.parametrize("number", CODES)
def test_while_it_pulls_what_came_is_kept(home: Path, site: FakeHub, number: signal.Signals) -> None:
    source = site.add(NAME, b"GGUF" + bytes(8 * MIB))
    site.fail(NAME, stall(3 * MIB))
    hub = Hub(Settings(home=str(home)), environment={})
    with started(home, "--model", source, HF_ENDPOINT=site.url, HF_TOKEN="") as up:
        assert site.stalled.wait(PATIENCE_S)
        until(lambda: hub.partial_bytes(source) >= 2 * MIB)
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
def test_while_its_parts_are_put_together_it_leaves_nothing(home: Path, number: signal.Signals, tmp_path: Path) -> None:
    """The keys come out of a pipe: who opens it for writing waits until they are read, in the middle of the start."""
    os.mkfifo(home / "keys.toml")
    script = write_script(tmp_path, "play", {"default": {"text": "Hello."}})
    with started(home, "--model", f"scripted:{script}") as up:
        with (home / "keys.toml").open("w"):
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
    with started(home, "--model", str(model)) as up, library.open("wb"):
        until(trace.exists)
        url = json.loads(trace.read_text())["url"]
        assert httpx2.get(f"{url}/health").status_code == 503
        up.send_signal(number)
        assert up.communicate(timeout=PATIENCE_S) == ("", "")
    assert up.returncode == 0
    assert not trace.exists()
