"""A form with one file, read as it comes: the file goes on in pieces, never held whole; the fields are small.

Everything here is hostile: how many parts, how long their headers, which names. The parser is `python-multipart`'s.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from nimbos.errors import InvalidRequest

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_PARTS_MAX = 32
_FIELD_BYTES_MAX = 16 * 1024
_HEADER_BYTES_MAX = 8 * 1024
_NAME_CHARACTERS = 255


@dataclass(slots=True, eq=False)
class _Part:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: str = ""
    filename: str | None = None


class Form:
    """`file` reads on to the next file part and gives its pieces; the fields around it are in `fields`.

    form = Form(request, stall_s=…)
    async for piece in form.file(): …
    await form.rest()
    """

    def __init__(self, request: Request, *, stall_s: float, file_part: str = "file") -> None:
        """`file_part`: the name of the part that is the file. Raises: InvalidRequest for a body that is no form."""
        self.fields: dict[str, str] = {}
        self.filename = ""
        self.file_field = ""
        self._file_part = file_part
        self._chunks = request.stream()
        self._stall_s = stall_s
        self._events: deque[tuple[str, bytes]] = deque()
        self._parts = 0
        self._part = _Part()  # that is being parsed; several may be before the first of them is read here
        self._begun: deque[_Part] = deque()
        self._header_name = b""
        self._header_value = b""
        self._parser = MultipartParser(_boundary(request), self._callbacks(), max_header_size=_HEADER_BYTES_MAX)

    async def file(self) -> AsyncGenerator[bytes, None]:
        """Raises: InvalidRequest where there is no file, or the form breaks off."""
        while not self.file_field:
            if not await self._step():
                raise InvalidRequest(
                    f"The form has no part `{self._file_part}` with a file name.", param=self._file_part
                )
        async for piece in self._content():
            yield piece

    async def rest(self) -> None:
        """Fields that come behind the file. A second file is refused."""
        self.file_field = ""
        while await self._step():
            if self.file_field:
                raise InvalidRequest("The form has more than one file.", param=self.file_field)

    async def drain(self, most_bytes: int) -> None:
        """Reads and drops what still comes, so that a client that is refused gets to read why."""
        have = 0
        while have < most_bytes:
            try:
                chunk = await asyncio.wait_for(anext(self._chunks, None), self._stall_s)
            except TimeoutError:
                return
            if chunk is None:
                return
            have += len(chunk)

    async def _content(self) -> AsyncGenerator[bytes, None]:
        while True:
            kind, content = await self._next()
            if kind == "end":
                return
            if kind != "data":
                raise InvalidRequest("The form breaks off within its file.", param=self._file_part)
            yield content

    async def _step(self) -> bool:
        """Reads one field, or up to the content of a file; False at the end of the form."""
        kind, _ = await self._next()
        if kind == "over":
            return False
        if kind != "begin":
            raise InvalidRequest("The form is not as it should be.")
        part = self._begun.popleft()
        if part.filename is not None:
            self.filename, self.file_field = part.filename[-_NAME_CHARACTERS:], part.name or self._file_part
            if part.name != self._file_part:
                raise InvalidRequest(
                    f"The file must be in the part `{self._file_part}`, not {part.name[:60]!r}.", param=self._file_part
                )
            return True
        value = bytearray()
        while (event := await self._next())[0] == "data":
            value += event[1]
            if len(value) > _FIELD_BYTES_MAX:
                raise InvalidRequest(
                    f"`{part.name[:60]}` is longer than {_FIELD_BYTES_MAX} bytes.", param=part.name[:60]
                )
        try:
            self.fields[part.name] = value.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"`{part.name[:60]}` is not UTF-8.", param=part.name[:60]) from error
        return True

    async def _next(self) -> tuple[str, bytes]:
        while not self._events:
            try:
                chunk = await asyncio.wait_for(anext(self._chunks, None), self._stall_s)
            except TimeoutError as error:
                raise InvalidRequest(f"The form stopped coming for {self._stall_s:.0f} s.") from error
            if chunk is None:
                return "over", b""
            try:
                self._parser.write(chunk)
            except FormParserError as error:
                raise InvalidRequest("The body is not a form as its boundary says.") from error
        return self._events.popleft()

    def _callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_part_data": self._data,
            "on_part_end": lambda: self._events.append(("end", b"")),
            "on_header_field": self._on_name,
            "on_header_value": self._on_value,
            "on_header_end": self._on_header,
            "on_headers_finished": self._on_headers,
            "on_end": lambda: self._events.append(("over", b"")),
        }

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > _PARTS_MAX:
            raise InvalidRequest(f"The form has more than {_PARTS_MAX} parts.")
        self._part = _Part()

    def _data(self, content: bytes, start: int, end: int) -> None:
        self._events.append(("data", content[start:end]))

    def _on_name(self, content: bytes, start: int, end: int) -> None:
        self._header_name += content[start:end]

    def _on_value(self, content: bytes, start: int, end: int) -> None:
        self._header_value += content[start:end]

    def _on_header(self) -> None:
        self._part.headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers(self) -> None:
        part = self._part
        _, options = parse_options_header(part.headers.get(b"content-disposition", b""))
        part.name = options.get(b"name", b"").decode(errors="replace")
        if b"filename" in options:
            part.filename = options[b"filename"].decode(errors="replace").replace("\0", "")
        self._begun.append(part)
        self._events.append(("begin", b""))


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary or len(boundary) > 200:
        raise InvalidRequest("Send the file as multipart/form-data.")
    return boundary
