"""One careful GET: follows redirects by hand, keeps the token at home, and says what went wrong in words.
Knows HTTP, not files; `download.py` writes what this reads.

A token goes to its own origin (scheme, host and port) and nowhere else. A redirect may not leave https for http.
What the *first* origin says of a file (`X-Linked-Etag`: its sha256, `X-Linked-Size`) is believed over what a
redirect's target says.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime

import httpx2

from nimbos.errors import DownloadFailed
from nimbos.hub.source import without_query

MAX_REDIRECTS = 8
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_CONTENT_RANGE = re.compile(r"^bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})$")
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class SourceMissing(DownloadFailed):
    """The server is there and the file is not."""


class SourceUnreachable(DownloadFailed):
    """Nothing came, however often we tried."""


class PassingFailure(Exception):
    """Worth another try. `wait_s`: what the server asked for."""

    def __init__(self, reason: str, *, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A secret for one origin; never printed. `variable` is where it comes from."""

    origin: str
    secret: str
    variable: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """What a server says of a file. `validator` changes when the bytes do; "" where the server gives none."""

    url: str
    size_bytes: int | None
    validator: str
    sha256: str | None

    @property
    def label(self) -> str:
        return without_query(self.url)


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """An answer whose bytes begin at `start` of the file."""

    file: RemoteFile
    start: int
    response: httpx2.Response


class Remote:
    """Use as `async with`. Timeouts are for one connection attempt and for silence between bytes."""

    def __init__(self, *, tokens: tuple[Token, ...] = (), connect_s: float = 10.0, silence_s: float = 60.0) -> None:
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # at INFO it writes whole addresses, signatures included
        self._tokens = {token.origin: token for token in tokens}
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(silence_s, connect=connect_s),
            headers={"user-agent": "nimbos", "accept-encoding": "identity"},
            follow_redirects=False,
        )

    async def __aenter__(self) -> Remote:
        return self

    async def __aexit__(self, *unused: object) -> None:
        await self._client.aclose()

    async def probe(self, url: str) -> RemoteFile:
        """Size, validator and hash, without the bytes.

        Raises: SourceMissing, DownloadFailed, PassingFailure.
        """
        async with self._get(url, {"range": "bytes=0-0"}, enough=True) as body:
            return body.file

    @asynccontextmanager
    async def open(self, file: RemoteFile, start: int) -> AsyncIterator[Body]:
        """The bytes from `start` on; `Body.start` is 0 when the server would not skip.

        Raises: as `probe`.
        """
        headers = {"range": f"bytes={start}-"} if start else {}
        if start and file.validator.startswith('"'):
            headers["if-range"] = file.validator
        async with self._get(file.url, headers) as body:
            yield body

    async def json(self, url: str, *, limit_bytes: int = 8 << 20) -> bytes:
        """A small document. Raises: as `probe`."""
        async with self._get(url, {}) as body:
            content = b""
            async for block in body.response.aiter_raw():
                content += block
                if len(content) > limit_bytes:
                    raise DownloadFailed(f"{without_query(url)} answers with more than {limit_bytes} bytes.")
            return content

    @asynccontextmanager
    async def _get(self, url: str, headers: dict[str, str], *, enough: bool = False) -> AsyncIterator[Body]:
        """Walks the redirects. With `enough` it stops at the first answer that gives size and hash."""
        try:
            async with self._walk(url, headers, enough) as body:
                yield body
        except httpx2.TransportError as error:
            raise PassingFailure(f"{_host(url)}: {error or type(error).__name__}") from error
        except httpx2.InvalidURL as error:
            raise DownloadFailed(f"{without_query(url)} leads to an address that cannot be: {error}.") from error

    @asynccontextmanager
    async def _walk(self, url: str, headers: dict[str, str], enough: bool) -> AsyncIterator[Body]:
        first = RemoteFile(url=url, size_bytes=None, validator="", sha256=None)
        here = url
        for _ in range(MAX_REDIRECTS + 1):
            request = self._client.build_request("GET", here, headers={**headers, **self._authorization(here)})
            response = await self._client.send(request, stream=True)
            try:
                if origin(here) == origin(url):
                    first = _linked(first, response.headers)
                if not response.is_redirect or (enough and first.sha256 and first.size_bytes is not None):
                    yield self._body(first, response)
                    return
                here = _next(here, response)
            finally:
                await response.aclose()
        raise DownloadFailed(f"{without_query(url)} redirects more than {MAX_REDIRECTS} times.")

    def _authorization(self, url: str) -> dict[str, str]:
        token = self._tokens.get(origin(url))
        return {"authorization": f"Bearer {token.secret}"} if token else {}

    def _body(self, first: RemoteFile, response: httpx2.Response) -> Body:
        if response.is_redirect:
            return Body(file=first, start=0, response=response)
        self._require_success(first, response)
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise DownloadFailed(f"{first.label} is sent with the encoding {encoding[:40]!r}, which was not asked for.")
        start, total = _extent(first, response)
        if first.size_bytes is None:
            first = replace(first, size_bytes=total)
        elif total is not None and total != first.size_bytes:
            raise PassingFailure(f"{first.label} should have {first.size_bytes} bytes and is offered with {total}")
        if not first.validator:
            first = replace(first, validator=_validator(response.headers))
        return Body(file=first, start=start, response=response)

    def _require_success(self, first: RemoteFile, response: httpx2.Response) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        place = f"{first.label} (answered {status})"
        if status in _PASSING_STATUS:
            raise PassingFailure(place, wait_s=_retry_after(response.headers))
        if status == 416:
            raise PassingFailure(f"{place}: the server has fewer bytes than we do")
        if status in (401, 403):
            raise DownloadFailed(self._forbidden(first, response, place))
        if status in (404, 410):
            raise SourceMissing(f"There is no file at {place}.")
        raise DownloadFailed(f"{place}: this is no file that can be downloaded.")

    def _forbidden(self, first: RemoteFile, response: httpx2.Response, place: str) -> str:
        token = self._tokens.get(origin(first.url))
        if token:
            return (
                f"Access is refused: {place}. The token in {token.variable} may not read it; was its licence accepted?"
            )
        if response.headers.get("x-error-code") == "RepoNotFound":
            return f"There is no such repository, or it is private: {place}. Check the name, or set HF_TOKEN."
        return f"Access is refused: {place}. If it is on Hugging Face, accept its licence there and set HF_TOKEN."


def origin(url: str) -> str:
    parts = httpx2.URL(url)
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
    return f"{parts.scheme}://{parts.host}:{port}"


def _host(url: str) -> str:
    return httpx2.URL(url).host


def _next(here: str, response: httpx2.Response) -> str:
    location = response.headers.get("location", "")
    try:
        target = httpx2.URL(here).join(location)
    except ValueError as error:
        raise DownloadFailed(f"{without_query(here)} redirects to an address that cannot be: {error}.") from error
    if target.scheme not in ("http", "https") or not target.host or target.userinfo:
        raise DownloadFailed(f"{without_query(here)} redirects to something that is no plain web address.")
    if here.startswith("https:") and target.scheme == "http":
        raise DownloadFailed(f"{without_query(here)} redirects from https to http ({target.host}), which is refused.")
    return str(target)


def _linked(first: RemoteFile, headers: Mapping[str, str]) -> RemoteFile:
    """A hub's own words about a file that it keeps elsewhere."""
    etag = headers.get("x-linked-etag", "").strip('"').lower()
    size = headers.get("x-linked-size", "")
    if _SHA256.match(etag):
        first = replace(first, sha256=etag, validator=f"sha256:{etag}")
    if size.isascii() and size.isdigit() and len(size) < 18:
        first = replace(first, size_bytes=int(size))
    return first


def _extent(first: RemoteFile, response: httpx2.Response) -> tuple[int, int | None]:
    """Where the body begins, and the size of the whole file."""
    if response.status_code == 206:
        match = _CONTENT_RANGE.match(response.headers.get("content-range", ""))
        if match is None:
            raise DownloadFailed(f"{first.label} answers 206 without saying which bytes.")
        return int(match[1]), int(match[3])
    length = response.headers.get("content-length", "")
    return 0, int(length) if length.isascii() and length.isdigit() and len(length) < 18 else None


def _validator(headers: Mapping[str, str]) -> str:
    """A strong ETag (quoted, as it stands), or the date of the last change; a weak ETag promises no bytes."""
    etag = headers.get("etag", "")
    if etag.startswith('"'):
        return etag
    modified = headers.get("last-modified", "")
    return f"modified:{modified}" if modified else ""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
