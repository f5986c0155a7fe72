"""Administration from the command line: by the server of this home where one runs, else on the database itself.

Both speak to the same routes (`nimbos/api/admin`): one over a socket with the owner's key, the other inside this
process, as the owner of the home folder. So both do and answer the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import httpx2
import msgspec

from nimbos.cli.conversation import ServerRefused
from nimbos.cli.interruptible import run_interruptible
from nimbos.cli.running import admin_client
from nimbos.config import Settings
from nimbos.errors import NotReady, Unauthorized
from nimbos.presence import find_running

Query = Mapping[str, str | int | list[str]]

_PAGE = 100


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
    """Inside this process, on an event loop of its own."""

    def __init__(self, runner: asyncio.Runner, client: httpx2.AsyncClient) -> None:
        self._runner = runner
        self._client = client

    def get(self, path: str, query: Query | None = None) -> Any:
        return _answer(self._run(self._client.get(path, params=_parameters(query))))

    def post(self, path: str, body: Any) -> Any:
        return _answer(self._run(self._client.post(path, json=body)))

    def delete(self, path: str) -> Any:
        return _answer(self._run(self._client.delete(path)))

    def lines(self, path: str, query: Query) -> Iterator[bytes]:
        response = self._run(self._client.get(path, params=_parameters(query)))
        if response.status_code != 200:
            _answer(response)
        yield response.content

    def _run(self, work: Coroutine[Any, Any, httpx2.Response]) -> httpx2.Response:
        return run_interruptible(work, self._runner)


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
            transport = httpx2.ASGITransport(app=admin.app(accounts, owner))
            client = httpx2.AsyncClient(transport=transport, base_url="http://localhost")
            try:
                yield OnDatabase(runner, client)
            finally:
                runner.run(client.aclose())
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
