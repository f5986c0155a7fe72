"""Our side: `nimbos up` with a home of its own and the same library as the peer."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from bench.server import HOST, Server, free_port, running
from bench.setup import Setup

KEY = "bench-owner-key"
BY_ACCOUNT = {name: f"bench-key-of-{name}" for name in ("first", "second")}
Value = str | int | bool


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def make_home(setup: Setup, name: str, **engine: Value) -> Path:
    """A home with its settings and two accounts besides the owner's. `engine`: fields of `[engine]`."""
    home = setup.work / name
    home.mkdir(exist_ok=True)
    table: dict[str, Value] = {"threads": setup.threads, **engine}
    if not setup.flash_attention:
        table["flash_attention"] = False
    if setup.library is not None:
        table["library"] = str(setup.library)
    (home / "config.toml").write_text("[engine]\n" + "".join(f"{key} = {_toml(v)}\n" for key, v in table.items()))
    keys = (f'[keys.{name}]\nkey = "{key}"\naccount = "{name}"\n' for name, key in BY_ACCOUNT.items())
    (home / "keys.toml").write_text("".join(keys))
    return home


@asynccontextmanager
async def serving(setup: Setup, *, home: Path, model: str | None = None) -> AsyncIterator[Server]:
    """`model`: what `--model` gets; default the file of the setup."""
    port = free_port()
    named = model or str(setup.model)
    command = [*nimbos("up"), "--model", named, "--host", HOST, "--port", str(port)]
    log = setup.work / f"ours-{port}.log"
    async with running(
        command, name="nimbos", port=port, log=log, env=environment(home), headers=bearer(KEY)
    ) as server:
        yield server


async def pull(home: Path, model: Path) -> None:
    """So that a server with another model can load this one on first use."""
    process = await asyncio.create_subprocess_exec(
        *nimbos("pull"), str(model), env={**os.environ, **environment(home)}, stdout=asyncio.subprocess.DEVNULL
    )
    if await asyncio.wait_for(process.wait(), 300) != 0:
        raise RuntimeError(f"`nimbos pull {model.name}` ended with {process.returncode}.")


def nimbos(verb: str) -> list[str]:
    return [str(Path(sys.executable).with_name("nimbos")), verb]


def environment(home: Path) -> Mapping[str, str]:
    return {"NIMBOS_HOME": str(home), "NIMBOS_API_KEY": KEY}


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else f"'{value}'"
