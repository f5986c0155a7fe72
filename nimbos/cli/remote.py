"""The processes of the running server, as commands see them: short ids made whole, a stream that survives its server.

A connection that breaks is made again, also to another server of this home: the stream goes on behind the last event
that was seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
import msgspec

from nimbos.cli.conversation import ServerRefused
from nimbos.cli.running import admin_client
from nimbos.config import Settings
from nimbos.errors import Conflict, NotFound, NotReady
from nimbos.types import new_id

PREFIX = "proc_"
_ID_CHARACTERS = len(PREFIX) + 32
_PAGE = 1_000
_EVENTS_PAGE = 500
_STREAM_PATIENCE_S = 90.0  # a silent stream has comments
_CONNECT_S = 5.0
_UPLOAD_PATIENCE_S = 120.0
_FORK_PATIENCE_S = 600.0  # files may have to be copied
_RETURN_S = 120.0  # how long a server that went away is waited for
_RETURN_LOOK_S = 0.25
_PASSING = ("not_ready", "storage_unavailable")

T = TypeVar("T")


class _Away(Exception):  # never leaves this file
    """The server is stopping, starting, or without its database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A message of the stream. `seq`: of an event of the log; None for what has no number."""

    kind: str
    body: dict[str, Any]
    seq: int | None = None


@dataclass(slots=True, eq=False)
class Remote:
    """Ends with its `with` block. Raises everywhere: NotReady without a server, ServerRefused with its words."""

    settings: Settings
    _opened: ExitStack = field(default_factory=ExitStack)
    _client: httpx2.Client | None = None

    def __enter__(self) -> Remote:
        self._connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()

    def get(self, path: str, **query: str | int) -> Any:
        return self._answered("GET", path, params=query)

    def post(self, path: str, body: Any = None, *, timeout_s: float | None = None) -> Any:
        return self._answered("POST", path, json=body, **({"timeout": timeout_s} if timeout_s else {}))

    def delete(self, path: str) -> Any:
        return self._answered("DELETE", path)

    def upload(self, content: bytes) -> Any:
        """A program's files, packed."""
        headers = {"content-type": "application/x-nimbos-program"}
        return self._answered("POST", "/v1/programs", content=content, headers=headers, timeout=_UPLOAD_PATIENCE_S)

    def process(self, pid: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(place(pid))
        return found

    def signal(self, pid: str, signal: str, **fields: Any) -> dict[str, Any]:
        told: dict[str, Any] = self.post(place(pid, "signals"), {"signal": signal, **fields})
        return told

    def signal_once(self, pid: str, signal: str, **fields: Any) -> dict[str, Any]:
        """The same, also to the next server if this one went away: under one id it is one signal."""
        fields["id"] = fields.get("id") or new_id("sig")
        return self._insist(lambda: self.signal(pid, signal, **fields))

    def fork(self, pid: str, *, at: int | None, n: int) -> list[str]:
        """The forks' ids, also from the next server if this one went away: under one key they are made once."""
        body = {"at": at, "n": n, "key": new_id("fork")}
        made = self._insist(lambda: self.post(place(pid, "fork"), body, timeout_s=_FORK_PATIENCE_S))
        return [one["id"] for one in made["data"]]

    def processes(self, **query: str | int) -> Iterator[dict[str, Any]]:
        """Newest first."""
        return self._pages("/v1/processes", **query)

    def tree(self, pid: str) -> Iterator[dict[str, Any]]:
        """It and all below it, parents before children."""
        return self._pages(place(pid, "tree"))

    def find(self, given: str) -> str:
        """The id that this is, or begins. Raises: NotFound, Conflict."""
        whole = given if given.startswith(PREFIX) else f"{PREFIX}{given}"
        if len(whole) == _ID_CHARACTERS:
            return whole
        found = self.get("/v1/processes", prefix=whole, limit=3)["data"]
        if not found:
            raise NotFound(f"There is no process {given!r}. `nimbos ps -a` shows those there are.")
        if len(found) > 1:
            ids = ", ".join(one["id"] for one in found[:2])
            raise Conflict(f"Several processes begin with {given!r}, such as {ids}. Give more of it.")
        return str(found[0]["id"])

    def events(self, pid: str, *, after: int = 0) -> Iterator[Told]:
        """What its log holds now."""
        while True:
            page = self.get(place(pid, "events"), stream="false", after=after, limit=_EVENTS_PAGE)
            for event in page["data"]:
                after = event["seq"]
                yield Told(kind=event["kind"], body=event, seq=after)
            if not page["has_more"]:
                return

    def follow(self, pid: str, *, after: int = 0, watch: bool) -> Iterator[Told]:
        """Its log and what it says, until it is done: the last one told has the kind `end`. `watch`: a person is at the
        other end."""
        since: float | None = None
        while True:
            try:
                for told in self._streamed(pid, after, watch):
                    since = None
                    after = told.seq if told.seq is not None else after
                    yield told
                    if told.kind == "end":
                        return
            except (httpx2.HTTPError, _Away):
                pass
            since = since if since is not None else time.monotonic()
            self._connect_again(since)

    def replay(self, pid: str, model: str | None) -> Iterator[Told]:
        """Its answers in order, and the end. Raises: NotReady, ServerRefused."""
        client = self._open()
        try:
            with client.stream("POST", place(pid, "replay"), json={"model": model}, timeout=_patience()) as response:
                if response.status_code != 200:
                    response.read()
                    _answer(response)
                yield from _messages(response.iter_lines())
        except (httpx2.HTTPError, _Away) as error:
            raise NotReady(f"The server at {client.base_url} went away. Try again when it is back.") from error

    def _streamed(self, pid: str, after: int, watch: bool) -> Iterator[Told]:
        headers = {"last-event-id": str(after)} if after else {}
        query = {"watch": "true"} if watch else {}
        with self._open().stream(
            "GET", place(pid, "events"), params=query, headers=headers, timeout=_patience()
        ) as response:
            if response.status_code != 200:
                response.read()
                _answer(response, passing=True)
            yield from _messages(response.iter_lines())

    def _pages(self, path: str, **query: str | int) -> Iterator[dict[str, Any]]:
        after: dict[str, str] = {}
        while True:
            page = self.get(path, limit=_PAGE, **query, **after)
            yield from page["data"]
            if not page["has_more"]:
                return
            after = {"after": page["last_id"]}

    def _insist(self, send: Callable[[], T]) -> T:
        """Once more, when the answer was lost: only for what is one thing however often it is sent."""
        try:
            return send()
        except NotReady:
            self._connect_again(time.monotonic())
            return send()

    def _connect_again(self, since: float) -> None:
        """Raises: NotReady once it has been away for too long."""
        self._opened.close()
        while True:
            time.sleep(_RETURN_LOOK_S)
            if time.monotonic() - since > _RETURN_S:
                raise NotReady(f"The server went away and did not come back within {_RETURN_S:.0f} s.")
            with suppress(NotReady):  # a server that is starting
                self._connect()
                return

    def _answered(self, method: str, path: str, **how: Any) -> Any:
        client = self._open()
        try:
            return _answer(client.request(method, path, **how))
        except httpx2.HTTPError as error:
            raise NotReady(f"The server at {client.base_url} does not answer: {error}.") from error

    def _open(self) -> httpx2.Client:
        assert self._client is not None
        return self._client

    def _connect(self) -> None:
        self._client = self._opened.enter_context(admin_client(self.settings))


def place(pid: str, part: str = "") -> str:
    """The route of a process, or of something of it."""
    return f"/v1/processes/{quote(pid, safe='')}{f'/{part}' if part else ''}"


def _patience() -> httpx2.Timeout:
    return httpx2.Timeout(_STREAM_PATIENCE_S, connect=_CONNECT_S)


def _messages(lines: Iterator[str]) -> Iterator[Told]:
    """Server-sent events. Raises: ServerRefused for one that is an error."""
    kind, seq, text = "", None, ""
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "id":
            seq = int(value)
        elif name == "data":
            text = value
        elif not line and text:
            body = msgspec.json.decode(text)
            if kind == "error":
                if body["error"]["code"] in _PASSING:
                    raise _Away
                raise ServerRefused(body["error"]["message"])
            yield Told(kind=kind, body=body, seq=seq)
            kind, seq, text = "", None, ""


def _answer(response: httpx2.Response, *, passing: bool = False) -> Any:
    """`passing`: what will be over soon is `_Away`."""
    try:
        body = msgspec.json.decode(response.content)
    except msgspec.DecodeError as error:
        raise ServerRefused(f"The server answered {response.status_code}, and nothing that can be read.") from error
    if response.status_code >= 400:
        words = body.get("error") if isinstance(body, dict) else None
        if passing and words and words["code"] in _PASSING:
            raise _Away
        raise ServerRefused(words["message"] if words else f"The server answered {response.status_code}.")
    return body
