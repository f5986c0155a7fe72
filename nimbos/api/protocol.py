"""The wire below ASGI: limits that must hold before there is a request.

uvicorn's parser takes headers of any length at any pace, so they are counted and timed here; and it keeps what a client
does not read for as long as that one likes (`unread.py`). Each request's scope gets `nimbos.abort`, which
drops the connection.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from nimbos.api.access import HeadersTooLarge
from nimbos.api.errors import body_of
from nimbos.api.unread import Unread

HEADER_TIMEOUT_S = 30.0


def limited_protocol(header_limit_bytes: int, *, stall_s: float) -> type[HttpToolsProtocol]:
    class Limited(HttpToolsProtocol):
        def __init__(
            self,
            config: Config,
            server_state: ServerState,
            app_state: dict[str, Any],
            _loop: asyncio.AbstractEventLoop | None = None,
        ) -> None:
            super().__init__(config, server_state, app_state, _loop)
            self._header_bytes = 0
            self._in_headers = True
            self._in_body = False
            self._bodiless_bytes = 0
            self._deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, transport.abort)
            self._unread = Unread(transport, loop=self.loop, stall_s=stall_s, settled=self._adds_nothing)

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_deadline()
            self._unread.end()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """While headers come, what came before this piece may not reach the limit. Nor may, after them, what is no
            body: chunk extensions and trailers, which the parser keeps.
            """
            if self._in_headers:
                self._header_bytes += len(data)
            elif self._in_body:
                self._bodiless_bytes += len(data)
            super().data_received(data)
            if self._in_body and self._bodiless_bytes > header_limit_bytes:
                self.transport.abort()
            if self._in_headers and self._header_bytes > header_limit_bytes and not self.transport.is_closing():
                self._refuse()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope["nimbos.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]
            self._in_headers = True
            if self._deadline is None:
                self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.abort)

        def on_headers_complete(self) -> None:
            self._in_headers = False
            self._in_body = True
            self._header_bytes = self._bodiless_bytes = 0
            self._end_deadline()
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._bodiless_bytes = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._in_body = False
            super().on_message_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread.watch()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._unread.took()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.is_closing():
                self._unread.watch()

        def timeout_keep_alive_handler(self) -> None:
            """Closes the connection, which waits for the client to take the rest."""
            super().timeout_keep_alive_handler()
            self._unread.watch()

        def shutdown(self) -> None:
            super().shutdown()
            self._unread.watch()

        def _adds_nothing(self) -> bool:
            done = self.cycle is None or self.cycle.response_complete
            return done or self.flow.write_paused or self.transport.is_closing()

        def _end_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _refuse(self) -> None:
            body = body_of(HeadersTooLarge(f"The headers may have at most {header_limit_bytes} bytes."))
            head = (
                "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

        def send_400_response(self, msg: str) -> None:
            """What is no HTTP, in our shape of errors."""
            body = msgspec.json.encode(
                {"error": {"message": msg, "type": "invalid_request_error", "param": None, "code": "invalid_http"}}
            )
            head = (
                "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

    return Limited
