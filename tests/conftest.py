"""Fixtures that several folders of tests share."""

from __future__ import annotations

import compileall
import gc
import os
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpcore2
import pytest
from httpx2._config import DEFAULT_TIMEOUT_CONFIG
from hypothesis import HealthCheck, settings

from tests.databases import database as database
from tests.databases import database_settings as database_settings
from tests.databases import postgres as postgres
from tests.live import PATIENCE_S, Live, serving

WEATHER_CALL = {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}
DEMO: dict[str, Any] = {
    "replies": [
        {"match": "weather", "times": 1, "text": "", "tool_calls": [WEATHER_CALL]},
        {"match": "^21 degrees", "text": "It is 21 degrees."},
        {"match": "two calls", "text": "Both.", "tool_calls": [WEATHER_CALL, {"name": "get_time", "arguments": {}}]},
        {"match": "(?i)think", "thinking": "Let me see, yes.", "text": "Done thinking."},
        {"match": "endless", "text": "on and " * 5000, "tokens_per_second": 200},
        {"match": "flood", "text": "on and on " * 100_000},
        {"match": "count", "text": "one, two, three, four"},
        {"match": "json", "text": '{"answer": 42}'},
        {"match": "umlaut", "text": "Grüße, 世界! 🌍 naïve"},
    ],
    "default": {"text": "Hello there, friend!"},
}


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One server for all tests that leave it as they found it; its scripted model is `demo`."""
    home: Path = tmp_path_factory.mktemp("home")
    with serving(home, {"demo": DEMO}) as running:
        yield running


def pytest_configure() -> None:
    """A run in the background of a shell ignores Ctrl-C, and so would every program that tests interrupt. Hundreds of
    programs start here, which should not compile Nimbos anew each time. And no client gives up after five seconds, nor
    Hypothesis after a fifth of one, as the machine may be busy for so long."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    settings.register_profile("patient", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")
    for phase in ("connect", "read", "write", "pool"):
        setattr(DEFAULT_TIMEOUT_CONFIG, phase, PATIENCE_S)
    _trust_once()
    compileall.compile_dir(Path(__file__).parent.parent / "nimbos", quiet=2)


def _trust_once() -> None:
    """Clients in tests share what the system trusts: each would read its hundreds of certificates anew, which takes
    longer than most requests."""
    make, made = httpcore2.default_ssl_context, dict[tuple[bool, str | None, str | None], ssl.SSLContext]()

    def shared(*, _trust_env: bool = True) -> ssl.SSLContext:
        key = (_trust_env, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
        if key not in made:
            made[key] = make(_trust_env=_trust_env)
        return made[key]

    httpcore2.default_ssl_context = shared


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """What is imported for all tests stays to the end: the garbage collector need not walk it again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# Those that take longest begin first: whichever began last would be waited for alone.
LONG = (
    "kernel/test_durable.py",
    "api/test_up.py",
    "kernel/test_forks.py",
    "cli/test_bench.py",
    "cli/test_ps.py",
    "kernel/test_budgets.py",
    "batches/test_jobs.py",
    "ledger/test_killed.py",
    "engine/test_engine.py",
    "cli/test_admin.py",
    "kernel/test_kill_matrix.py",
    "api/test_openapi.py",
    "ledger/test_tree_of_budgets.py",
    "cli/test_doctor.py",
    "kernel/test_worker.py",
    "kernel/test_context.py",
    "cli/test_up_stopped.py",
    "api/test_admin_changes.py",
    "kernel/test_children_of_functions.py",
    "cli/test_run.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_xdist_auto_num_workers() -> int:
    return min(8, 1 + (os.cpu_count() or 1))
