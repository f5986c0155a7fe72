"""Processes of a server, from Python: start them, follow them, answer them, fork them.

    async with Client() as nimbos:
        process = await nimbos.run(Path("programs/trip"), "Is it warmer in Paris or in Oslo?")
        async for event in process.events():
            ...
        print(await process.result())

A stream goes on behind the last event it gave when its connection breaks, also at a server that was started again.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx2
import msgspec

from nimbos import config
from nimbos.adk.program import Program, read_program
from nimbos.errors import NotReady, Unauthorized
from nimbos.keys import owner_key_file
from nimbos.types import new_id

PATIENCE_S = 120.0  # how long a server that went away is waited for
_LOOK_AGAIN_S = 0.25
_ANSWER_S, _SILENCE_S, _CONNECT_S = 120.0, 90.0, 5.0  # a silent stream has comments
_UNAVAILABLE = 503
_PACKED = "application/x-nimbos-program"


class Refused(Exception):
    """The server's own words. `code`: as docs/api.md lists them."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class _Away(Exception):  # never leaves this file
    """The server is stopping, starting, or without its database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A message of a process's stream. `seq`: of an event of its log; None for `delta` and `end`."""

    kind: str
    data: dict[str, Any]
    seq: int | None = None


class Client:
    """Ends with its `async with` block. Raises everywhere: Refused, NotReady when no server answers."""

    def __init__(self, url: str = "", key: str = "") -> None:
        """Without `url`, the server that runs in this home; without `key`, NIMBOS_API_KEY or the owner's key here.

        Raises: NotReady, Unauthorized.
        """
        headers = {"authorization": f"Bearer {key or _own_key()}"}
        place, certificate = (url, "") if url else _own_server()
        trust = ssl.create_default_context(cafile=certificate) if certificate else True
        self.http = httpx2.AsyncClient(base_url=place, headers=headers, timeout=_timeout(_ANSWER_S), verify=trust)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.http.aclose()

    async def put(self, program: Program | Path) -> str:
        """Brings a program; its id. Raises: BrokenProgram, PayloadTooLarge, OSError."""
        files = await asyncio.to_thread(
            program.files if isinstance(program, Program) else lambda: read_program(program)
        )
        from nimbos.kernel import pack

        headers = {"content-type": _PACKED}
        return str((await self.send("POST", "/v1/programs", content=pack(files), headers=headers))["id"])

    async def run(
        self,
        program: Program | Path | str,
        input: Any = "",
        *,
        name: str = "",
        model: str = "",
        budget: Mapping[str, int] | None = None,
        key: str = "",
    ) -> Process:
        """A new process. `program`: brought first, or a name or id there. `budget`: `tokens`, `cost_micros`, `seconds`,
        `calls`. `key`: the same one never makes a second process."""
        hash = program if isinstance(program, str) else await self.put(program)
        said = {"name": name, "model": model, "budget": dict(budget or {}), "key": key}
        body = {"program": hash, "input": input, **{word: value for word, value in said.items() if value}}
        return Process(self, str((await self.send("POST", "/v1/processes", json=body))["id"]))

    def process(self, pid: str) -> Process:
        return Process(self, pid)

    async def send(self, method: str, path: str, **how: Any) -> Any:
        """What the server answers."""
        try:
            return _answer(await self.http.request(method, path, **how))
        except httpx2.HTTPError as error:
            raise NotReady(f"The server at {self.http.base_url} does not answer: {error}.") from error


@dataclass(frozen=True, slots=True)
class Process:
    client: Client = field(repr=False)
    pid: str

    async def now(self) -> dict[str, Any]:
        """As docs/api.md describes it."""
        found: dict[str, Any] = await self.client.send("GET", self._place())
        return found

    async def events(self, *, after: int = 0, watch: bool = False) -> AsyncGenerator[Seen, None]:
        """Its log and what it says, until it is done: the last has the kind `end`. `watch`: a person looks on, and its
        asks go before others. Close it (`contextlib.aclosing`) when leaving it early."""
        away_since: float | None = None
        clock = asyncio.get_running_loop().time
        while True:
            try:
                async for seen in self._streamed(after, watch):
                    away_since = None
                    after = seen.seq if seen.seq is not None else after
                    yield seen
                    if seen.kind == "end":
                        return
            except (httpx2.HTTPError, _Away) as error:
                away_since = clock() if away_since is None else away_since
                if clock() - away_since > PATIENCE_S:
                    raise NotReady(f"The server went away and did not come back within {PATIENCE_S:.0f} s.") from error
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def result(self) -> Any:
        """Waits for its end. Raises: Refused (`failed`, `cancelled`, `killed` …) for one that did not end well."""
        async for seen in self.events():
            if seen.kind == "end":
                if seen.data["reason"] != "ok":
                    raise Refused(200, seen.data["reason"], seen.data["error"] or f"It was {seen.data['reason']}.")
                return (await self.now())["result"]
        raise AssertionError("a stream ends with `end`")

    async def signal(self, signal: str, body: Any = None, *, about: str = "", id: str = "") -> dict[str, Any]:
        """`answer`, `message`, `top_up`, `pause`, `resume`, `cancel`, `kill`; the process then. `id`: with the same one
        it is the same signal, however often it is sent."""
        sent = {"signal": signal, "id": id or new_id("sig"), "body": body, "about": about or None}
        told: dict[str, Any] = (await self.client.send("POST", self._place("signals"), json=sent))["process"]
        return told

    async def answer(self, body: Any, *, about: str = "", id: str = "") -> dict[str, Any]:
        """To what it asks; `about` where it asks several things. `id`: as of any signal."""
        return await self.signal("answer", body, about=about, id=id)

    async def fork(self, *, at: int | None = None, n: int = 1, key: str = "") -> list[Process]:
        """What if: `n` processes that share its past, to event `at` or all of it. `key`: the same one never makes
        second forks of it."""
        body = {"at": at, "n": n, "key": key or None}
        made = await self.client.send("POST", self._place("fork"), json=body)
        return [Process(self.client, one["id"]) for one in made["data"]]

    async def adopt(self) -> dict[str, Any]:
        """Makes a fork real: what it withheld is done, and what it does from now on; the process then."""
        told: dict[str, Any] = await self.client.send("POST", self._place("adopt"), json={})
        return told

    async def drop(self) -> dict[str, Any]:
        """Ends a fork that is not wanted, with its files; the process then."""
        told: dict[str, Any] = await self.client.send("DELETE", self._place())
        return told

    async def _streamed(self, after: int, watch: bool) -> AsyncGenerator[Seen, None]:
        headers = {"last-event-id": str(after)} if after else {}
        query = {"watch": "true"} if watch else {}
        http = self.client.http
        async with http.stream(
            "GET", self._place("events"), params=query, headers=headers, timeout=_timeout(_SILENCE_S)
        ) as reply:
            if reply.status_code != httpx2.codes.OK:
                await reply.aread()
                if reply.status_code == _UNAVAILABLE:
                    raise _Away
                _answer(reply)
            fields: dict[str, str] = {}
            async for line in reply.aiter_lines():
                name, _, value = line.partition(": ")
                if line and name:
                    fields[name] = value
                elif not line and "data" in fields:
                    yield _seen(fields)
                    fields = {}

    def _place(self, part: str = "") -> str:
        return f"/v1/processes/{quote(self.pid, safe='')}{f'/{part}' if part else ''}"


def _seen(fields: Mapping[str, str]) -> Seen:
    """Raises: Refused, _Away for a message that is an error."""
    data = msgspec.json.decode(fields["data"])
    if fields.get("event") == "error":
        if data["error"]["code"] in ("not_ready", "storage_unavailable"):
            raise _Away
        raise Refused(500, data["error"]["code"], data["error"]["message"])
    return Seen(kind=fields.get("event", ""), data=data, seq=int(fields["id"]) if fields.get("id") else None)


def _answer(reply: httpx2.Response) -> Any:
    """Raises: Refused."""
    try:
        body = msgspec.json.decode(reply.content)
    except msgspec.DecodeError as error:
        raise Refused(reply.status_code, "unreadable", f"The server answered {reply.status_code}.") from error
    if reply.status_code >= httpx2.codes.BAD_REQUEST:
        raise Refused(reply.status_code, body["error"]["code"], body["error"]["message"])
    return body


def _timeout(seconds: float) -> httpx2.Timeout:
    return httpx2.Timeout(seconds, connect=_CONNECT_S)


def _own_server() -> tuple[str, str]:
    """Its address, and the certificate to trust, if it has one."""
    try:
        running = msgspec.json.decode((config.load().run_dir / "server.json").read_bytes())
        return str(running["url"]), str(running.get("certificate", ""))
    except (OSError, msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
        raise NotReady("No server runs in this home. Start one with `nimbos up`, or give `url`.") from error


def _own_key() -> str:
    named = os.environ.get("NIMBOS_API_KEY")
    if named:
        return named
    try:
        return owner_key_file(config.load()).read_text().strip()
    except OSError as error:
        raise Unauthorized("There is no key on this machine. Give `key`, or set NIMBOS_API_KEY.") from error
