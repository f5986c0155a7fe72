"""One running server: its socket and its signals. `cli/up.py` builds it; tests run it in a thread.

SIGINT and SIGTERM let answers finish for a while; a second one does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import msgspec
import uvicorn
from starlette.applications import Starlette

from nimbos.api.protocol import limited_protocol
from nimbos.config import ServerSettings
from nimbos.errors import ConfigError
from nimbos.presence import is_loopback

SHUTDOWN_GRACE_S = 10


class Server(uvicorn.Server):
    """uvicorn's, with signals of our own: uvicorn's raise the signal again, which would skip our clean-up."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """Asked once, it lets answers finish; asked twice, it does not."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Whoever only waits for news is told first; then answers may finish."""
        self.config.app.state.leave()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def make_server(app: Starlette, settings: ServerSettings) -> Server:
    """Raises: ConfigError for a certificate or key that cannot be used."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=limited_protocol(settings.max_header_bytes, stall_s=settings.stall_write_s),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
        ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None,
    )
    with _tls_errors(settings):
        config.load()
    return Server(config)


def check_bind(settings: ServerSettings) -> None:
    """Before anything slow. Raises: ConfigError when others could reach it in the clear without anybody having said so,
    and for a certificate or key that cannot be used."""
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise ConfigError("Give both --tls-cert and --tls-key, or neither.")
    for file in (settings.tls_cert, settings.tls_key):
        if file and not Path(file).is_file():
            raise ConfigError(f"The file {file} for TLS is not there.")
    if settings.tls_cert:
        with _tls_errors(settings):
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key)
    if not is_loopback(settings.host) and not settings.tls_cert and not settings.insecure:
        raise ConfigError(
            f"{settings.host} can be reached from other machines, and keys would travel in the clear. "
            "Give --tls-cert and --tls-key, or --insecure if something in front of Nimbos encrypts."
        )


@contextlib.contextmanager
def _tls_errors(settings: ServerSettings) -> Iterator[None]:
    try:
        yield
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{settings.tls_cert} and {settings.tls_key} cannot be used for TLS: {error}.") from error


def keyless(settings: ServerSettings) -> ServerSettings:
    """Of the listener that asks for no key: on loopback, in the clear."""
    return msgspec.structs.replace(
        settings, host="127.0.0.1", port=settings.ollama_port, allow_hosts=(), tls_cert="", tls_key=""
    )


def bind(settings: ServerSettings, *, option: str = "--port") -> socket.socket:
    """The listening socket; taken before anything slow, so that a port in use is said at once. `option` chooses it.

    Raises: ConfigError.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((settings.host, settings.port))
        bound.listen()  # from here on a second server on this port fails
    except (OSError, OverflowError) as error:
        bound.close()
        raise ConfigError(_why_not_bound(settings, error, option)) from error
    return bound


def address_of(settings: ServerSettings, bound: socket.socket) -> str:
    """The address to print: of this machine where the server listens on all."""
    host, port = bound.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"{'https' if settings.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


@contextlib.contextmanager
def stopped_by_signals(*servers: Server) -> Iterator[None]:
    """In the loop of the main thread. Takes the signals over from whoever had them there."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for server in servers:
            server.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _why_not_bound(settings: ServerSettings, error: Exception, option: str) -> str:
    where = f"{settings.host}:{settings.port}"
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"{where} is in use by another program. Stop it, or choose another port with {option}."
    if isinstance(error, OSError) and error.errno == errno.EACCES:
        return f"This user may not listen on {where}. Choose a port above 1023 with {option}."
    return f"Cannot listen on {where}: {error}."
