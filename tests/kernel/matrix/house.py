"""A home with a doomed server, and the person who uses it: starts it again when it has died, says everything again that
got no answer, and answers what processes ask."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import msgspec

from tests.cli.command import environment
from tests.kernel.matrix.doom import Deed, Doom
from tests.kernel.matrix.scenarios import Scenario, mail_result, programs, script
from tests.live import OWNER_SECRET, PATIENCE_S

POLL_S = 0.02
RUN_PATIENCE_S = 3 * PATIENCE_S  # of a whole run, with a server's death in it
FORKS = 2


@dataclass
class World:
    """What happened outside."""

    file: Path

    def done(self) -> list[tuple[str, str, str]]:
        """(process, tool, key) of each."""
        if not self.file.exists():
            return []
        lines = (json.loads(line) for line in self.file.read_text().splitlines())
        return [(pid, tool, key) for pid, tool, key in lines]


@dataclass
class House:
    folder: Path
    url: str = ""
    starts: int = 0
    process: subprocess.Popen[bytes] | None = None
    http: httpx2.Client | None = None
    programs: dict[str, str] = field(default_factory=dict)
    power: bool = False
    doubts: int = 0  # effects of which it was asked whether they happened

    def __post_init__(self) -> None:
        self.home = self.folder / "home"
        self.home.mkdir(mode=0o700)
        self.world = World(self.folder / "world")
        self.doom = self.folder / "doom"
        self.struck = self.folder / "doom.done"
        self.copy = self.folder / "copy"
        (self.folder / "demo.json").write_text(script())

    def start(self) -> None:
        running = self.home / "run" / "server.json"
        running.unlink(missing_ok=True)
        if self.power and self.copy.exists():
            self._back_to_the_copy()
        self.starts += 1
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.kernel.matrix.doom", "up"),
                    *("-m", f"scripted:{self.folder / 'demo.json'}", "--port", "0"),
                ],
                env=environment(
                    self.home,
                    NIMBOS_API_KEY=OWNER_SECRET,
                    NIMBOS_DATABASE_URL=self.url,
                    DOOM=str(self.doom),
                    DOOM_BOOT=f"boot {self.starts}" if self.power else "",
                ),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + PATIENCE_S
        while not running.exists():
            assert self.process.poll() is None, f"{self.process.returncode}: {self._last_words()}"
            assert time.monotonic() < deadline
            time.sleep(POLL_S)
        if self.http is not None:
            self.http.close()
        self.http = httpx2.Client(
            base_url=json.loads(running.read_text())["url"],
            headers={"authorization": f"Bearer {OWNER_SECRET}"},
            timeout=PATIENCE_S,
        )

    def _last_words(self) -> str:
        """Of the server; of a crash also its beginning, which says what crashed."""
        log = (self.folder / "log").read_text()
        crash = log.rfind("Fatal Python error")
        return log[crash : crash + 6000] if crash >= 0 else log[-2000:]

    def _back_to_the_copy(self) -> None:
        """The disk as it was when the power went: what was not synced is lost, and memory with it."""
        for suffix in ("", "-wal", "-shm"):
            (self.home / f"nimbos.db{suffix}").unlink(missing_ok=True)
        for file in self.copy.iterdir():
            shutil.copy(file, self.home)
        shutil.rmtree(self.copy)
        for file in (self.home / "run").glob("meter*"):
            file.unlink()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if self.http is not None:
            self.http.close()

    def install(self) -> None:
        for name, files in programs(str(self.world.file)).items():
            self.programs[name] = str(self.send("POST", "programs", {"files": files})["id"])

    def arm(self, at: int, deed: Deed) -> None:
        """From the next commit on."""
        self.struck.unlink(missing_ok=True)
        made = self.folder / "doom.making"
        made.write_bytes(msgspec.json.encode(Doom(at=at, deed=deed, copy=str(self.copy))))
        os.replace(made, self.doom)
        self.power = deed == "power"

    def send(self, method: str, path: str, body: Any = None, *, once: bool = False, **query: Any) -> Any:
        """Until there is an answer. A server that died is started again. `once`: and then None, as what was sent may
        have been done."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            assert time.monotonic() < deadline, path
            assert self.http is not None
            try:
                reply = self.http.request(method, f"/v1/{path}", json=body, params=query)
            except httpx2.HTTPError:
                self._bury()
                if once:
                    return None
                continue
            if reply.status_code < 400:
                return reply.json()
            late = reply.status_code == 409 or (reply.status_code == 400 and path.endswith("/signals"))
            if late:  # it was answered already, and may ask something else now
                return None
            assert reply.status_code == 503, reply.text
            time.sleep(POLL_S)

    def _bury(self) -> None:
        assert self.process is not None
        self.process.wait(PATIENCE_S)
        self.start()

    def run(self, scenario: Scenario, key: str) -> list[str]:
        """To its end, with all that came of it; the ids, parents before children, then forks."""
        body: dict[str, Any] = {
            "program": self.programs[scenario.program],
            "input": scenario.input,
            "name": "root",
            "key": key,
        }
        if scenario.budget:
            body["budget"] = scenario.budget
        root = str(self.send("POST", "processes", body)["id"])
        deadline = time.monotonic() + RUN_PATIENCE_S
        while True:
            forks = self._forks(root) if scenario.forks else []
            family = [one for pid in (root, *forks) for one in self.send("GET", f"processes/{pid}/tree")["data"]]
            if all(one["state"] == "done" for one in family):
                return [one["id"] for one in family]
            assert time.monotonic() < deadline, self._what_hangs(family)
            for one in family if len(forks) == FORKS or not scenario.forks else ():  # first it is forked
                if one["state"] == "asking":
                    self._answer(scenario, one["id"])
            time.sleep(POLL_S)

    def _forks(self, root: str) -> list[str]:
        """Two, made while it asks; the first is adopted before it may go on, the second never."""
        listed = self.send("GET", "processes")["data"]
        forks = sorted(one["id"] for one in listed if (one["forked_from"] or {}).get("id") == root)
        (now,) = (one for one in listed if one["id"] == root)
        if len(forks) < FORKS and (now["state"], now["reason"]) == ("asking", "input"):
            self.send("POST", f"processes/{root}/fork", {"n": FORKS - len(forks)}, once=True)
            return self._forks(root)
        if forks and self.send("GET", f"processes/{forks[0]}")["withheld"]:
            self.send("POST", f"processes/{forks[0]}/adopt")
        return forks

    def _answer(self, scenario: Scenario, pid: str) -> None:
        process = self.send("GET", f"processes/{pid}")
        for asked in process["asks"] if process["state"] == "asking" else ():
            reason, about = asked["reason"], asked["about"]
            body: dict[str, Any] = {"signal": "answer", "about": about, "id": f"{reason} {about} {process['events']}"}
            if reason == "budget":
                body = {"signal": "top_up", "id": "top up", "body": scenario.top_up}
            elif reason == "in_doubt":
                self.doubts += 1
                happened = any((one, tool) == (pid, "mail") for one, tool, _ in self.world.done())
                told = {"verdict": "happened", "result": mail_result(**asked["what"]["arguments"])}
                body["body"] = told if happened else {"verdict": "retry"}
            elif reason == "permission":
                body["body"] = {"approve": True}
            else:
                assert reason == "input", asked
                body["body"] = "go on" if scenario.forks else "blue"
            self.send("POST", f"processes/{pid}/signals", body)

    def _what_hangs(self, family: list[dict[str, Any]]) -> str:
        return f"{json.dumps(family)}\n{(self.folder / 'log').read_text()[-3000:]}"
