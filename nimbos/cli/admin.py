"""Administration from the command line: by the server of this home where one runs, else on the database itself.

Both speak to the same routes (`nimbos/api/admin`): one over a socket with the owner's key, the other inside this
process, as the owner of the home folder. So both do and answer the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import httpx2
import msgspec

from nimbos.cli.conversation import ServerRefused
from nimbos.cli.interruptible import run_interruptible
from nimbos.cli.running import admin_client
from nimbos.config import Settings
from nimbos.errors import NotReady, Unauthorized
from nimbos.presence import find_running

Query = Mapping[str, str | int | list[str]]

T = TypeVar("T")

_PAGE = 100
_AHEAD = 16  # pieces of a long answer that are not taken yet
_GOOD = 200


class Admin(Protocol):
    """Raises: ServerRefused with the answer's own words."""

    def get(self, path: str, query: Query | None = None) -> Any: ...

    def post(self, path: str, body: Any) -> Any: ...

    def delete(self, path: str) -> Any: ...

    def lines(self, path: str, query: Query) -> Iterator[bytes]:
        """An answer that may be long, in pieces."""
        ...


class OverHttp:
    """To a running server."""

    def __init__(self, client: httpx2.Client) -> None:
        self._client = client

    def get(self, path: str, query: Query | None = None) -> Any:
        return _answer(self._client.get(path, params=_parameters(query)))

    def post(self, path: str, body: Any) -> Any:
        return _answer(self._client.post(path, json=body))

    def delete(self, path: str) -> Any:
        return _answer(self._client.delete(path))

    def lines(self, path: str, query: Query) -> Iterator[bytes]:
        with self._client.stream("GET", path, params=_parameters(query)) as response:
            if response.status_code != 200:
                response.read()
                _answer(response)
            yield from response.iter_bytes()


class OnDatabase:
    """Inside this process, on an event loop of its own. Whoever made it closes it."""

    def __init__(self, runner: asyncio.Runner, app: Any) -> None:
        self._runner = runner
        self._app = app
        self._client = _inside(app)

    def get(self, path: str, query: Query | None = None) -> Any:
        return _answer(self._run(self._client.get(path, params=_parameters(query))))

    def post(self, path: str, body: Any) -> Any:
        return _answer(self._run(self._client.post(path, json=body)))

    def delete(self, path: str) -> Any:
        return _answer(self._run(self._client.delete(path)))

    def lines(self, path: str, query: Query) -> Iterator[bytes]:
        pieces: asyncio.Queue[bytes] = asyncio.Queue(_AHEAD)
        client = _inside(_aside(self._app, pieces))
        asking = self._runner.get_loop().create_task(client.get(path, params=_parameters(query)))
        try:
            while (piece := self._run(_next(pieces, asking))) is not None:
                yield piece
        finally:
            asking.cancel()
            self._runner.run(_ended(client, asking))

    def close(self) -> None:
        self._runner.run(self._client.aclose())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return run_interruptible(work, self._runner)


def _inside(app: Any) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://localhost")


def _aside(app: Any, pieces: asyncio.Queue[bytes]) -> Any:
    """The same app, whose good answers go into `pieces`: the transport would hold the whole of one."""

    async def taken(scope: Any, receive: Any, send: Any) -> None:
        status = 0

        async def put(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif status == _GOOD and message.get("body"):
                await pieces.put(message["body"])
                message = {**message, "body": b""}
            await send(message)

        await app(scope, receive, put)

    return taken


async def _next(pieces: asyncio.Queue[bytes], asking: asyncio.Task[httpx2.Response]) -> bytes | None:
    """None at the end. Raises: ServerRefused."""
    if not asking.done():
        taking = asyncio.ensure_future(pieces.get())
        await asyncio.wait({taking, asking}, return_when=asyncio.FIRST_COMPLETED)
        if taking.done():
            return taking.result()
        taking.cancel()
    if not pieces.empty():
        return pieces.get_nowait()
    response = await asking
    if response.status_code != _GOOD:
        _answer(response)
    return None


async def _ended(client: httpx2.AsyncClient, asking: asyncio.Task[httpx2.Response]) -> None:
    await asyncio.wait({asking})
    await client.aclose()


@contextmanager
def connect(settings: Settings) -> Iterator[Admin]:
    """The running server, if one answers; else the database."""
    if _answers(settings):
        with admin_client(settings) as client:
            try:
                yield OverHttp(client)
            except httpx2.HTTPError as error:
                raise NotReady(f"The server at {client.base_url} does not answer: {error}.") from error
        return
    with on_database(settings) as direct:
        yield direct


@contextmanager
def on_database(settings: Settings) -> Iterator[Admin]:
    """Raises: StorageUnavailable."""
    import uvloop

    from nimbos.accounts import Accounts, Identity, Role
    from nimbos.accounts.words import DEFAULT_PROJECT, LOCAL
    from nimbos.api import admin
    from nimbos.db import Database
    from nimbos.types import Account

    owner = Identity(account=Account(id=DEFAULT_PROJECT, name="default"), actor=LOCAL, role=Role.OWNER)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        database = run_interruptible(Database.open(settings), runner)
        try:
            accounts = run_interruptible(Accounts.open(database), runner)
            direct = OnDatabase(runner, admin.app(accounts, owner))
            try:
                yield direct
            finally:
                direct.close()
                runner.run(accounts.close())
        finally:
            runner.run(database.close())


def pages(server: Admin, path: str, **query: str | int | list[str]) -> Iterator[dict[str, Any]]:
    """Every element of a list."""
    after: dict[str, str] = {}
    while True:
        page = server.get(path, {"limit": _PAGE, **query, **after})
        yield from page["data"]
        if not page["has_more"]:
            return
        after = {"after": page["last_id"]}


def _answers(settings: Settings) -> bool:
    """Whether the server that says it runs here is alive; its file may have outlived it.

    Raises: Unauthorized when it takes another key.
    """
    if find_running(settings) is None:
        return False
    try:
        with admin_client(settings) as client:
            status = client.get("/v1/console/me").status_code
    except httpx2.HTTPError:
        return False
    if status in (401, 403):
        raise Unauthorized(
            "The server that runs here does not take this key for administration. Set NIMBOS_API_KEY to the key it was "
            "started with, or to one with the scope `admin`."
        )
    return True


def _answer(response: httpx2.Response) -> Any:
    try:
        body = msgspec.json.decode(response.content)
    except msgspec.DecodeError as error:
        raise ServerRefused(f"The server answered {response.status_code}, and nothing that can be read.") from error
    if response.status_code != 200:
        raise ServerRefused(str(body["error"]["message"]) if "error" in body else f"HTTP {response.status_code}")
    return body


def _parameters(query: Query | None) -> list[tuple[str, str | int | float | bool | None]]:
    found: list[tuple[str, str | int | float | bool | None]] = []
    for name, value in (query or {}).items():
        if isinstance(value, list):
            found += [(f"{name}[]", one) for one in value]
        else:
            found.append((name, str(value)))
    return found
