"""The kernel's own costs, with a scripted model that costs nothing: a system call, a fork, a parked process, `ps`.

The kernel runs in this process, as it does in a server, on SQLite in a fresh home. `ps` is asked of a real server over
that home.

A call's intent is on the disk before its tool begins, so the time from intent to outcome holds one write that waits for
the disk. What such a write takes is measured in the same folder, right before and after; the rest is the kernel's own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx2
import structlog
import uvloop

from bench import ours
from bench.abba import Arm, Measures, interleave, medians
from bench.load import Words
from bench.report import Finding, publish
from bench.server import free_port, running
from bench.setup import Setup, where
from nimbos.config import load
from nimbos.engine.scripted import ScriptedSource
from nimbos.kernel import Kernel, State
from nimbos.keys import OwnerKey
from nimbos.models import open_models
from nimbos.runtime import Runtime, assemble
from nimbos.types import Account

CALLS = 300
WRITES = 100
FORKS = 20
SHARED_TOKENS = 2_048
SCRIPT = {
    "replies": [{"match": "question", "tool_calls": [{"name": "ask", "arguments": {"question": "Go on?"}}]}],
    "default": {"text": "Done."},
}
CALLER = {
    "nimbos.toml": b'name = "caller"\nversion = "1.0.0"\nentry = "main.py:main"\n[budget]\ncalls = 1_000_000\n',
    "instructions.md": b"Calls a tool that does nothing.\n",
    "main.py": b"from nimbos.adk import call\n\n\nasync def main(input):\n    for number in range(int(input)):\n"
    b'        await call("nothing", number=number)\n    return "done"\n',
    "tools.py": b'from nimbos.adk import tool\n\n\n@tool(effect="opaque")\ndef nothing(number: int) -> int:\n'
    b'    """Does nothing."""\n    return number\n',
}
ASKER = {
    "nimbos.toml": b'name = "asker"\nversion = "1.0.0"\n[tools]\nbuiltin = ["ask"]\n',
    "instructions.md": b"Ask a question first.\n",
}


@asynccontextmanager
async def kernel_in(home: Path) -> AsyncIterator[tuple[Runtime, Account]]:
    script = home / "fast.json"
    script.write_text(json.dumps(SCRIPT))
    owner = OwnerKey(secret=ours.KEY, file=None)
    settings = load(home)
    models = open_models(settings, scripted=(ScriptedSource.load(script),))
    runtime = await assemble(settings, owner=owner, models=models)
    try:
        yield runtime, (await runtime.accounts.authenticate(ours.KEY)).account
    finally:
        await runtime.close()


async def until(kernel: Kernel, account: Account, pid: str, state: State) -> None:
    """Waits for news of the process until it says so: a look at it behind each of its events."""
    with kernel.bells.follow(pid) as follower:
        while (await kernel.find(account, pid)).state is not state:
            follower.news.clear()
            if (await kernel.find(account, pid)).state is state:
                return
            await follower.news.wait()


async def syscalls(setup: Setup) -> Measures:
    """A tool that does nothing, called one after the other: intent on the disk, worker, outcome on the disk."""
    home = _home(setup, "calls")
    disk = await asyncio.to_thread(_write_ms, home)
    async with kernel_in(home) as (runtime, account):
        kernel = runtime.kernel
        await kernel.programs.put(account, CALLER)
        warm = await kernel.spawn(account, "caller", 5)
        await until(kernel, account, warm, State.DONE)
        pid = await kernel.spawn(account, "caller", CALLS)
        while (await kernel.find(account, pid)).state is not State.DONE:  # noqa: ASYNC110
            await asyncio.sleep(0.3)  # whoever looked at each event would be measured, too
        events = [event async for event in kernel.log.all(pid)]
    intents = {event.call_id: event.ts_ms for event in events if event.kind == "call.intent"}
    took = [event.ts_ms - intents[event.call_id] for event in events if event.kind == "call.done"]
    disk += await asyncio.to_thread(_write_ms, home)
    ends = [event.ts_ms for event in events if event.kind == "call.done"]
    return {
        "syscall, intent to outcome ms": statistics.median_grouped(took),  # of whole milliseconds
        "a write to the disk ms": statistics.median(disk),
        "syscall and step, all in all ms": (ends[-1] - ends[0]) / (len(ends) - 1),
        "log bytes for each syscall": sum(len(event.body) for event in events) / len(took),
    }


async def forks(setup: Setup) -> Measures:
    """Of a process that asks a person, with a long context behind it."""
    words = " ".join(f"word{number}" for number in range(SHARED_TOKENS))
    async with kernel_in(_home(setup, "forks")) as (runtime, account):
        kernel = runtime.kernel
        await kernel.programs.put(account, ASKER)
        pid = await kernel.spawn(account, "asker", f"question {words}")
        await until(kernel, account, pid, State.ASKING)
        took = []
        for _ in range(FORKS):
            began = time.perf_counter()
            (fork,) = await kernel.fork(account, pid)
            took.append(1e3 * (time.perf_counter() - began))
            await until(kernel, account, fork, State.ASKING)
    return {"fork, own work ms": statistics.median(took)}


async def parked(setup: Setup, count: int) -> Measures:
    """Memory for each process that waits for a person, and how long a page of all of them takes over HTTP."""
    home = _home(setup, "parked")
    async with kernel_in(home) as (runtime, account):
        kernel = runtime.kernel
        await kernel.programs.put(account, ASKER)
        await _asking(kernel, account, 200)
        before = _resident_bytes()
        await _asking(kernel, account, count)
        each = (_resident_bytes() - before) / count
        tasks = len(asyncio.all_tasks())
        cpu = time.process_time()
        await asyncio.sleep(5)
        cpu = time.process_time() - cpu
    script = home / "fast.json"
    port = free_port()
    command = [*ours.nimbos("up"), "--model", f"scripted:{script}", "--port", str(port)]
    environment = {**os.environ, **ours.environment(home)}
    took = []
    async with (
        running(
            command,
            name="nimbos",
            port=port,
            log=setup.work / "parked.log",
            env=environment,
            headers=ours.bearer(ours.KEY),
        ) as server,
        httpx2.AsyncClient(trust_env=False, headers=server.headers) as http,
    ):
        for _ in range(30):
            began = time.perf_counter()
            reply = await http.get(f"{server.url}/v1/processes")
            reply.raise_for_status()
            took.append(1e3 * (time.perf_counter() - began))
    return {
        f"bytes for each of {count} parked": each,
        "tasks with all parked": float(tasks),
        "share of a core with all parked": cpu / 5,
        "ps, a page over HTTP ms": statistics.median(took),
    }


async def _asking(kernel: Kernel, account: Account, count: int) -> None:
    """So many processes that wait for a person's answer."""
    at_once = 50
    for start in range(0, count, at_once):
        births = (kernel.spawn(account, "asker", "A question.") for _ in range(min(at_once, count - start)))
        for pid in await asyncio.gather(*births):
            await until(kernel, account, pid, State.ASKING)


def _home(setup: Setup, name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=setup.work))


def _write_ms(home: Path) -> list[float]:
    """As the database's log is written: a page or two at its end, until the disk has them. Blocks."""
    took = []
    with (home / "written").open("wb", buffering=0) as file:
        for _ in range(WRITES):
            began = time.perf_counter()
            file.write(bytes(8192))
            os.fdatasync(file.fileno())
            took.append(1e3 * (time.perf_counter() - began))
    return took


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("This system does not tell a process's memory.")


async def measure(count: int, out: Path | None) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    work = Path(tempfile.mkdtemp(prefix="nimbos-bench-"))
    model = work / "fast.json"
    model.write_text(json.dumps(SCRIPT))
    setup = Setup(
        model=model,
        peer_dir=None,
        library=None,
        threads=os.cpu_count() or 1,
        quick=False,
        repeats=1,
        out=out,
        words=Words(low=1, high=2),
        peer_flags=(),
        limits=False,
        limit_s=3600,
        work=work,
    )
    place = where(setup)
    parts: list[tuple[str, Callable[[], Awaitable[Measures]]]] = [
        ("system calls", partial(syscalls, setup)),
        ("forks", partial(forks, setup)),
    ]
    runs = await interleave([Arm(name=name, run=run) for name, run in parts], repeats=1, limit_s=setup.limit_s)
    runs |= await interleave(
        [Arm(name="parked", run=partial(parked, setup, count))], repeats=1, limit_s=setup.limit_s, one_pass=True
    )
    middle = medians(runs)
    calls, fork, idle = (middle[name] for name in ("system calls", "forks", "parked"))
    findings = [
        Finding(name="syscall, intent to outcome, ms", value=calls["syscall, intent to outcome ms"], at_most=3),
        Finding(
            name="… without what one write to this disk takes, ms",
            value=calls["syscall, intent to outcome ms"] - calls["a write to the disk ms"],
        ),
        Finding(name=f"fork of {SHARED_TOKENS} tokens, own work, ms", value=fork["fork, own work ms"], at_most=50),
        Finding(name="bytes for a parked process", value=idle[f"bytes for each of {count} parked"], at_most=20_000),
        Finding(name=f"ps over {count} processes, ms", value=idle["ps, a page over HTTP ms"], at_most=50),
    ]
    publish(setup, title="The kernel's own costs", runs=runs, findings=findings, place=place)


if __name__ == "__main__":
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    given.add_argument("--processes", type=int, default=10_000, help="how many are parked")
    given.add_argument("--out", type=Path)
    asked = given.parse_args()
    uvloop.run(measure(asked.processes, asked.out))  # as a server does
