"""`nimbos ps`, `logs`, `tree`, `cost`, signals, answers and forks, as somebody at a shell uses them."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from nimbos.cli import remote
from tests.batches.test_crash import Server
from tests.cli.command import NIMBOS, called, environment, make_home, refused
from tests.live import OWNER_SECRET, PATIENCE_S, write_script
from tests.processing import CURIOUS, PLAIN, WEATHER, Processes, write

COUNTED = " ".join(f"word{n}" for n in range(30))
SCRIPT = {
    "replies": [
        {"match": "^Ask", "times": 1, "tool_calls": [{"name": "ask", "arguments": {"question": "Which city?"}}]},
        {"match": "Paris", "text": "It is Paris."},
        {"match": "^How warm", "times": 1, "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]},
        {"match": "degrees", "text": "21 degrees."},
        {"match": "^Send", "times": 1, "tool_calls": [{"name": "send_mail", "arguments": {"to": "ann@example.org"}}]},
        {"match": "7", "text": "It was sent."},
        {"match": "slowly", "text": COUNTED, "tokens_per_second": 12},
        {"match": "for ever", "text": "word " * 2_000, "tokens_per_second": 20},
    ],
    "default": {"text": "Hello to you."},
}
KEY = {"NIMBOS_API_KEY": OWNER_SECRET}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("ps"))


@pytest.fixture(scope="module")
def mine(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """On a server that is a process of its own."""
    server = Server(home, write_script(tmp_path_factory.mktemp("script"), "demo", SCRIPT), "")
    try:
        with started(server) as processes:
            for files in (PLAIN, CURIOUS, WEATHER):
                processes.put(files)
            yield processes
    finally:
        server.kill()


@contextmanager
def started(server: Server) -> Iterator[Processes]:
    client = server.start()
    url = str(client.base_url).removesuffix("/v1/")
    client.close()
    with httpx2.Client(base_url=url, timeout=PATIENCE_S) as http:
        yield Processes(http)


@pytest.fixture(scope="module")
def done(mine: Processes) -> str:
    pid = mine.spawn("weather", "How warm is it?")
    mine.over(pid)
    return pid


@pytest.fixture
def asking(mine: Processes) -> str:
    pid = mine.spawn("curious", "Ask me.")
    mine.until(pid, "asking")
    return pid


@pytest.fixture
def busy(mine: Processes) -> Iterator[str]:
    pid = mine.spawn("plain", "Talk for ever.")
    next(one for one in mine.stream(pid) if one.kind == "delta")
    yield pid
    mine.signal(pid, "kill")
    mine.over(pid)


def document(home: Path, *arguments: str) -> Any:
    shown = called(home, *arguments, "--json", **KEY)
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout)


def shell(home: Path, *arguments: str) -> str:
    """What a command that succeeds prints."""
    shown = called(home, *arguments, **KEY)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def refusal(home: Path, *arguments: str) -> str:
    return refused(called(home, *arguments, **KEY))


def test_a_script_reads_what_the_api_tells(home: Path, mine: Processes, done: str, asking: str) -> None:
    every = document(home, "ps", "-a")
    assert every["data"] == sorted(every["data"], key=lambda one: one["id"], reverse=True)
    by_id = {one["id"]: one for one in every["data"]}
    for name in ("id", "state", "reason", "result", "usage"):
        assert by_id[done][name] == mine.process(done)[name]
    assert (by_id[done]["state"], by_id[done]["result"]) == ("done", "21 degrees.")
    open_ids = [one["id"] for one in document(home, "ps")["data"]]
    assert asking in open_ids
    assert done not in open_ids


def test_a_person_sees_a_table(home: Path, done: str, asking: str) -> None:
    table = shell(home, "ps")
    (line,) = [line for line in table.splitlines() if asking in line]
    assert "asking (input)" in line
    assert "curious" in line
    assert "21 degrees." in next(line for line in shell(home, "ps", "-a").splitlines() if done in line)


def test_a_log_is_a_line_for_each_event(home: Path, mine: Processes, done: str) -> None:
    lines = shell(home, "logs", done).splitlines()
    events = [one for one in mine.stream(done) if one.id]
    assert len(lines) == len(events)
    assert [line.split()[0] for line in lines] == [one.id for one in events]
    for kind, words in (
        ("proc.created", "How warm is it?"),
        ("call.intent", 'weather {"city":"Oslo"}'),
        ("call.done", '"degrees":21'),
        ("model.done", "21 degrees."),
        ("proc.exited", "ok"),
    ):
        assert any(kind in line and words in line for line in lines), kind
    raw = [json.loads(line) for line in shell(home, "logs", done, "--json").splitlines()]
    assert raw == [one.data for one in events]


def test_a_log_that_is_followed_ends_with_its_process(home: Path, mine: Processes) -> None:
    pid = mine.spawn("plain", "Count slowly.")
    shown = called(home, "logs", pid, "-f", **KEY)
    assert shown.returncode == 0
    assert "proc.exited" in shown.stdout.splitlines()[-1]
    assert len(shown.stdout.splitlines()) == mine.process(pid)["events"]


def test_a_log_that_was_altered_is_found(home: Path, mine: Processes) -> None:
    pid = mine.spawn("plain", "Say hello.")
    events = mine.over(pid)["events"]
    assert shell(home, "logs", pid, "--verify").startswith(f"{events} events")
    with sqlite3.connect(home / "nimbos.db", timeout=PATIENCE_S) as database:
        database.execute("UPDATE process_events SET actor = 'nobody' WHERE pid = ? AND seq = 3", (pid,))
    database.close()
    assert "event 3" in refusal(home, "logs", pid, "--verify")


def test_a_beginning_of_an_id_is_enough_where_it_is_the_only_one(home: Path, mine: Processes, done: str) -> None:
    for given in (done[:-1], done.removeprefix("proc_")[:-1], done.removeprefix("proc_")):
        assert shell(home, "tree", given).startswith(done)
    assert "Several" in refusal(home, "tree", "proc_0")
    assert "no process" in refusal(home, "tree", "proc_zz")
    assert "no process" in refusal(home, "logs", f"proc_{'0' * 32}")


def test_tree_and_cost_show_who_spent_what(home: Path, mine: Processes, done: str) -> None:
    assert "weather" in shell(home, "tree", done)
    assert [one["id"] for one in document(home, "tree", done)["data"]] == [done]
    cost = document(home, "cost", done)
    assert cost["total"]["calls"] == 1
    shown = shell(home, "cost", done)
    assert f"{cost['total']['output']:,}" in next(line for line in shown.splitlines() if line.startswith("total"))


def test_a_tree_that_comes_in_pages_is_shown_whole(
    home: Path, mine: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PAGE", 2)
    spawning = "[(await spawn(kid, number)).pid for number in range(4)]"
    code = (
        "from nimbos.adk import child, spawn\n\n\n@child\nasync def kid(n):\n    return n\n\n\n"
        f"async def main(input):\n    return {spawning}\n"
    )
    pid = mine.spawn(mine.put({"nimbos.toml": 'name = "parent"\nentry = "main.py:main"\n', "main.py": code}))
    children = mine.over(pid)["result"]
    assert [one["id"] for one in document(home, "tree", pid)["data"]] == [pid, *sorted(children)]
    assert shell(home, "tree", pid).count("proc_") == 5


def test_pause_resume_and_kill(home: Path, mine: Processes, busy: str) -> None:
    assert busy in shell(home, "pause", busy)
    paused = mine.until(busy, "paused")
    assert busy in shell(home, "resume", busy)
    mine.until(busy, "running", last=str(paused["events"]))
    assert busy in shell(home, "kill", busy)
    assert mine.over(busy)["reason"] == "killed"
    for command in ("pause", "resume", "kill"):
        assert "over" in refusal(home, command, busy)


def test_a_log_shows_what_tools_print_and_nothing_of_it_steers_the_terminal(home: Path, mine: Processes) -> None:
    tools = WEATHER["tools.py"].replace("    return", '    print("looking \\x1b[2Jout\\nof the window")\n    return')
    pid = mine.spawn(mine.put({**WEATHER, "tools.py": tools, "nimbos.toml": 'name = "loud"\n'}), "How warm is it?")
    mine.over(pid)
    lines = shell(home, "logs", pid).splitlines()
    (at,) = (number for number, line in enumerate(lines) if "call.done" in line)
    assert lines[at + 1 : at + 3] == ["       │ looking [2Jout", "       │ of the window"]
    assert "│ of the window" in shell(home, "logs", pid, "-f")


def test_programs_are_listed_and_removed_and_a_key_may_bring_python(home: Path, mine: Processes) -> None:
    secrets = [shell(home, "key", "create", name, *more).strip() for name, more in (("no", ()), ("py", ("--code",)))]
    brought = {**WEATHER, "nimbos.toml": 'name = "brought"\n'}
    refused, taken = (
        mine.http.post("/v1/programs", json={"files": brought}, headers={"authorization": f"Bearer {secret}"})
        for secret in secrets
    )
    assert (refused.status_code, taken.status_code) == (403, 200)
    assert "brought" in [one["name"] for one in document(home, "program", "list")["data"]]
    assert taken.json()["id"][:12] in shell(home, "program", "list")
    assert shell(home, "program", "remove", "brought") == f"The program {taken.json()['id'][:12]} is removed.\n"
    assert "brought" not in shell(home, "program", "list")
    assert "no program" in refusal(home, "program", "remove", "brought")
    assert "is in use" in refusal(home, "program", "remove", mine.process(mine.spawn("curious", "Ask."))["program"])


def test_a_message_is_heard(home: Path, mine: Processes, busy: str, done: str) -> None:
    assert shell(home, "send", busy, "Do not talk.", "--id", "mine") == f"{busy} has your message.\n"
    shell(home, "send", busy, "Do not talk.", "--id", "mine")
    assert mine.over(busy)["result"] == "Hello to you."
    heard = [one for one in mine.stream(busy) if one.kind == "signal.received"]
    assert [list(one.data["texts"].values()) for one in heard] == [["Do not talk."]]
    assert "is over" in refusal(home, "send", busy, "Hello?")
    assert "empty" in refusal(home, "send", done, " ")


def test_an_answer_is_given_once(home: Path, mine: Processes, asking: str, busy: str) -> None:
    assert "Which city?" in refusal(home, "answer", asking)
    assert "--why" in refusal(home, "answer", asking, "Paris", "--why", "I live there.")
    assert "--result" in refusal(home, "answer", asking, "Paris", "--result", "Oslo")
    assert asking in shell(home, "answer", asking, "Paris")
    assert mine.over(asking)["result"] == "It is Paris."
    assert "asks nothing; it is done (ok)" in refusal(home, "answer", asking, "Paris")
    assert "asks nothing; it is running" in refusal(home, "answer", busy, "Paris")


def test_of_a_question_with_choices_one_of_them_is_the_answer(home: Path, mine: Processes) -> None:
    step = 'await ask("Send it?", choices=["Yes", "not yet"])'
    code = f"from nimbos.adk import ask\n\n\nasync def main(input):\n    return {step}\n"
    pid = mine.spawn(mine.put({"nimbos.toml": 'name = "choosing"\nentry = "main.py:main"\n', "main.py": code}))
    mine.until(pid, "asking")
    assert f"nimbos answer {pid} Yes | 'not yet'" in refusal(home, "answer", pid)
    assert "'Yes', 'not yet'" in refusal(home, "answer", pid, "perhaps")
    assert pid in shell(home, "answer", pid, " NOT yet")
    assert mine.over(pid)["result"] == "not yet"


def test_a_budget_is_topped_up(home: Path, mine: Processes) -> None:
    pid = mine.spawn("plain", "Count slowly.", budget={"tokens": 12})
    mine.until(pid, "asking")
    assert "--tokens" in refusal(home, "answer", pid, "more")
    assert "not both" in refusal(home, "answer", pid, "more", "--tokens", "5")
    assert "not both" in refusal(home, "answer", pid, "--tokens", "5", "--about", "tokens")
    assert "more to spend" in shell(home, "answer", pid, "--tokens", "5000")
    assert mine.over(pid)["reason"] == "ok"


def test_forks_are_made_adopted_and_dropped(home: Path, mine: Processes, asking: str) -> None:
    at = mine.process(asking)["events"]
    kept, dropped = shell(home, "fork", asking, "-n", "2", "--at", str(at)).split()
    for fork in (kept, dropped):
        mine.until(fork, "asking", last=str(at))
    assert kept in shell(home, "adopt", kept)
    assert not mine.process(kept)["withheld"]
    assert dropped in shell(home, "drop", dropped)
    assert mine.over(dropped)["reason"] == "killed"
    assert "no fork" in refusal(home, "adopt", asking)
    assert "no fork" in refusal(home, "drop", asking)
    assert "no event" in refusal(home, "fork", asking, "--at", "9999")


def test_a_fork_whose_answer_was_lost_is_made_once(tmp_path: Path, mine: Processes, asking: str) -> None:
    elsewhere = make_home(tmp_path)
    with losing_the_first_answer(mine) as (url, asked):
        (elsewhere / "run").mkdir(mode=0o700)
        (elsewhere / "run" / "server.json").write_text(json.dumps({"pid": 1, "url": url}))
        printed = shell(elsewhere, "fork", asking, "-n", "2").split()
    assert (len(asked), asked[0]) == (2, asked[1])
    children = [
        one["id"] for one in mine.get("processes").json()["data"] if (one["forked_from"] or {}).get("id") == asking
    ]
    assert sorted(printed) == sorted(children)


def test_a_top_up_whose_answer_was_lost_is_given_once(tmp_path: Path, mine: Processes) -> None:
    elsewhere = make_home(tmp_path)
    pid = mine.spawn("plain", "Count slowly.", budget={"tokens": 12})
    mine.until(pid, "asking")
    with losing_the_first_answer(mine) as (url, asked):
        (elsewhere / "run").mkdir(mode=0o700)
        (elsewhere / "run" / "server.json").write_text(json.dumps({"pid": 1, "url": url}))
        assert "more to spend" in shell(elsewhere, "answer", pid, "--tokens", "5000")
    assert (len(asked), asked[0]) == (2, asked[1])
    limits = {one["meter"]: one["limit"] for one in mine.get(f"processes/{pid}/cost").json()["budgets"]}
    assert limits["tokens"] == 5012
    assert mine.over(pid)["reason"] == "ok"


@contextmanager
def losing_the_first_answer(mine: Processes) -> Iterator[tuple[str, list[bytes]]]:
    """Its address, and what it was asked: it hands that on, and nobody hears the first answer."""
    asked: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["content-length"])))
            headers = {**mine.headers, "content-type": "application/json"}
            reply = mine.http.post(self.path, content=asked[-1], headers=headers)
            if len(asked) == 1:
                self.close_connection = True
                return
            self.send_response(reply.status_code)
            self.send_header("content-length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        running = threading.Thread(target=server.serve_forever)
        running.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            running.join()


def test_a_replay_shows_where_another_model_parts(home: Path, done: str) -> None:
    folded = shell(home, "replay", done).splitlines()
    assert "21 degrees." in folded[-2]
    assert "fold to done (ok), as the process says: 2 answers, 1 calls." in folded[-1]
    again = shell(home, "replay", done, "--model", "demo").splitlines()
    assert [line.split()[1] for line in again[:2]] == ["=", "="]
    assert "'nobody'" in refusal(home, "replay", done, "--model", "nobody")


def test_without_a_server_every_command_says_so(tmp_path: Path) -> None:
    for words in (("ps",), ("logs", "proc_1"), ("kill", "proc_1"), ("answer", "proc_1", "x"), ("fork", "proc_1")):
        assert "nimbos up" in refusal(tmp_path, *words)


def test_a_mail_that_a_crash_cut_off_is_never_sent_twice_silently(tmp_path: Path) -> None:
    """The server dies while the mail is on its way; a person says what became of it."""
    home, outbox = make_home(tmp_path), tmp_path / "outbox"
    mailer = {
        "nimbos.toml": 'name = "mailer"\n',
        "instructions.md": "Write mails.\n",
        "tools.py": MAILER.replace("OUTBOX", repr(str(outbox))),
    }
    server = Server(home, write_script(tmp_path, "demo", SCRIPT), "")
    try:
        server.start().close()
        pid = shell(home, "run", write(tmp_path / "mailer", mailer), "Send it.", "-m", "demo", "--detach").strip()
        deadline = time.monotonic() + PATIENCE_S
        while not outbox.exists():  # by the tool, which tells nobody else
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.kill()
        with started(server) as mine:
            mine.until(pid, "asking")
            told = refusal(home, "answer", pid)
            assert "'send_mail'" in told
            assert "happened|did_not|retry|abandon" in told
            assert "happened, did_not, retry, abandon" in refusal(home, "answer", pid, "perhaps")
            assert shell(home, "answer", pid, "happened", "--result", '{"id": 7}').startswith(pid)
            done = mine.over(pid)
        assert (done["reason"], done["result"]) == ("ok", "It was sent.")
        assert outbox.read_text() == "ann@example.org\n"
    finally:
        server.kill()


MAILER = """
import time

from nimbos.adk import tool


@tool(effect="opaque")
def send_mail(to: str) -> str:
    '''Sends a mail.

    Args:
        to: To whom.
    '''
    with open(OUTBOX, "a") as outbox:
        print(to, file=outbox)
    time.sleep(30)
    return "sent"
"""


def test_a_run_outlives_the_server_that_began_it(tmp_path: Path) -> None:
    """Killed in the middle of a sentence and started again: the one who watches sees the sentence once, and whole."""
    home = make_home(tmp_path)
    server = Server(home, write_script(tmp_path, "demo", SCRIPT), "")
    server.start().close()
    try:
        with subprocess.Popen(
            [NIMBOS, "run", write(tmp_path / "plain", PLAIN), "Count slowly.", "-m", "demo"],
            env=environment(home, **KEY),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as running:
            assert running.stderr is not None
            assert running.stdout is not None
            told = ""
            while "word9" not in told:
                told += running.stderr.read(1)
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
            server.start().close()
            told += running.stderr.read()
            assert running.stdout.read() == f"{COUNTED}\n"
        assert running.returncode == 0
    finally:
        server.kill()
    words = re.findall(r"word\d+", told)
    assert words[-1] == "word29"
    assert len(words) < 2 * 30
