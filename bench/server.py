"""A server under measurement: start it, wait until it answers, read its counters and memory, end it by its pid.

`peer.py` and `ours.py` say which command; nothing here knows the difference. At most one server runs at a time: two
engines on the same cores would measure each other.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

START_LIMIT_S = 300.0
STOP_LIMIT_S = 15.0
HOST = "127.0.0.1"
_one_at_a_time = asyncio.Lock()


@dataclass(slots=True, eq=False)
class Server:
    """`headers` prove the account that may read `/metrics`. `ready_s`: from start to the first good `/health`."""

    name: str
    url: str
    headers: dict[str, str]
    process: asyncio.subprocess.Process
    log: Path
    model: str = ""
    ready_s: float = 0.0

    def pids(self) -> list[int]:
        """The process and all its descendants that live now."""
        found, waiting = [], [self.process.pid]
        while waiting:
            pid = waiting.pop()
            try:
                tasks = list(Path(f"/proc/{pid}/task").iterdir())
                children = [child for task in tasks for child in (task / "children").read_text().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue
            found.append(pid)
            waiting += [int(child) for child in children]
        return found

    def resident_bytes(self) -> int:
        """Of the whole tree; pages that two processes share count twice."""
        page = os.sysconf("SC_PAGE_SIZE")
        total = 0
        for pid in self.pids():
            try:
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
            except (FileNotFoundError, ProcessLookupError):
                continue
        return total

    async def counters(self) -> dict[str, float]:
        """Samples of `/metrics` by full name, labels included."""
        async with httpx2.AsyncClient(timeout=30, trust_env=False) as client:
            reply = await client.get(f"{self.url}/metrics", headers=self.headers)
            reply.raise_for_status()
            return parse_counters(reply.text)


def parse_counters(text: str) -> dict[str, float]:
    """Prometheus' text format, without its comments."""
    samples: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
    return samples


def total(samples: Mapping[str, float], *endings: str) -> float | None:
    """The sum over all labels of Nimbos's counters whose name ends so; None where there is none."""
    names = ((full.partition("{")[0], value) for full, value in samples.items())
    values = [value for name, value in names if name.startswith("nimbos_") and name.endswith(endings)]
    return sum(values) if values else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def running(
    command: Sequence[str], *, name: str, port: int, log: Path, env: Mapping[str, str], headers: Mapping[str, str]
) -> AsyncIterator[Server]:
    """Raises: RuntimeError with the end of its log when it ends early or is not ready within `START_LIMIT_S`."""
    async with _one_at_a_time:
        started = time.monotonic()
        with log.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=sink, stderr=sink, env={**os.environ, **env}
            )
        server = Server(name=name, url=f"http://{HOST}:{port}", headers=dict(headers), process=process, log=log)
        try:
            await _wait_until_ready(server)
            server.ready_s = time.monotonic() - started
            server.model = await _model_id(server)
            yield server
        finally:
            await _stop(server)


async def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    async with httpx2.AsyncClient(timeout=5, trust_env=False) as client:
        while time.monotonic() < deadline:
            if server.process.returncode is not None:
                raise RuntimeError(f"{server.name} ended with {server.process.returncode}:\n{_tail(server.log)}")
            try:
                if (await client.get(f"{server.url}/health")).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            await asyncio.sleep(0.02)
    raise RuntimeError(f"{server.name} was not ready after {START_LIMIT_S:.0f} s:\n{_tail(server.log)}")


async def _model_id(server: Server) -> str:
    async with httpx2.AsyncClient(timeout=30, trust_env=False) as client:
        reply = await client.get(f"{server.url}/v1/models", headers=server.headers)
        reply.raise_for_status()
        return str(reply.json()["data"][0]["id"])


async def _stop(server: Server) -> None:
    """Asks first; what still lives after `STOP_LIMIT_S` is killed, descendants included."""
    left = server.pids()
    if server.process.returncode is None:
        server.process.terminate()
        try:
            await asyncio.wait_for(server.process.wait(), STOP_LIMIT_S)
        except TimeoutError:
            server.process.kill()
            await server.process.wait()
    for _ in range(int(STOP_LIMIT_S / 0.05)):
        if not _living(left):
            return
        await asyncio.sleep(0.05)
    for pid in _living(left):
        os.kill(pid, signal.SIGKILL)


def _living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
