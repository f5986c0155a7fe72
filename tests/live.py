"""A real server on a real port, in a thread of its own, for tests that talk HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import openai
import uvloop

from nimbos.api import build
from nimbos.config import BatchSettings, EngineSettings, ServerSettings, Settings, StorageSettings
from nimbos.engine.scripted import ScriptedSource
from nimbos.hub import Hub
from nimbos.keys import OwnerKey
from nimbos.models import open_models
from nimbos.runtime import Runtime, assemble
from nimbos.server import address_of, bind, make_server
from nimbos.types import Ask, Chunk
from tests.databases import fresh_url, put_file

OWNER_SECRET = "nb-test-owner"
PATIENCE_S = 60


class WatchedSource(ScriptedSource):
    """Says when an ask has ended, and how many are running. Otherwise the scripted model itself."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.ended = threading.Semaphore(0)
        self.asks: list[Ask] = []

    async def generate(self, ask: Ask) -> AsyncIterator[Chunk]:
        self.asks.append(ask)
        chunks = super().generate(ask)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()
            self.ended.release()


class Live:
    """`client` is the official one, without retries; `http` sends what it is told."""

    def __init__(
        self,
        url: str,
        settings: Settings,
        runtime: Runtime,
        sources: dict[str, WatchedSource],
        stop: Callable[[], None],
    ) -> None:
        self.url = url
        self.stop = stop
        self.settings = settings
        self.runtime = runtime
        self.sources = sources
        self.headers = {"authorization": f"Bearer {OWNER_SECRET}"}
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=OWNER_SECRET, max_retries=0, timeout=PATIENCE_S)
        self.http = httpx2.Client(base_url=url, headers=self.headers, timeout=PATIENCE_S)

    def post(self, path: str, body: Any) -> httpx2.Response:
        return self.http.post(path, json=body)

    def chat(self, **fields: Any) -> httpx2.Response:
        return self.post("/v1/chat/completions", {"model": "demo", "messages": user("hi"), **fields})

    def close(self) -> None:
        self.client.close()
        self.http.close()


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of a reply that must be one, in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def events_of(response: httpx2.Response) -> list[dict[str, Any]]:
    """The events of a finished stream; the last must be [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]", response.text[-300:]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def write_script(folder: Path, name: str, script: dict[str, Any]) -> Path:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(script))
    return file


@contextmanager
def serving(
    home: Path,
    scripts: dict[str, dict[str, Any]] | None = None,
    *,
    server: ServerSettings | None = None,
    engine: EngineSettings | None = None,
    models: tuple[Path, ...] = (),
    database_url: str | None = None,
    batches: BatchSettings | None = None,
) -> Iterator[Live]:
    """`models`: GGUF files that the operator names; their id is the file's stem. `database_url`: "" is SQLite in
    `home`; None is what the whole run uses (`tests/databases.py`)."""
    home.mkdir(parents=True, exist_ok=True)
    database_url = fresh_url() if database_url is None else database_url
    if not database_url:
        put_file(home)
    settings = Settings(
        home=str(home),
        server=msgspec.structs.replace(server or ServerSettings(), port=0),
        engine=engine or EngineSettings(),
        batches=batches or BatchSettings(),
        storage=StorageSettings(database_url=database_url),
    )
    sources = {name: WatchedSource.load(write_script(home, name, script)) for name, script in (scripts or {}).items()}
    hub = Hub(settings)
    named = {path.stem: replace(hub.find(str(path)), id=path.stem) for path in models}
    started = threading.Event()
    made: list[tuple[Any, Runtime, str]] = []

    async def run() -> None:
        owner = OwnerKey(secret=OWNER_SECRET, file=None)
        runtime = await assemble(
            settings, owner=owner, models=open_models(settings, hub=hub, scripted=sources.values(), named=named)
        )
        with bind(settings.server) as bound:
            uvicorn_server = make_server(build(runtime), settings.server)
            made.append((uvicorn_server, runtime, address_of(settings.server, bound)))
            started.set()
            try:
                await uvicorn_server.serve(sockets=[bound])
            finally:
                await runtime.close()

    def body() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())

    thread = threading.Thread(target=body, name="server")
    thread.start()
    assert started.wait(PATIENCE_S)
    uvicorn_server, runtime, url = made[0]
    live = Live(url, settings, runtime, sources, uvicorn_server.stop)
    try:
        yield live
    finally:
        live.close()
        uvicorn_server.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
