"""The gateway alone: what Nimbos adds to a request when the model costs nothing, with keys, limits and ledger on.

Two arms in one run: Nimbos with a scripted model that answers one word, under a key that has request, token and
concurrency limits, a budget and prices; and a bare Starlette route on the same uvicorn that returns the same bytes,
which is what Python and this machine cost anyway. The client shares the cores with both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from bench import ours
from bench.abba import Arm, Measures, interleave, medians
from bench.http_load import Loads, closed_loop, open_loop, request_of
from bench.load import Words, percentile
from bench.report import Finding, publish
from bench.server import HOST, Server, free_port, running
from bench.setup import Setup, where

BODY = json.dumps({"model": "fast", "messages": [{"role": "user", "content": "Say one word."}]}).encode()
CONNECTIONS = 16
STREAMS = 1_000
WATCHED_S = 4.0

BARE = """
import sys, uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

async def chat(request):
    await request.body()
    return Response(b'{"choices": [{"message": {"content": "Yes"}}]}', media_type="application/json")

async def health(request):
    return Response(b"")

async def models(request):
    return Response(b'{"data": [{"id": "fast"}]}', media_type="application/json")

app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/health", health),
                        Route("/v1/models", models)])
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=False, log_level="critical", ws="none")
"""


def script(setup: Setup, *, tokens_per_second: float | None = None, words: int = 1) -> Path:
    reply: dict[str, object] = {"text": " ".join(["Yes"] * words)}
    if tokens_per_second is not None:
        reply["tokens_per_second"] = tokens_per_second
    file = setup.work / "fast.json"
    file.write_text(json.dumps({"replies": [], "default": reply}))
    return file


def make_key(home: Path, *, limited: bool = True) -> str:
    """A key as a team would have one: limits and a budget that are far away, so that they are checked and not hit."""
    options = ["--rpm", "10000000", "--tpm", "1000000000", "--budget", "1000000", "--per", "day"] if limited else []
    made = subprocess.run(
        [*ours.nimbos("key"), "create", f"load-{time.time_ns()}", *options],
        env=_environment(home),
        capture_output=True,
        text=True,
        check=True,
    )
    return made.stdout.strip()


def setup_for(*, out: Path | None, limit_s: float = 1800) -> Setup:
    """For scripts whose model costs nothing: a scripted one stands where the others have a GGUF."""
    work = Path(tempfile.mkdtemp(prefix="nimbos-bench-"))
    model = work / "fast.json"
    model.write_text("{}")
    return Setup(
        model=model,
        peer_dir=None,
        library=None,
        threads=len(os.sched_getaffinity(0)),
        quick=False,
        repeats=1,
        out=out,
        words=Words(low=1, high=2),
        peer_flags=(),
        limits=False,
        limit_s=limit_s,
        work=work,
    )


def set_prices(home: Path) -> None:
    command = [*ours.nimbos("prices"), "set", "fast", "--input", "1.00", "--output", "2.00"]
    subprocess.run(command, env=_environment(home), capture_output=True, check=True)


def _environment(home: Path) -> dict[str, str]:
    return {**os.environ, **ours.environment(home)}


async def run_ours(setup: Setup, requests: int) -> Measures:
    home = ours.make_home(setup, f"gateway-{time.time_ns()}")
    async with ours.serving(setup, home=home, model=f"scripted:{script(setup)}") as server:
        await asyncio.to_thread(set_prices, home)
        key = await asyncio.to_thread(make_key, home)
        return await _load(server, ours.bearer(key), requests)


async def run_bare(setup: Setup, requests: int) -> Measures:
    port = free_port()
    command = [sys.executable, "-c", BARE, str(port)]
    log = setup.work / f"bare-{port}.log"
    async with running(command, name="bare", port=port, log=log, env={}, headers={}) as server:
        return await _load(server, {}, requests)


async def _load(server: Server, headers: dict[str, str], requests: int) -> Measures:
    request = request_of(server.url, "/v1/chat/completions", BODY, headers)
    await closed_loop(server.url, request, connections=CONNECTIONS, requests=200)  # warm
    full = await closed_loop(server.url, request, connections=CONNECTIONS, requests=requests)
    half = await open_loop(
        server.url, request, connections=64, per_second=min(250.0, full.per_second / 2), requests=requests // 2
    )
    _require_clean(full, half)
    return {
        "requests/s": full.per_second,
        "p50 ms": 1e3 * percentile(half.seconds, 50),
        "p95 ms": 1e3 * percentile(half.seconds, 95),
        "p99 ms": 1e3 * percentile(half.seconds, 99),
        "resident MiB": server.resident_bytes() / 2**20,
    }


def _require_clean(*runs: Loads) -> None:
    for loads in runs:
        if loads.errors:
            raise RuntimeError(f"{len(loads.errors)} requests failed, the first with: {loads.errors[0]}")


async def run_streams(setup: Setup, streams: int) -> Measures:
    """`streams` answers of 64 words at 4 words a second each, all open at once."""
    home = ours.make_home(setup, f"streams-{time.time_ns()}", inbox=4 * streams)
    file = script(setup, tokens_per_second=4.0, words=64)
    async with ours.serving(setup, home=home, model=f"scripted:{file}") as server:
        key = await asyncio.to_thread(make_key, home)
        before = server.resident_bytes()
        request = request_of(
            server.url,
            "/v1/chat/completions",
            json.dumps({**json.loads(BODY), "stream": True}).encode(),
            ours.bearer(key),
        )
        watched = [_Stream() for _ in range(streams)]
        tasks = [asyncio.ensure_future(stream.read(server, request)) for stream in watched]
        await asyncio.gather(*(stream.begun.wait() for stream in watched))
        during = server.resident_bytes()
        before_them = [stream.events for stream in watched]
        await asyncio.sleep(WATCHED_S)
        counts = sorted(stream.events - earlier for stream, earlier in zip(watched, before_them, strict=True))
        await asyncio.gather(*tasks)
    return {
        "KiB per stream": (during - before) / 1024 / streams,
        "fewest events in 4 s": counts[0],
        "most events in 4 s": counts[-1],
        "whole answers": sum(stream.whole for stream in watched),
    }


class _Stream:
    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.events = 0
        self.whole = False

    async def read(self, server: Server, request: bytes) -> None:
        reader, writer = await asyncio.open_connection(HOST, int(server.url.rpartition(":")[2]))
        writer.write(request)
        async for line in reader:
            if line.startswith(b"data: "):
                self.events += 1
                self.begun.set()
                self.whole = line.startswith(b"data: [DONE]")
                if self.whole:
                    break
        writer.close()


async def run_flat(setup: Setup, requests: int) -> Measures:
    """Resident memory after a tenth of the requests, and after all."""
    home = ours.make_home(setup, f"flat-{time.time_ns()}")
    async with ours.serving(setup, home=home, model=f"scripted:{script(setup)}") as server:
        key = await asyncio.to_thread(make_key, home)
        request = request_of(server.url, "/v1/chat/completions", BODY, ours.bearer(key))
        samples = []
        for _ in range(10):
            _require_clean(await closed_loop(server.url, request, connections=CONNECTIONS, requests=requests // 10))
            samples.append(server.resident_bytes() / 2**20)
        return {"MiB after 10 %": samples[0], "MiB after half": samples[4], "MiB after all": samples[-1]}


async def measure(setup: Setup, *, requests: int, streams: int, flat: int) -> None:
    place = where(setup)
    arms = [
        Arm(name="Nimbos", run=partial(run_ours, setup, requests)),
        Arm(name="bare Starlette", run=partial(run_bare, setup, requests)),
    ]
    runs = await interleave(arms, repeats=1, limit_s=setup.limit_s)
    middle = medians(runs)["Nimbos"]
    bare = medians(runs)["bare Starlette"]
    runs["1,000 streams"] = [await run_streams(setup, streams)]
    runs["flat"] = [await run_flat(setup, flat)]
    opened, kept = runs["1,000 streams"][0], runs["flat"][0]
    findings = [
        Finding(name="requests/s", value=middle["requests/s"], at_least=500),
        Finding(name="requests/s ÷ bare", value=middle["requests/s"] / bare["requests/s"]),
        Finding(name="p50 at half that load, ms", value=middle["p50 ms"], at_most=2),
        Finding(name="p99 at half that load, ms", value=middle["p99 ms"], at_most=15),
        Finding(name="p50 added over bare, ms", value=middle["p50 ms"] - bare["p50 ms"]),
        Finding(name="memory per open stream, KiB", value=opened["KiB per stream"]),
        Finding(
            name="fewest ÷ most events among streams",
            value=opened["fewest events in 4 s"] / opened["most events in 4 s"],
            at_least=0.8,
        ),
        Finding(
            name=f"memory after {flat} requests ÷ after a tenth",
            value=kept["MiB after all"] / kept["MiB after 10 %"],
            at_most=1.1,
        ),
    ]
    publish(setup, title="The gateway", runs=runs, findings=findings, place=place)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--requests", type=int, default=10_000)
    arguments.add_argument("--streams", type=int, default=STREAMS)
    arguments.add_argument("--flat", type=int, default=100_000)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    setup = setup_for(out=given.out)
    asyncio.run(measure(setup, requests=given.requests, streams=given.streams, flat=given.flat))


if __name__ == "__main__":
    main()
