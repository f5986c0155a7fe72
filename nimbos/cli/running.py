"""The server of this home as another process sees it: whether it answers, and which models it has loaded."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from nimbos.config import Settings
from nimbos.errors import NotReady
from nimbos.keys import owner_key_file
from nimbos.presence import RunningServer, find_running

_PATIENCE_S = 5.0
_ANSWER_PATIENCE_S = 60.0  # a report over many asks is computed for longer than a server is looked for


class ServerState(msgspec.Struct, frozen=True, kw_only=True):
    """`loaded`: ids of models with an engine; None when the server does not say (another key, an older server)."""

    pid: int
    url: str
    reachable: bool
    ready: bool = False
    loaded: tuple[str, ...] | None = None


def look(settings: Settings) -> ServerState | None:
    """None when no server says that it runs in this home."""
    running = find_running(settings)
    if running is None:
        return None
    try:
        with httpx2.Client(
            base_url=running.url, timeout=_PATIENCE_S, verify=_trust(running), trust_env=False
        ) as client:
            ready = client.get("/health").status_code == 200
            page = client.get("/metrics", headers={"authorization": f"Bearer {_owner_secret(settings)}"})
    except (httpx2.HTTPError, OSError):
        return ServerState(pid=running.pid, url=running.url, reachable=False)
    loaded = _loaded(page.text) if page.status_code == 200 else None
    return ServerState(pid=running.pid, url=running.url, reachable=True, ready=ready, loaded=loaded)


@contextmanager
def admin_client(settings: Settings) -> Iterator[httpx2.Client]:
    """A client with the owner's key, of the server that runs in this home.

    Raises: NotReady when there is none.
    """
    running = find_running(settings)
    if running is None:
        raise NotReady("No server runs in this home. Start one with `nimbos up`.")
    headers = {"authorization": f"Bearer {_owner_secret(settings)}"}
    patience = httpx2.Timeout(_ANSWER_PATIENCE_S, connect=_PATIENCE_S)
    with httpx2.Client(
        base_url=running.url, headers=headers, timeout=patience, verify=_trust(running), trust_env=False
    ) as client:
        yield client


def _trust(running: RunningServer) -> ssl.SSLContext | bool:
    return ssl.create_default_context(cafile=running.certificate) if running.certificate else True


def _owner_secret(settings: Settings) -> str:
    """The owner's key, or "" when there is none to read; none is made here."""
    try:
        secret = os.environ.get("NIMBOS_API_KEY") or owner_key_file(settings).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return secret if secret.isascii() and secret.isprintable() else ""


def _loaded(page: str) -> tuple[str, ...] | None:
    try:
        samples = [s for family in text_string_to_metric_families(page) for s in family.samples]
    except ValueError:
        return None
    return tuple(sorted({s.labels["model"] for s in samples if s.name == "nimbos_engine_cells"}))
