"""Processes over HTTP, for tests: programs that are a few lines, and a stream that is read as a client reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from tests.live import OWNER_SECRET

PLAIN = {"nimbos.toml": 'name = "plain"\n', "instructions.md": "Be plain.\n"}
CURIOUS = {
    "nimbos.toml": 'name = "curious"\n\n[tools]\nbuiltin = ["ask"]\n',
    "instructions.md": "Ask before you answer.\n",
}
WEATHER = {
    "nimbos.toml": 'name = "weather"\n',
    "instructions.md": "Say how warm it is.\n",
    "tools.py": (
        "from nimbos.adk import tool\n\n\n"
        '@tool(effect="pure")\n'
        "def weather(city: str) -> dict:\n"
        '    """The weather in a city.\n\n    city: its name\n    """\n'
        '    return {"city": city, "degrees": 21}\n'
    ),
}


@dataclass(frozen=True)
class Sent:
    """An event of a stream. `id`: as it stands there, "" for none."""

    kind: str
    id: str
    data: dict[str, Any]


class Processes:
    """What one key sees. `http`: of any server."""

    def __init__(self, http: httpx2.Client, secret: str = OWNER_SECRET) -> None:
        self.http = http
        self.headers = {"authorization": f"Bearer {secret}"}

    def get(self, path: str, **query: Any) -> httpx2.Response:
        return self.http.get(f"/v1/{path}", params=query, headers=self.headers)

    def post(self, path: str, body: Any = None) -> httpx2.Response:
        return self.http.post(f"/v1/{path}", json=body if body is not None else {}, headers=self.headers)

    def delete(self, path: str) -> httpx2.Response:
        return self.http.delete(f"/v1/{path}", headers=self.headers)

    def put(self, files: dict[str, str]) -> str:
        reply = self.post("programs", {"files": files})
        assert reply.status_code == 200, reply.text
        return str(reply.json()["id"])

    def spawn(self, program: str, input: Any = "Hello.", **fields: Any) -> str:
        reply = self.post("processes", {"program": program, "input": input, "model": "demo", **fields})
        assert reply.status_code == 200, reply.text
        return str(reply.json()["id"])

    def process(self, pid: str) -> dict[str, Any]:
        reply = self.get(f"processes/{pid}")
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    def signal(self, pid: str, signal: str, **fields: Any) -> httpx2.Response:
        return self.post(f"processes/{pid}/signals", {"signal": signal, **fields})

    def stream(self, pid: str, *, last: str = "", **query: Any) -> Iterator[Sent]:
        headers = {**self.headers, **({"last-event-id": last} if last else {})}
        with self.http.stream("GET", f"/v1/processes/{pid}/events", params=query, headers=headers) as reply:
            assert reply.status_code == 200
            assert reply.headers["content-type"].startswith("text/event-stream")
            yield from sent(reply.iter_lines())

    def until(self, pid: str, state: str, *, last: str = "") -> dict[str, Any]:
        """Follows it until it says that it is so; the process then."""
        for one in self.stream(pid, last=last):
            if one.kind == "end" or (one.kind == "proc.state" and one.data["body"]["to"] == state):
                break
        found = self.process(pid)
        assert found["state"] == state, found
        return found

    def over(self, pid: str) -> dict[str, Any]:
        *_, last = self.stream(pid)
        assert last.kind == "end"
        return last.data


def sent(lines: Iterator[str]) -> Iterator[Sent]:
    fields = {"event": "", "id": "", "data": ""}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields["data"]:
            yield Sent(kind=fields["event"], id=fields["id"], data=json.loads(fields["data"]))
            fields = {"event": "", "id": "", "data": ""}


def write(folder: Path, files: dict[str, str]) -> str:
    """A program's folder; its path."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return str(folder)
