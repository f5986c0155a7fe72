"""What `nimbos up` does, in order: check, take the port, get the models, serve, load the first, print, clean up."""

from __future__ import annotations

import asyncio
import gc
import logging
import shlex
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog
import uvloop

from nimbos.cli.interruptible import run_interruptible
from nimbos.cli.progress import Watching, kept_line
from nimbos.config import ServerSettings, Settings
from nimbos.engine.scripted import ScriptedSource
from nimbos.errors import ConfigError, ModelNotFound
from nimbos.hub import Hub, LocalModel
from nimbos.hub.reading import in_thread
from nimbos.keys import OwnerKey, owner_key
from nimbos.models import open_models
from nimbos.presence import traced
from nimbos.server import Server, address_of, bind, check_bind, keyless, make_server, stopped_by_signals

if TYPE_CHECKING:
    from nimbos.runtime import Runtime

_SCRIPTED = "scripted:"
_GARBAGE_THRESHOLDS = (20_000, 20, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The models this server was started with; `first` is loaded at start."""

    scripted: tuple[ScriptedSource, ...]
    local: tuple[LocalModel, ...]
    first: str


def run(settings: Settings, models: list[str], *, log: bool) -> int:
    """The exit code. Raises: NimbosError for what stops the start."""
    configure_logs(enabled=log)
    check_bind(settings.server)
    owner = owner_key(settings)
    with (
        bind(settings.server) as bound,
        _bind_ollama(settings.server) as without_key,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return run_interruptible(_up(settings, owner, models, bound, without_key), runner)


async def _up(
    settings: Settings, owner: OwnerKey, models: list[str], bound: socket.socket, without_key: socket.socket | None
) -> int:
    """Until it serves, a signal cancels it; from then on the server takes them."""
    url = address_of(settings.server, bound)
    ollama = address_of(keyless(settings.server), without_key) if without_key is not None else None
    hub = Hub(settings)
    chosen = await choose(hub, models)
    runtime = await _assemble(settings, owner, hub, chosen)
    try:
        listeners = await _listeners(runtime, bound, without_key)
        announce = partial(_announce, url, owner, chosen.first, certificate=settings.server.tls_cert, ollama=ollama)
        _collect_less()
        with stopped_by_signals(*listeners), traced(settings, url):
            return await _serve(listeners, runtime, announce)
    finally:
        await runtime.close()


def _collect_less() -> None:
    """What the start made lives as long as the server, so the garbage collector need not walk it; and it comes by less
    often. Together a twelfth of what a small request costs."""
    gc.freeze()
    gc.set_threshold(*_GARBAGE_THRESHOLDS)


def _bind_ollama(settings: ServerSettings) -> AbstractContextManager[socket.socket | None]:
    """Raises: ConfigError."""
    return bind(keyless(settings), option="--ollama-port") if settings.ollama else nullcontext()


async def _assemble(settings: Settings, owner: OwnerKey, hub: Hub, chosen: Chosen) -> Runtime:
    """The first model's process starts while the rest of the server is being imported; the kernel, which starts
    processes as well, only when that is done: a library that starts threads while another thread forks may crash.

    Raises: ConfigError, StorageUnavailable.
    """
    named = {model.id: model for model in chosen.local}
    models = open_models(settings, hub=hub, scripted=chosen.scripted, named=named, first=chosen.first)
    gc.disable()  # what is imported stays: walking it again and again is a tenth of this
    try:
        for module in ("nimbos.runtime", "nimbos.api.app"):
            await asyncio.to_thread(import_module, module)
    except BaseException:
        await models.close()
        raise
    finally:
        gc.enable()
    from nimbos.runtime import assemble

    return await assemble(settings, owner=owner, models=models)


async def _listeners(
    runtime: Runtime, bound: socket.socket, without_key: socket.socket | None
) -> dict[Server, socket.socket]:
    """Raises: ConfigError for a certificate or a key that cannot be used."""
    from nimbos.api import build, build_ollama
    from nimbos.api.ollama_key import ollama_secret

    settings = runtime.settings
    listeners = {make_server(build(runtime), settings.server): bound}
    if without_key is not None:
        app = build_ollama(runtime, await ollama_secret(runtime.accounts, settings))
        listeners[make_server(app, keyless(settings.server))] = without_key
    return listeners


async def choose(hub: Hub, names: list[str]) -> Chosen:
    """Pulls what was named and is missing; with no name, what is installed, or the default model.

    Raises: DownloadFailed, ModelUnusable, NotFound, ConfigError.
    """
    scripted: dict[str, ScriptedSource] = {}
    local: dict[str, LocalModel] = {}
    taken: dict[str, Path] = {}
    for name in names or [await _default(hub)]:
        if name.startswith(_SCRIPTED):
            path = Path(name.removeprefix(_SCRIPTED))
            source = ScriptedSource.load(path)
            _require_own_name(taken, source.card.id, path)
            scripted[source.card.id] = source
        else:
            model = await _get(hub, name)
            _require_own_name(taken, model.id, model.path)
            local[model.id] = model
    return Chosen(scripted=tuple(scripted.values()), local=tuple(local.values()), first=next(iter([*scripted, *local])))


def _require_own_name(taken: dict[str, Path], model_id: str, path: Path) -> None:
    """Raises: ConfigError for a second file of the same name: only one of them could be asked for."""
    other = taken.setdefault(model_id, path)
    if other != path:
        raise ConfigError(f"Two models are named {model_id!r}, after their files: {other} and {path}. Rename one.")


async def _default(hub: Hub) -> str:
    """The default model if it is here or nothing is; else what is installed."""
    installed = await asyncio.to_thread(hub.models)
    usable = [model.id for model in installed if model.problem is None and model.facts.kind == "generate"]
    return usable[0] if usable and hub.default_model not in usable else hub.default_model


async def _get(hub: Hub, name: str) -> LocalModel:
    try:
        return await in_thread(hub.find, name)
    except ModelNotFound:
        try:
            with Watching() as progress:
                return await hub.pull(name, progress=progress)
        except asyncio.CancelledError:
            print(kept_line(await asyncio.to_thread(hub.partial_bytes, name), "nimbos up"), file=sys.stderr)
            raise


async def _serve(
    listeners: dict[Server, socket.socket],
    runtime: Runtime,
    announce: Callable[[], None],
) -> int:
    """Serves while the first model loads, and until a signal comes. The runtime is closed then."""
    loading = runtime.loading
    assert loading is not None  # a first model was named
    serving = [asyncio.ensure_future(server.serve(sockets=[bound])) for server, bound in listeners.items()]
    try:
        await asyncio.wait({*serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            announce()
        done, _ = await asyncio.wait(serving, return_when=asyncio.FIRST_COMPLETED)
        for ended in done:
            ended.result()
    finally:
        for server in listeners:
            server.should_exit = True
        loading.cancel()
        await asyncio.gather(loading, *serving, return_exceptions=True)
        await runtime.close()
    return 0


def _announce(url: str, owner: OwnerKey, model: str, *, certificate: str, ollama: str | None) -> None:
    """What to paste. The key itself goes to a terminal only."""
    shown = sys.stdout.isatty()
    if shown:
        key = written = owner.secret
    elif owner.file is not None:
        key, written = f"(in {owner.file})", f"$(cat {shlex.quote(str(owner.file))})"
    else:
        key, written = "(in the variable NIMBOS_API_KEY)", "$NIMBOS_API_KEY"
    trust = f" --cacert {shlex.quote(str(Path(certificate).absolute()))}" if certificate else ""
    body = msgspec.json.encode({"model": model, "messages": [{"role": "user", "content": "Hello!"}]}).decode()
    lines = [
        "",
        f"  Nimbos is up:  {url}/v1",
        f"  Model:         {model}",
        f"  Key:           {key}",
        *([f"  Ollama:        {ollama} (without a key, as the key `ollama`)"] if ollama is not None else []),
        "",
        f'  curl{trust} {url}/v1/chat/completions -H "Authorization: Bearer {written}" \\',
        f"    -H 'Content-Type: application/json' -d {shlex.quote(body)}",
        "",
        "  Ctrl-C stops it." if shown else "",
    ]
    print("\n".join(lines), flush=True)


def configure_logs(*, enabled: bool) -> None:
    """JSON lines on stderr when asked for; otherwise warnings alone. No line ever holds a prompt or a key."""
    level = logging.INFO if enabled else logging.WARNING
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,  # each request writes lines, or passes them over
    )
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it would log whole tracebacks, with their texts
