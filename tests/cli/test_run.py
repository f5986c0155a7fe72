"""`nimbos run`: a folder becomes a process, and whoever sits there sees it, is asked, and may leave."""

from __future__ import annotations

import codecs
import json
import os
import pty
import re
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.batches.test_crash import Server
from tests.cli.command import NIMBOS, called, environment, make_home, refused
from tests.live import OWNER_SECRET, PATIENCE_S, write_script
from tests.processing import CURIOUS, PLAIN, WEATHER, Processes, write

SCRIPT = {
    "replies": [
        {"match": "^Ask", "times": 1, "tool_calls": [{"name": "ask", "arguments": {"question": "Which city?"}}]},
        {"match": "Paris", "text": "It is Paris."},
        {"match": "^How warm", "times": 1, "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]},
        {"match": "degrees", "text": "21 degrees."},
        {"match": "slowly", "text": "one two three four five six seven eight nine ten", "tokens_per_second": 4},
        {"match": '"rows": *3|rows.*3', "text": "Three rows."},
    ],
    "default": {"text": "Hello to you."},
}
PID = re.compile(r"proc_[0-9a-f]{32}")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def mine(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """On a server that is a process of its own."""
    server = Server(home, write_script(tmp_path_factory.mktemp("script"), "demo", SCRIPT), "")
    client = server.start()
    try:
        with httpx2.Client(base_url=str(client.base_url).removesuffix("/v1/"), timeout=PATIENCE_S) as http:
            yield Processes(http)
    finally:
        client.close()
        server.kill()


@pytest.fixture
def key(mine: Processes) -> dict[str, str]:
    return {"NIMBOS_API_KEY": OWNER_SECRET}


@pytest.fixture
def plain(tmp_path: Path) -> str:
    return write(tmp_path / "plain", PLAIN)


def test_a_pipe_gets_the_result_alone(home: Path, key: dict[str, str], plain: str) -> None:
    done = called(home, "run", plain, "Say hello.", "--model", "demo", **key)
    assert (done.returncode, done.stdout) == (0, "Hello to you.\n")
    assert PID.search(done.stderr)
    assert "✓ done" in done.stderr


def test_detached_it_prints_the_id_alone_and_goes_on(
    home: Path, mine: Processes, key: dict[str, str], plain: str
) -> None:
    done = called(home, "run", plain, "Say hello.", "-m", "demo", "--detach", "--name", "alone", **key)
    assert (done.returncode, done.stderr) == (0, "")
    assert PID.fullmatch(done.stdout.strip())
    told = mine.over(done.stdout.strip())
    assert (told["name"], told["result"]) == ("alone", "Hello to you.")


def test_calls_and_their_results_are_shown(home: Path, tmp_path: Path, key: dict[str, str]) -> None:
    folder = write(tmp_path / "weather", WEATHER)
    done = called(home, "run", folder, "How warm is it?", "-m", "demo", **key)
    assert (done.returncode, done.stdout) == (0, "21 degrees.\n")
    assert '→ weather {"city":"Oslo"}' in done.stderr
    assert '← {"city":"Oslo","degrees":21}' in done.stderr
    assert "tool_call" not in done.stderr


def test_a_program_that_is_there_runs_by_its_name(home: Path, key: dict[str, str], plain: str) -> None:
    assert called(home, "run", plain, "x", "-m", "demo", **key).returncode == 0
    assert called(home, "run", "plain", "x", "-m", "demo", **key).stdout == "Hello to you.\n"


@pytest.mark.parametrize(
    ("name", "content", "given"), [("a.json", '{"rows": 3}', {"rows": 3}), ("a.txt", "Say hello.", "Say hello.")]
)
def test_what_it_is_given_may_be_a_file(
    home: Path, mine: Processes, tmp_path: Path, key: dict[str, str], plain: str, name: str, content: str, given: object
) -> None:
    file = tmp_path / name
    file.write_text(content)
    done = called(home, "run", plain, "--input-file", str(file), "-m", "demo", "-d", **key)
    first = next(mine.stream(done.stdout.strip()))
    assert first.data["texts"][first.data["body"]["input"]] == given


def test_ctrl_c_leaves_it_alone_and_says_how_to_come_back(
    home: Path, mine: Processes, key: dict[str, str], plain: str
) -> None:
    with subprocess.Popen(
        [NIMBOS, "run", plain, "Count slowly.", "-m", "demo"],
        env=environment(home, **key),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        told = ""
        while "two" not in told:
            told += running.stderr.read(1)
        running.send_signal(signal.SIGINT)
        told += running.stderr.read()
        assert running.stdout is not None
        assert running.stdout.read() == ""
    assert running.returncode == 130
    found = PID.search(told)
    assert found is not None
    assert f"nimbos logs {found[0]} -f" in told
    assert mine.over(found[0])["result"] == "one two three four five six seven eight nine ten"


def test_on_a_terminal_it_asks_and_takes_the_answer(home: Path, tmp_path: Path, key: dict[str, str]) -> None:
    with Terminal(home, "run", write(tmp_path / "curious", CURIOUS), "Ask me.", "-m", "demo", **key) as terminal:
        terminal.until("Which city?")
        terminal.until("›")
        terminal.write("Paris\n")
        terminal.until("It is Paris.")
        terminal.until("✓ done")
        assert terminal.wait() == 0
    assert terminal.told.count("It is Paris.") == 1


def test_an_answer_that_was_typed_while_the_server_was_away_arrives(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    server = Server(home, write_script(tmp_path, "demo", SCRIPT), "")
    words = ("run", write(tmp_path / "curious", CURIOUS), "Ask me.", "-m", "demo")
    try:
        server.start().close()
        with Terminal(home, *words, NIMBOS_API_KEY=OWNER_SECRET) as terminal:
            terminal.until("›")
            server.kill()
            server.start().close()
            terminal.write("Paris\n")
            terminal.until("✓ done")
            assert terminal.wait() == 0
    finally:
        server.kill()
    assert terminal.told.count("It is Paris.") == 1


def test_without_a_terminal_it_says_how_to_answer(home: Path, tmp_path: Path, key: dict[str, str]) -> None:
    folder = write(tmp_path / "curious", CURIOUS)
    with subprocess.Popen(
        [NIMBOS, "run", folder, "Ask me.", "-m", "demo"],
        env=environment(home, **key),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        assert running.stdout is not None
        told = ""
        while "YOUR ANSWER" not in told:
            told += running.stderr.read(1)
        found = PID.search(told)
        assert found is not None
        assert called(home, "answer", found[0], "Paris", **key).returncode == 0
        assert running.stdout.read() == "It is Paris.\n"
    assert running.returncode == 0


def test_a_budget_is_given_and_asked_for(home: Path, key: dict[str, str], plain: str) -> None:
    with Terminal(home, "run", plain, "Count slowly.", "-m", "demo", "--budget-tokens", "12", **key) as terminal:
        terminal.until("how much more (tokens)?")
        terminal.write("many\n")
        terminal.until("no whole number")
        terminal.write("1,000\n")
        terminal.until("✓ done")
        assert terminal.wait() == 0


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"nimbos.toml": 'name = "x"\ncolour = "red"\n', "instructions.md": "x"}, ("nimbos.toml", "2", "colour")),
        ({"readme.md": "x"}, ("nimbos.toml",)),
    ],
)
def test_a_broken_program_is_one_line(
    home: Path, tmp_path: Path, key: dict[str, str], files: dict[str, str], words: tuple[str, ...]
) -> None:
    told = refusal(home, "run", write(tmp_path / "broken", files), "x", **key)
    assert all(word in told for word in words)


def test_what_cannot_be_run_is_one_line(home: Path, tmp_path: Path, key: dict[str, str], plain: str) -> None:
    assert "no folder" in refusal(home, "run", "./nowhere", "x", **key)
    assert "'nowhere'" in refusal(home, "run", "nowhere", "x", **key)
    assert "'nothing'" in refusal(home, "run", plain, "x", "-m", "nothing", **key)
    file = tmp_path / "bad.json"
    file.write_text("{")
    assert "bad.json" in refusal(home, "run", plain, "--input-file", str(file), **key)
    assert "not both" in refusal(home, "run", plain, "x", "--input-file", str(file), **key)
    assert "nimbos up" in refusal(tmp_path / "nobody", "run", plain, "x", **key)


def test_a_json_object_is_given_as_one(home: Path, mine: Processes, key: dict[str, str], plain: str) -> None:
    done = called(home, "run", plain, json.dumps({"rows": 3}), "-m", "demo", "-d", **key)
    first = next(mine.stream(done.stdout.strip()))
    assert first.data["texts"][first.data["body"]["input"]] == {"rows": 3}


def refusal(home: Path, *arguments: str, **key: str) -> str:
    return refused(called(home, *arguments, **key))


class Terminal:
    """A command with a terminal of its own. `told`: all it showed."""

    def __init__(self, home: Path, *arguments: str, **more: str) -> None:
        ours, theirs = pty.openpty()
        self._ours = ours
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end within a character
        self.told = ""
        self._seen = 0
        self.process = subprocess.Popen(
            [NIMBOS, *arguments], env=environment(home, **more), stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def until(self, words: str) -> None:
        """Behind what was waited for before."""
        while (at := self.told.find(words, self._seen)) < 0:
            ready, _, _ = select.select([self._ours], [], [], PATIENCE_S)
            assert ready, self.told
            self.told += self._decoder.decode(os.read(self._ours, 4096)).replace("\r", "")
        self._seen = at + len(words)

    def write(self, words: str) -> None:
        os.write(self._ours, words.encode())

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)
