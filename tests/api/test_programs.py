"""`/v1/programs`: a folder comes whole or not at all, belongs to a project, and Python in it needs a scope."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest

from nimbos.api.programs import PACKED
from nimbos.kernel import pack
from tests.live import Live, error_of, serving

NUMBERS = count()
PLAIN = {"nimbos.toml": 'name = "plain"\n', "instructions.md": "Be plain.\n"}
PYTHON = {**PLAIN, "tools.py": "x = 1\n"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("home"), {"demo": {"default": {"text": "Hello."}}}) as running:
        yield running


class Holder:
    """Of a key, in a project of its own or in one that is named."""

    def __init__(self, server: Live, *, project: str = "", scopes: tuple[str, ...] = ()) -> None:
        self.server = server
        self.project = project or made(server, "/projects", {"name": f"p{next(NUMBERS)}"})["id"]
        body = {"name": f"k{next(NUMBERS)}", "scopes": list(scopes)}
        self.secret = made(server, f"/projects/{self.project}/api_keys", body)["value"]

    def ask(self, method: str, path: str, **how: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {self.secret}", **how.pop("headers", {})}
        return self.server.http.request(method, f"/v1{path}", headers=headers, **how)

    def put(self, files: dict[str, Any]) -> httpx2.Response:
        return self.ask("POST", "/programs", json={"files": files})


def made(server: Live, path: str, body: Any) -> dict[str, Any]:
    response = server.post(f"/v1/organization{path}", body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_a_folder_comes_as_texts_and_bytes(server: Live) -> None:
    holder = Holder(server)
    reply = holder.put({**PLAIN, "dot.png": {"base64": base64.b64encode(b"\x89PNG\0").decode()}})
    assert reply.status_code == 200, reply.text
    told = reply.json()
    assert (told["object"], told["name"], told["version"], told["python"]) == ("program", "plain", "0", False)
    assert [(file["path"], file["size_bytes"]) for file in told["files"]] == [
        ("dot.png", 5),
        ("instructions.md", 10),
        ("nimbos.toml", 15),
    ]
    assert told["size_bytes"] == 30
    for word in (told["id"], told["id"][:10], "plain", "plain@0"):
        assert holder.ask("GET", f"/programs/{word}").json() == told


def test_the_packed_form_is_the_same_program(server: Live) -> None:
    holder = Holder(server)
    content = pack({path: text.encode() for path, text in PLAIN.items()})
    packed = holder.ask("POST", "/programs", content=content, headers={"content-type": PACKED})
    assert packed.json() == holder.put(PLAIN).json()


def test_lists_come_in_pages_last_brought_first(server: Live) -> None:
    holder = Holder(server)
    ids = [holder.put({**PLAIN, "n": str(number)}).json()["id"] for number in range(3)]
    page = holder.ask("GET", "/programs", params={"limit": 2}).json()
    assert [one["id"] for one in page["data"]] == [ids[2], ids[1]]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[2], ids[1], True)
    rest = holder.ask("GET", "/programs", params={"after": page["last_id"]}).json()
    assert [one["id"] for one in rest["data"]] == [ids[0]]
    assert not rest["has_more"]


def test_another_projects_program_is_not_found(server: Live) -> None:
    program = Holder(server).put(PLAIN).json()["id"]
    other = Holder(server)
    error_of(other.ask("GET", f"/programs/{program}"), 404)
    assert other.ask("GET", "/programs").json()["data"] == []


def test_python_needs_a_scope_that_only_admins_give(server: Live) -> None:
    plain = Holder(server)
    assert plain.put(PLAIN).status_code == 200
    error = error_of(plain.put(PYTHON), 403)
    assert "programs:code" in error["message"]
    assert Holder(server, scopes=("programs:code",)).put(PYTHON).status_code == 200
    assert Holder(server, scopes=("admin",)).put(PYTHON).status_code == 200
    assert server.post("/v1/programs", {"files": PYTHON}).status_code == 200  # the owner's key


def test_members_cannot_give_the_scope_to_themselves(server: Live) -> None:
    project = made(server, "/projects", {"name": f"p{next(NUMBERS)}"})["id"]
    person = made(server, "/users", {"email": f"m{next(NUMBERS)}@example.org", "role": "member"})["id"]
    made(server, f"/projects/{project}/users", {"user_id": person, "role": "owner"})
    body = {"name": "runs", "scopes": ["admin"], "user_id": person}
    secret = made(server, f"/projects/{project}/api_keys", body)["value"]  # administers as a member may: this project
    headers = {"authorization": f"Bearer {secret}"}
    keys = f"/v1/organization/projects/{project}/api_keys"
    for scope, status in (("class:batch", 200), ("programs:code", 403), ("admin", 403)):
        reply = server.http.post(keys, json={"name": scope, "scopes": [scope], "user_id": person}, headers=headers)
        assert reply.status_code == status, (scope, reply.text)
    refused = server.http.post("/v1/programs", json={"files": PYTHON}, headers=headers)
    assert refused.status_code == 403  # `admin` in the hands of a member brings no Python


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 400, "files"),
        ({"files": {}}, 400, "neither nimbos.toml"),
        ({"files": {"nimbos.toml": 'name = "x"\ncolour = 1\n'}}, 400, "nimbos.toml, line 2"),
        ({"files": {**PLAIN, "../x": "y"}}, 400, "../x"),
        ({"files": {**PLAIN, "/etc/passwd": "y"}}, 400, "relative"),
        ({"files": {**PLAIN, "a": {"base64": "%%%"}}}, 400, "base64"),
        ({"files": {**PLAIN, "a": {"base64": "", "mode": 1}}}, 400, "mode"),
        ({"files": {**PLAIN, "a": 1}}, 400, "files"),
        ({"files": PLAIN, "account": "proj_other"}, 400, "account"),
        ({"files": {**PLAIN, "a": "x" * (5 << 20)}}, 413, "'a'"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_kept(server: Live, body: Any, status: int, says: str) -> None:
    holder = Holder(server)
    error = error_of(holder.ask("POST", "/programs", json=body), status)
    assert says in error["message"]
    assert holder.ask("GET", "/programs").json()["data"] == []


@pytest.mark.parametrize("content", [b"", b"nimbos-program 1\n", b"nimbos-program 1\n99 a\nx", b"PK\x03\x04"])
def test_bytes_that_are_no_program_are_refused(server: Live, content: bytes) -> None:
    reply = Holder(server).ask("POST", "/programs", content=content, headers={"content-type": PACKED})
    assert error_of(reply, 400)["code"] == "broken_program"


@pytest.mark.parametrize("word", ["none", "f" * 64, "f" * 10, "plain@9", "%00", "..", "x" * 3000])
def test_a_program_that_is_not_there_is_not_found(server: Live, word: str) -> None:
    holder = Holder(server)
    holder.put(PLAIN)
    error_of(holder.ask("GET", f"/programs/{word}"), 404)


def spawned(holder: Holder, program: str) -> str:
    reply = holder.ask("POST", "/processes", json={"program": program, "input": "Hello.", "model": "demo"})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["id"])


def until_done(holder: Holder, pid: str) -> None:
    with holder.server.http.stream(
        "GET", f"/v1/processes/{pid}/events", headers={"authorization": f"Bearer {holder.secret}"}
    ) as reply:
        assert "event: end" in list(reply.iter_lines())


def test_a_program_goes_when_no_process_of_it_is_left(server: Live) -> None:
    holder = Holder(server)
    program = holder.put({**PLAIN, "nimbos.toml": 'name = "asks"\n[budget]\ntokens = 1\n'}).json()["id"]
    pid = spawned(holder, program)  # which waits for a budget, or is about to
    assert pid in error_of(holder.ask("DELETE", "/programs/asks"), 409)["message"]
    assert holder.ask("GET", "/programs/asks").status_code == 200
    holder.ask("POST", f"/processes/{pid}/signals", json={"signal": "kill"})
    until_done(holder, pid)
    gone = holder.ask("DELETE", "/programs/asks")
    assert gone.json() == {"id": program, "object": "program", "deleted": True}
    error_of(holder.ask("DELETE", f"/programs/{program}"), 404)
    error_of(holder.ask("POST", "/processes", json={"program": program, "input": "", "model": "demo"}), 404)
    assert holder.ask("GET", "/programs").json()["data"] == []


def test_what_is_over_can_be_replayed_and_forked_without_its_program(server: Live) -> None:
    holder = Holder(server)
    program = holder.put({**PLAIN, "n": "replayed"}).json()["id"]
    pid = spawned(holder, program)
    until_done(holder, pid)
    assert holder.ask("DELETE", f"/programs/{program}").status_code == 200
    replayed = holder.ask("POST", f"/processes/{pid}/replay", json={"model": "demo"})
    assert "event: end" in replayed.text and "event: error" not in replayed.text
    (fork,) = holder.ask("POST", f"/processes/{pid}/fork", json={}).json()["data"]
    until_done(holder, fork["id"])
    assert holder.ask("GET", f"/processes/{fork['id']}").json()["reason"] == "ok"


def test_a_program_that_is_taken_away_stays_a_part_of_others(server: Live) -> None:
    whole, alone = Holder(server), Holder(server)
    judge = {"nimbos.toml": 'name = "judge"\n', "instructions.md": "Judge, whatever you are shown.\n"}
    parts = {f"agents/judge/{path}": text for path, text in judge.items()}
    debate = whole.put({**PLAIN, **parts}).json()
    assert debate["agents"] == {"judge": alone.put(judge).json()["id"]}
    assert alone.ask("DELETE", "/programs/judge").status_code == 200
    pid = spawned(whole, debate["id"])
    until_done(whole, pid)
    judges = Path(server.settings.home, "blobs").rglob(f"*{debate['agents']['judge'][2:]}")
    assert any(file.is_file() for file in judges)
