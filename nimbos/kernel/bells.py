"""What is told within this server: to whoever runs a process that mail has come, to the crew that there is work, to
whoever follows a process what is new. Nothing here is needed for anything to be right, only for it to be prompt: what
another server did is found by looking, a little later.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nimbos.types import Channel

_DELTAS_KEPT = 4_096  # of a follower that does not keep up; then the oldest are lost to it


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of an answer that is being generated: for the eyes, not in the log. `at`: how many characters the answer
    had on this channel before it, so that whoever comes late knows that something is missing."""

    pid: str
    ask_id: str
    text: str
    channel: Channel = Channel.TEXT
    at: int = 0


@dataclass(slots=True, eq=False)
class Follower:
    """`news` is set for every append and delta of its process, `appended` for the former."""

    news: asyncio.Event
    deltas: deque[Delta]
    appended: bool = False


class Bells:
    """Used from the server's event loop alone."""

    def __init__(self) -> None:
        self._running: dict[str, Callable[[], None]] = {}
        self._followers: defaultdict[str, set[Follower]] = defaultdict(set)
        self._watching: defaultdict[str, int] = defaultdict(int)
        self._on_work: list[Callable[[], None]] = []
        self._on_timer: list[Callable[[str, int], None]] = []
        self.leaving = False  # the server stops: nobody is to wait for news here any more
        self.look = asyncio.Event()  # something was written for processes that nobody here can name

    def leave(self) -> None:
        """Ends what follows processes: a stream would hold the server for as long as its process lasts."""
        self.leaving = True
        for followers in self._followers.values():
            for follower in followers:
                follower.appended = True
                follower.news.set()

    @property
    def running(self) -> tuple[str, ...]:
        return tuple(self._running)

    def answer(
        self, *, work: Callable[[], None] | None = None, timer: Callable[[str, int], None] | None = None
    ) -> None:
        """Who is told that there is work to claim, or that a timer was set."""
        if work is not None:
            self._on_work.append(work)
        if timer is not None:
            self._on_timer.append(timer)

    def run(self, pid: str, ring: Callable[[], None]) -> None:
        """`ring` is called for mail, until `ran`."""
        self._running[pid] = ring
        self.look.set()

    def ran(self, pid: str) -> None:
        self._running.pop(pid, None)

    def posted(self, pid: str, *, woken: bool) -> None:
        """A signal is committed."""
        if woken:
            self.work()
        elif (ring := self._running.get(pid)) is not None:
            ring()
        self.appended(pid)

    def work(self) -> None:
        for told in self._on_work:
            told()

    def timer(self, pid: str, due_ms: int) -> None:
        for told in self._on_timer:
            told(pid, due_ms)

    def appended(self, pid: str) -> None:
        for follower in self._followers.get(pid, ()):
            follower.appended = True
            follower.news.set()

    def tell(self, delta: Delta) -> None:
        for follower in self._followers.get(delta.pid, ()):
            follower.deltas.append(delta)
            follower.news.set()

    def followed(self, pid: str) -> bool:
        """Whether anyone reads deltas."""
        return pid in self._followers

    @contextmanager
    def follow(self, pid: str) -> Iterator[Follower]:
        follower = Follower(news=asyncio.Event(), deltas=deque(maxlen=_DELTAS_KEPT))
        self._followers[pid].add(follower)
        try:
            yield follower
        finally:
            self._followers[pid].discard(follower)
            if not self._followers[pid]:
                del self._followers[pid]

    def watched(self, pid: str) -> bool:
        return pid in self._watching

    @contextmanager
    def watching(self, pid: str) -> Iterator[None]:
        """A person looks at the process for as long as this lasts."""
        self._watching[pid] += 1
        try:
            yield
        finally:
            self._watching[pid] -= 1
            if not self._watching[pid]:
                del self._watching[pid]
