"""Where the server of a home is: `run/server.json`, which it writes and which commands read. Knows no HTTP, so that a
command that only speaks to a server starts at once.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from nimbos.config import Settings


class RunningServer(msgspec.Struct, frozen=True, kw_only=True):
    """`NIMBOS_HOME/run/server.json`. `certificate`: the file its clients may trust, "" without TLS."""

    pid: int
    url: str
    certificate: str = ""


@contextmanager
def traced(settings: Settings, url: str) -> Iterator[None]:
    """While it runs, `run/server.json` says where it is; afterwards where the one is that it stood for, if that still
    runs: a home may have several servers, and commands speak to the latest."""
    settings.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    certificate = str(Path(settings.server.tls_cert).absolute()) if settings.server.tls_cert else ""
    ours, earlier = RunningServer(pid=os.getpid(), url=url, certificate=certificate), find_running(settings)
    _write_trace(settings, ours)
    try:
        yield
    finally:
        if find_running(settings) == ours:
            if earlier is not None and earlier.pid != ours.pid and _lives(earlier.pid):
                _write_trace(settings, earlier)
            else:
                (settings.run_dir / "server.json").unlink(missing_ok=True)


def _write_trace(settings: Settings, running: RunningServer) -> None:
    """Whole or not at all."""
    file = settings.run_dir / "server.json"
    draft = file.with_name(f".server.{os.getpid()}.json")
    draft.write_bytes(msgspec.json.encode(running))
    draft.replace(file)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def find_running(settings: Settings) -> RunningServer | None:
    """The server that says it runs in this home; it may have died without taking the file along."""
    try:
        return msgspec.json.decode((settings.run_dir / "server.json").read_bytes(), type=RunningServer)
    except (OSError, msgspec.MsgspecError):
        return None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
