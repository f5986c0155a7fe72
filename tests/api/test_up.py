"""The command itself, as a process: `nimbos up` and `nimbos chat` with the scripted model."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.cli.command import called
from tests.live import PATIENCE_S, user, write_script

NIMBOS = str(Path(sys.executable).with_name("nimbos"))


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NIMBOS_")}
    return {**kept, "NIMBOS_HOME": str(home), "NO_COLOR": "1", **more}


def run(home: Path, *arguments: str, typed: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [NIMBOS, *arguments],
        env=environment(home, **more),
        input=typed,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


class Up:
    """A running `nimbos up`, with what it printed once a model was ready."""

    def __init__(self, process: subprocess.Popen[str], printed: str) -> None:
        self.process = process
        self.printed = printed
        found = re.search(r"(https?://\S+)/v1\n", printed)
        assert found is not None, printed
        self.url = found[1]

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@contextmanager
def up(home: Path, *arguments: str, **more: str) -> Iterator[Up]:
    process = subprocess.Popen(
        [NIMBOS, "up", "--port", "0", *arguments],
        env=environment(home, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        printed = ""
        while "curl" not in printed or not printed.endswith("'\n"):
            line = process.stdout.readline()
            assert line, process.stderr.read()
            printed += line
        yield Up(process, printed)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.fixture
def script(tmp_path: Path) -> str:
    reply = {"match": "think", "thinking": "Hm.", "text": "Thought."}
    return f"scripted:{write_script(tmp_path, 'play', {'replies': [reply], 'default': {'text': 'Hello there!'}})}"


def test_up_prints_a_curl_line_that_works_when_pasted(tmp_path: Path, script: str) -> None:
    with up(tmp_path / "home", "--model", script) as server:
        key = (tmp_path / "home" / "owner.key").read_text().strip()
        assert key not in server.printed  # this is no terminal
        assert str(tmp_path / "home" / "owner.key") in server.printed
        line = server.printed[server.printed.index("  curl") :]
        pasted = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
        assert json.loads(pasted.stdout)["choices"][0]["message"]["content"] == "Hello there!"


def test_the_key_of_the_environment_is_the_owners(tmp_path: Path, script: str) -> None:
    with up(tmp_path / "home", "--model", script, NIMBOS_API_KEY="sk-mine") as server:
        assert "sk-mine" not in server.printed
        headers = {"authorization": "Bearer sk-mine"}
        assert httpx2.get(server.url + "/v1/models", headers=headers).status_code == 200
    assert not (tmp_path / "home" / "owner.key").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_and_takes_its_trace_along(
    tmp_path: Path, script: str, number: signal.Signals
) -> None:
    home = tmp_path / "home"
    with up(home, "--model", script) as server:
        running = json.loads((home / "run" / "server.json").read_text())
        assert running == {"pid": server.process.pid, "url": server.url, "certificate": ""}
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert server.stop(number) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read() == ""
    assert not (home / "run" / "server.json").exists()


def test_a_restart_prints_the_same_key_file_and_answers_the_same_key(tmp_path: Path, script: str) -> None:
    home = tmp_path / "home"
    keys = []
    for _ in range(2):
        with up(home, "--model", script) as server:
            keys.append((home / "owner.key").read_text())
            headers = {"authorization": f"Bearer {keys[0].strip()}"}
            assert httpx2.get(server.url + "/v1/models", headers=headers).status_code == 200
    assert keys[0] == keys[1]


def test_several_models_are_served_and_the_first_is_the_one_printed(tmp_path: Path, script: str) -> None:
    second = f"scripted:{write_script(tmp_path, 'other', {'default': {'text': 'Other.'}})}"
    with up(tmp_path / "home", "--model", second, "--model", script) as server:
        assert "Model:         other" in server.printed
        key = (tmp_path / "home" / "owner.key").read_text().strip()
        headers = {"authorization": f"Bearer {key}"}
        models = httpx2.get(server.url + "/v1/models", headers=headers).json()["data"]
        assert [model["id"] for model in models] == ["other", "play"]


def test_a_port_in_use_is_said_in_one_line(tmp_path: Path, script: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(tmp_path / "home", "up", "--model", script, "--port", port)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"Error: 127.0.0.1:{port} is in use")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--insecure"),
        (["--host", "nowhere.invalid"], "--insecure"),
        (["--host", "nowhere.invalid", "--insecure"], "nowhere.invalid"),
        (["--tls-cert", "x.pem"], "--tls-key"),
        (["--tls-cert", "x.pem", "--tls-key", "y.pem"], "x.pem"),
        (["--model", "scripted:none.json"], "none.json"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_what_cannot_start_is_one_clear_line(tmp_path: Path, script: str, arguments: list[str], said: str) -> None:
    models = [] if "--model" in arguments else ["--model", script]
    done = run(tmp_path / "home", "up", "--port", "0", *models, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_script_is_named_with_its_key(tmp_path: Path) -> None:
    file = write_script(tmp_path, "bad", {"replys": []})
    done = run(tmp_path / "home", "up", "--model", f"scripted:{file}")
    assert (done.returncode, "replys" in done.stderr, str(file) in done.stderr) == (1, True, True)


def test_a_wrong_setting_is_named(tmp_path: Path, script: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text("[server]\nprot = 1\n")
    done = run(home, "up", "--model", script)
    assert (done.returncode, "prot" in done.stderr) == (1, True)


def test_piped_input_is_asked_as_one_question(tmp_path: Path, script: str) -> None:
    home = tmp_path / "home"
    with up(home, "--model", script) as server:
        done = run(home, "chat", typed="please think\n")
        assert (done.returncode, done.stdout, done.stderr) == (0, "Thought.\n", "")
        key = (home / "owner.key").read_text().strip()
        other = run(tmp_path / "elsewhere", "chat", "--url", server.url, "--key", key, "-m", "play", typed="hi")
        assert other.stdout == "Hello there!\n"
        wrong = run(home, "chat", "--key", "wrong", typed="hi")
        assert (wrong.returncode, wrong.stderr.startswith("Error: This key")) == (1, True)


def test_chat_without_a_server_says_how_to_start_one(tmp_path: Path) -> None:
    done = run(tmp_path / "home", "chat", typed="hi")
    assert (done.returncode, "nimbos up" in done.stderr) == (1, True)


def test_logs_hold_ids_and_counts_but_no_words_and_no_keys(tmp_path: Path, script: str) -> None:
    home = tmp_path / "home"
    with up(home, "--model", script, "--log") as server:
        key = (home / "owner.key").read_text().strip()
        body = {"model": "play", "messages": user("my secret words")}
        for headers in ({"authorization": f"Bearer {key}"}, {"authorization": "Bearer nb-guessed"}):
            httpx2.post(server.url + "/v1/chat/completions", json=body, headers=headers)
        server.stop(signal.SIGTERM)
        assert server.process.stderr is not None
        logged = server.process.stderr.read()
    settled = [json.loads(line) for line in logged.splitlines() if "ask.settled" in line]
    assert settled[0]["output"] == 3
    for secret in ("secret", "words", "Hello", key, "nb-guessed"):
        assert secret not in logged


def test_help_is_there_for_every_command(tmp_path: Path) -> None:
    done = run(tmp_path / "home", "--help")
    assert done.returncode == 0
    for command in ("up", "chat", "pull", "models", "rm", "engine"):
        assert re.search(rf"\b{command}\b", done.stdout)
        assert called(tmp_path / "home", *shlex.split(command), "--help").returncode == 0
    assert run(tmp_path / "home", "--version").stdout.startswith("nimbos ")
