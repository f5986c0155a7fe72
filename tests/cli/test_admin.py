"""Commands of administration: the same with a server and without, and a key alone on standard output."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import typer

from nimbos.cli import app
from nimbos.cli.admin import Admin, OnDatabase, OverHttp, on_database, pages
from nimbos.cli.budget import prices_of
from nimbos.cli.conversation import ServerRefused
from nimbos.cli.quantities import exact_money, micros_of, money_of, seconds_until, since_ms
from nimbos.config import Settings
from nimbos.errors import InvalidRequest, NimbosError
from nimbos.presence import RunningServer, find_running, traced
from tests.batches.test_crash import Server
from tests.cli.command import NIMBOS, called, environment, refusal, refused, run
from tests.conftest import DEMO
from tests.databases import put_file
from tests.live import OWNER_SECRET, PATIENCE_S, Live, serving, write_script

Run = Callable[..., subprocess.CompletedProcess[str]]
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    put_file(folder)
    return folder


@contextmanager
def running(home: Path) -> Iterator[Live]:
    """A server of this home that commands find."""
    with serving(home, {"demo": DEMO}, database_url="") as live, traced(live.settings, live.url):
        yield live


@contextmanager
def started(home: Path) -> Iterator[httpx2.Client]:
    """A server that is a process of its own, beside which commands may be `called`."""
    server = Server(home, write_script(home, "demo", DEMO), "")
    server.start().close()
    try:
        found = find_running(Settings(home=str(home)))
        assert found is not None
        with httpx2.Client(base_url=found.url, timeout=PATIENCE_S) as client:
            yield client
    finally:
        server.process.terminate()
        server.process.wait(PATIENCE_S)


def document(home: Path, *arguments: str, **more: str) -> Any:
    shown = called(home, *arguments, "--json", **more)
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout)


def made_key(home: Path, *arguments: str, by: Run = called, **more: str) -> str:
    done = by(home, "key", "create", *arguments, **more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("nb-")
    assert done.stdout.strip() not in done.stderr
    return done.stdout.strip()


def test_a_key_made_without_a_server_works_on_the_one_that_starts_later(home: Path) -> None:
    secret = made_key(home, "laptop", "--models", "demo", "--rpm", "2", by=run)
    with started(home) as http:
        headers = {"authorization": f"Bearer {secret}"}
        body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
        statuses = [http.post("/v1/chat/completions", json=body, headers=headers).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        done = called(home, "key", "revoke", "laptop", NIMBOS_API_KEY=OWNER_SECRET)
        assert (done.returncode, done.stdout) == (0, "")
        refused = http.post("/v1/chat/completions", json=body, headers=headers)
        assert refused.status_code == 401  # at once: the command spoke to the server
        assert "revoked" in refused.text
    (key,) = json.loads(called(home, "key", "list", "--revoked", "--json").stdout)
    assert (key["name"], key["x_nimbos"]["scopes"]) == ("laptop", ["model:demo"])
    assert key["x_nimbos"]["revoked_at"] is not None


def test_a_second_key_of_a_living_name_is_an_error(home: Path) -> None:
    made_key(home, "laptop")
    assert "has a key named 'laptop' already" in refused(called(home, "key", "create", "laptop"))
    called(home, "project", "create", "other")
    made_key(home, "laptop", "--project", "other")
    assert "Several projects" in refused(called(home, "key", "revoke", "laptop"))
    assert called(home, "key", "revoke", "laptop", "--project", "other").returncode == 0
    made_key(home, "laptop", "--project", "other")


def test_a_key_may_have_everything_at_once(home: Path) -> None:
    options = ("--rpm", "60", "--tpm", "9000", "--concurrent", "4", "--weight", "2.5", "--classes", "batch,agent")
    more = ("--routes", "/v1/chat/completions,/v1/embeddings", "--admin", "--expires", "30d", "--per", "month")
    made_key(home, "all", *options, *more, "--budget-tokens", "1000", "--budget", "12.50usd")
    (key,) = json.loads(called(home, "key", "list", "--json").stdout)
    assert key["x_nimbos"]["scopes"] == [
        "class:batch",
        "class:agent",
        "admin",
        "route:/v1/chat/completions",
        "route:/v1/embeddings",
    ]
    assert key["x_nimbos"]["weight"] == 2.5
    assert key["expires_at"] - key["created_at"] in (30 * 86_400, 30 * 86_400 - 1)
    budgets = {budget["meter"]: budget for budget in json.loads(called(home, "budget", "show", "--json").stdout)}
    assert {meter: (budget["limit"], budget["period"]) for meter, budget in budgets.items()} == {
        "tokens": (1000, "month"),
        "cost_micros": (12_500_000, "month"),
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ("key", "create", "x", "--budget", "12.5000001"),
        ("key", "create", "x", "--budget", "1e3"),
        ("key", "create", "x", "--expires", "2001-01-01"),
        ("key", "create", "x", "--expires", "soon"),
        ("key", "create", "x", "--classes", "urgent"),
        ("key", "create", "x", "--routes", "chat"),
        ("key", "create", "x", "--project", "nowhere"),
        ("key", "create", ""),
        ("key", "create", "x", "--models", ""),
        ("key", "create", "x", "--classes", ","),
        ("key", "create", "x", "--routes", " "),
        ("key", "create", "x", "--per", "day"),
        ("key", "revoke", "nobody"),
        ("key", "revoke", "owner"),
        ("prices", "nowhere.toml"),
        ("usage", "--since", "1d", "--until", "2d"),
        ("budget", "set", "everybody", "--tokens", "5"),
        ("budget", "set", "key:nobody", "--tokens", "5"),
        ("budget", "set", "organisation"),
        ("budget", "raise", "organisation", "--tokens", "5"),
        ("budget", "remove", "organisation"),
        ("prices", "set", "demo"),
        ("user", "add", "nobody"),
        ("user", "remove", "nobody@example.org"),
        ("project", "archive", "default"),
        ("usage", "--since", "yesterday"),
        ("usage", "--json", "--csv"),
    ],
)
def test_what_is_wrong_is_said(home: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    monkeypatch.setenv("NIMBOS_HOME", str(home))
    with pytest.raises(NimbosError) as caught:
        typer.main.get_command(app)(arguments, standalone_mode=False)
    assert len(caught.value.message) > 20


def test_usage_tells_who_used_what(home: Path) -> None:
    env = {"NIMBOS_API_KEY": OWNER_SECRET}
    assert called(home, "prices", "set", "demo", "--input", "2", "--output", "8").returncode == 0
    with started(home) as http:
        secret = made_key(home, "=counted", **env)
        body = {"model": "demo", "messages": [{"role": "user", "content": "count"}]}
        headers = {"authorization": f"Bearer {secret}"}
        told = http.post("/v1/chat/completions", json=body, headers=headers).json()["usage"]
        report = document(home, "usage", **env)
        lines = called(home, "usage", "--csv", **env).stdout
        asks = run(home, "usage", "--by", "ask", "--json", **env).stdout
        shown = called(home, "usage", "--by", "model", **env).stdout
    expected = {
        "asks": 1,
        "input_tokens": told["prompt_tokens"],
        "cached_tokens": 0,
        "output_tokens": told["completion_tokens"],
        "thinking_tokens": 0,
        "cost_micros": 2 * told["prompt_tokens"] + 8 * told["completion_tokens"],
    }
    assert report["total"] == expected
    (row,) = report["rows"]
    assert {name: row[name] for name in expected} == expected
    assert (row["key"][:4], row["name"]) == ("key_", "=counted")
    (line,) = list(csv.DictReader(io.StringIO(lines)))
    assert line["name"] == "'=counted"
    assert int(line["output_tokens"]) == expected["output_tokens"]
    (ask,) = [json.loads(one) for one in asks.splitlines()]
    assert (ask["model"], ask["cost_micros"]) == ("demo", expected["cost_micros"])
    assert "demo" in shown
    assert document(home, "usage") == report  # without the server
    assert document(home, "usage", "--until", "2020-01-01")["total"]["asks"] == 0


def test_budgets_are_set_raised_shown_and_removed(home: Path) -> None:
    owner = "project:default"
    assert called(home, "budget", "set", owner, "--money", "20", "--per", "month", "--alert", "15").returncode == 0
    assert called(home, "budget", "raise", owner, "--money", "0.000001", "--per", "month").returncode == 0
    (budget,) = json.loads(called(home, "budget", "show", "--json").stdout)
    assert (budget["limit"], budget["remaining"], budget["alerts"][0]["threshold"]) == (
        20_000_001,
        20_000_001,
        15_000_000,
    )
    shown = called(home, "budget").stdout
    assert "project:default" in shown
    assert "20.000001" in shown
    assert called(home, "budget", "remove", owner, "--money", "--per", "month").returncode == 0
    assert json.loads(called(home, "budget", "show", "--json").stdout) == []


def test_a_budget_is_removed_of_the_key_that_lives_and_not_of_one_that_had_its_name(home: Path) -> None:
    for _ in range(2):
        made_key(home, "laptop", "--budget-tokens", "5")
        assert called(home, "key", "revoke", "laptop").returncode == 0
    made_key(home, "laptop", "--budget-tokens", "5")
    (living,) = json.loads(called(home, "key", "list", "--json").stdout)

    def owners() -> list[str]:
        return [budget["owner"]["id"] for budget in json.loads(called(home, "budget", "show", "--json").stdout)]

    assert (len(owners()), called(home, "budget", "remove", "key:laptop").returncode) == (3, 0)
    assert len(owners()) == 2 and living["id"] not in owners()
    assert called(home, "budget", "remove", "key:laptop").returncode == 1  # the living one has none
    assert called(home, "key", "revoke", "laptop").returncode == 0
    for of_them in owners():
        several = called(home, "budget", "remove", "key:laptop")
        if len(owners()) == 2:
            assert several.returncode == 1 and of_them in several.stderr
            assert called(home, "budget", "remove", f"key:{of_them}").returncode == 0
        else:
            assert several.returncode == 0
    assert owners() == []


def test_the_budget_of_a_process_that_is_not_there_can_be_removed(home: Path) -> None:
    assert called(home, "budget", "set", "process:proc_mistyped", "--tokens", "5").returncode == 0
    for code in (0, 1):  # then there is none
        assert called(home, "budget", "remove", "process:proc_mistyped").returncode == code


def test_a_long_answer_without_a_server_is_taken_in_pieces() -> None:
    """Every ask of a year is never held in memory."""
    sent = 0

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        if scope["path"] == "/wrong":
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": b'{"error": {"message": "Not so."}}'})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(1_000):
            await send({"type": "http.response.body", "body": b"%d\n" % number, "more_body": True})
            sent += 1
        await send({"type": "http.response.body", "body": b""})

    with asyncio.Runner() as runner:
        direct = OnDatabase(runner, endless)
        lines = direct.lines("/asks", {})
        assert [next(lines) for _ in range(3)] == [b"0\n", b"1\n", b"2\n"]
        assert sent < 100
        lines.close()  # type: ignore[attr-defined]
        sent = 0
        assert list(direct.lines("/asks", {})) == [b"%d\n" % number for number in range(1_000)]
        with pytest.raises(ServerRefused, match="Not so"):
            list(direct.lines("/wrong", {}))
        direct.close()


def test_limits_are_set_shown_and_taken_away(home: Path) -> None:
    made_key(home, "laptop")
    assert (
        called(home, "limit", "set", "key:laptop", "--model", "demo", "--rpm", "5", "--rpm-burst", "2").returncode == 0
    )
    (limit,) = json.loads(called(home, "limit", "show", "--json").stdout)
    assert (limit["owner"]["name"], limit["model"], limit["requests_per_min"]) == ("laptop", "demo", 5)
    assert (limit["requests_burst"], limit["tokens_per_min"]) == (2, None)
    assert called(home, "limit", "set", "key:laptop", "--model", "demo").returncode == 0
    assert "No limits" in called(home, "limit").stdout


def test_prices_come_from_a_file_exactly(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text('["*"]\ninput = 0.1\noutput = "0.40"\n[demo]\ninput = 1\n[demo.batch]\ninput = 0.000001\n')
    assert called(home, "prices", str(file)).returncode == 0
    table = json.loads(called(home, "prices", "show", "--json").stdout)
    assert {(one["model"], one["class"], one["meter"]): one["micros_per_million"] for one in table["prices"]} == {
        ("*", "*", "input"): 100_000,
        ("*", "*", "output"): 400_000,
        ("demo", "*", "input"): 1_000_000,
        ("demo", "batch", "input"): 1,
    }
    assert "0.40" in called(home, "prices").stdout


@pytest.mark.parametrize(
    "text",
    ["input = 1", "[demo]\nsmoke = 1", "[demo]\ninput = true", "[demo]\ninput = -1", "[demo", "[demo]\ninput = 1e30"],
)
def test_a_wrong_file_of_prices_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequest):
        prices_of(file)


def test_people_and_projects(home: Path) -> None:
    with subprocess.Popen(
        [NIMBOS, "user", "add", "ann@example.org", "--role", "admin", "--password-stdin"],
        env=environment(home),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as adding:
        printed, _ = adding.communicate("correct horse battery\n", timeout=PATIENCE_S)
    assert printed.startswith("user_")
    (ann,) = [one for one in json.loads(called(home, "user", "list", "--json").stdout) if one["role"] == "admin"]
    assert (ann["id"], ann["x_nimbos"]["has_password"]) == (printed.strip(), True)
    made = called(home, "project", "create", "research").stdout.strip()
    assert made in called(home, "project", "list").stdout
    made_key(home, "robot", "--project", "research")
    assert called(home, "project", "archive", "research").returncode == 0
    assert "project archived" in called(home, "key", "list").stdout
    assert made not in called(home, "project", "list").stdout
    assert made in called(home, "project", "list", "--archived").stdout
    assert called(home, "user", "remove", "ann@example.org").returncode == 0
    assert "ann@example.org" not in called(home, "user", "list").stdout


def test_the_audit_log_is_shown_and_checked(home: Path) -> None:
    made_key(home, "laptop")
    assert "api_key.created" in called(home, "audit").stdout
    checked = called(home, "audit", "--verify")
    assert checked.returncode == 0
    assert checked.stdout.startswith("3 rows, as they were written.")
    with sqlite3.connect(home / "nimbos.db") as database:
        database.execute("UPDATE audit_log SET actor_email = 'x' WHERE seq = 2")
    database.close()
    tampered = called(home, "audit", "--verify")
    assert tampered.returncode == 1
    assert "tampered" in tampered.stderr
    assert "Row 2" in tampered.stderr


def test_a_servers_trace_that_outlived_it_is_no_server(home: Path) -> None:
    (home / "run").mkdir()
    (home / "run" / "server.json").write_text('{"pid": 1, "url": "http://127.0.0.1:9"}')
    made_key(home, "laptop")


def test_the_server_that_was_there_before_is_found_again(home: Path) -> None:
    settings = Settings(home=str(home))
    with subprocess.Popen(["sleep", "60"]) as other:
        (home / "run").mkdir()
        before = RunningServer(pid=other.pid, url="http://127.0.0.1:9")
        (home / "run" / "server.json").write_bytes(msgspec.json.encode(before))
        with traced(settings, "http://127.0.0.1:10"):
            found = find_running(settings)
            assert found is not None
            assert found.url == "http://127.0.0.1:10"
        assert find_running(settings) == before
        other.kill()
    with traced(settings, "http://127.0.0.1:10"):
        pass
    assert find_running(settings) is None


def test_another_key_than_the_owners_is_told_so(home: Path) -> None:
    with running(home):
        assert "Set NIMBOS_API_KEY" in refusal(home, "key", "list", NIMBOS_API_KEY="nb-somebody-elses")


# --- both ways answer the same


def scenario(server: Admin) -> list[Any]:
    """Much of what can be done, and every answer or refusal."""
    answers: list[Any] = []

    def note(call: Callable[[], Any]) -> Any:
        try:
            answer = call()
        except NimbosError as error:
            answer = {"refused": error.message}
        answers.append(answer)
        return answer

    organisation = "/v1/organization"
    project = note(lambda: server.post(f"{organisation}/projects", {"name": "p"}))["id"]
    one = f"{organisation}/projects/{project}"
    note(lambda: server.post(f"{organisation}/projects", {"name": "p"}))
    key = note(lambda: server.post(f"{one}/api_keys", {"name": "k", "allowance": {"requests_per_min": 5}}))["id"]
    note(lambda: server.post(f"{one}/api_keys", {"name": "k"}))
    note(lambda: server.post(f"{one}/api_keys", {"nam": "k"}))
    note(lambda: server.get(f"{one}/api_keys", {"limit": 1}))
    note(lambda: server.post(f"{organisation}/users", {"email": "ann@example.org"}))
    note(lambda: list(pages(server, f"{organisation}/users")))
    wanted = {"owner_kind": "key", "owner_id": "k", "meter": "tokens", "limit": 7}
    note(lambda: server.post(f"{organisation}/budgets", wanted))
    note(lambda: server.get(f"{organisation}/budgets"))
    note(lambda: server.get(f"{organisation}/limits"))
    note(lambda: server.get(f"{organisation}/usage", {"by": "colour"}))
    note(lambda: server.get(f"{organisation}/usage", {"by": "model"}))
    note(lambda: b"".join(server.lines(f"{organisation}/usage/asks", {"format": "csv"})).decode())
    note(lambda: server.delete(f"{one}/api_keys/{key}"))
    note(lambda: server.delete(f"{one}/api_keys/{key}"))
    note(lambda: server.post(f"{one}/archive", {}))
    note(lambda: server.get(f"{organisation}/nothing"))
    note(lambda: [entry["x_nimbos"]["action"] for entry in server.get(f"{organisation}/audit_logs")["data"]])
    return answers


def _without_chance(text: str) -> str:
    """Ids, secrets and times are another each time."""
    text = re.sub(r"(proj|key|user|budget|limit|audit_log)_[0-9a-f]{32}", r"\1_ID", text)
    text = re.sub(r"nb-[\w.-]+", "nb-SECRET", text)
    return re.sub(r'("(?:created_at|added_at|created|archived_at|revoked_at)"): ?\d+', r"\1:0", text)


def test_over_http_and_on_the_database_all_answers_are_the_same(tmp_path: Path) -> None:
    with running(tmp_path / "one") as live:
        over_http = scenario(OverHttp(live.http))
    settings = Settings(home=str(tmp_path / "two"))
    Path(settings.home).mkdir()
    with on_database(settings) as direct:
        on_files = scenario(direct)
    assert len(over_http) > 15
    for first, second in zip(over_http, on_files, strict=True):
        assert _without_chance(msgspec.json.encode(first).decode()) == _without_chance(
            msgspec.json.encode(second).decode()
        )


# --- what people write


@pytest.mark.parametrize(
    ("text", "micros"),
    [
        ("12.50", 12_500_000),
        ("12.50usd", 12_500_000),
        ("12.5 USD", 12_500_000),
        ("0", 0),
        ("0.000001", 1),
        ("0.1", 100_000),
        ("999999999999.999999", 999_999_999_999_999_999),
    ],
)
def test_money_is_read_exactly(text: str, micros: int) -> None:
    assert micros_of(text) == micros
    assert micros_of(money_of(micros).replace(",", "")) == micros


@pytest.mark.parametrize("text", ["", "-1", "1,5", "1.", ".5", "1e3", "0.0000001", "nan", "1eur", "١", "1 2", "9" * 13])
def test_what_is_no_money_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        micros_of(text)


def test_a_files_number_stays_what_was_written() -> None:
    assert exact_money(Decimal("0.1")) == 100_000
    assert exact_money(Decimal("1E+2")) == 100_000_000
    assert exact_money(3) == 3_000_000


def test_times_are_spans_or_moments_in_utc() -> None:
    assert seconds_until("90d", now=NOW) == 90 * 86_400
    assert seconds_until("2026-11-23", now=NOW) == 12 * 3600
    assert since_ms("12h", now=NOW) == since_ms("2026-11-22", now=NOW)
    assert since_ms("999999y", now=NOW) == 0
    assert since_ms("2026-11-22T00:00+02:00", now=NOW) == since_ms("2026-11-21T22:00", now=NOW)
