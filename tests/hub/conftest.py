from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from nimbos.config import Settings
from nimbos.hub import Hub
from nimbos.hub.download import Patience
from tests.hub.fake_hub import FakeHub, running


class Waits:
    """In place of sleeping: how long was asked for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


class Watcher:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.starts: list[tuple[str, int | None, int]] = []
        self.notes: list[str] = []
        self.bytes = 0
        self.ended = 0
        self.on_note: Callable[[str], None] | None = None

    def start(self, name: str, *, total_bytes: int | None, done_bytes: int) -> None:
        self.starts.append((name, total_bytes, done_bytes))
        self.bytes = done_bytes

    def advance(self, count_bytes: int) -> None:
        self.bytes += count_bytes

    def note(self, text: str) -> None:
        self.notes.append(text)
        if self.on_note:
            self.on_note(text)

    def done(self) -> None:
        self.ended += 1


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=str(tmp_path / "home"))


@pytest.fixture
def site() -> Iterator[FakeHub]:
    with running() as hub:
        yield hub


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture
def hub(settings: Settings, site: FakeHub, waits: Callable[[float], Awaitable[None]]) -> Hub:
    return make_hub(settings, site, waits)


def make_hub(
    settings: Settings,
    site: FakeHub,
    waits: Callable[[float], Awaitable[None]],
    *,
    token: str = "",
    silence_s: float = 30,
) -> Hub:
    environment = {"HF_ENDPOINT": site.url, "MODELSCOPE_ENDPOINT": site.url, "HF_TOKEN": token}
    return Hub(settings, environment=environment, patience=Patience(sleep=waits), silence_s=silence_s)
