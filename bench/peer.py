"""The peer: llama.cpp's own server, from the folder that `build_peer.sh` made."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bench.server import HOST, Server, free_port, running
from bench.setup import Setup

# Fixed for all runs: the same threads, no fitting of sizes to free memory, counters on.
_ALWAYS = ("--metrics", "--no-ui", "--offline", "--fit", "off")


def slots(flags: tuple[str, ...]) -> int:
    return int(flags[flags.index("-np") + 1])


@asynccontextmanager
async def serving(setup: Setup, flags: tuple[str, ...], *, tokens_per_slot: int) -> AsyncIterator[Server]:
    """`flags` hold `-np`. The context is large enough for all slots at their longest: the peer never runs out."""
    if setup.peer_dir is None:
        raise ValueError("--peer-dir is needed: the folder with llama-server. bench/build_peer.sh makes one.")
    port = free_port()
    context = slots(flags) * _padded(tokens_per_slot)
    threads = str(setup.threads)
    command = [
        str(setup.peer_dir / "llama-server"),
        *("--model", str(setup.model), "--host", HOST, "--port", str(port), "--ctx-size", str(context)),
        *("--threads", threads, "--threads-batch", threads),
        *_ALWAYS,
        *(() if setup.flash_attention else ("-fa", "off")),
        *flags,
    ]
    name = f"peer {' '.join(flags)}"
    env = {"LD_LIBRARY_PATH": str(setup.peer_dir)}
    log = setup.work / f"peer-{port}.log"
    async with running(command, name=name, port=port, log=log, env=env, headers={}) as server:
        yield server


def _padded(tokens: int) -> int:
    """libllama rounds a slot's context up to 256 cells."""
    return -(-tokens // 256) * 256
