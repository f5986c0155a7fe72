"""What a download tells whoever watches it. The terminal's bar is `nimbos.cli.progress`."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """`start` may come again: for the next file, or when a download has to begin anew."""

    def start(self, name: str, *, total_bytes: int | None, done_bytes: int) -> None: ...

    def advance(self, count_bytes: int) -> None: ...

    def note(self, text: str) -> None:
        """Something a person who waits would want to know: a retry, another process at work."""
        ...

    def done(self) -> None: ...


class Silent:
    """Nobody watches."""

    def start(self, name: str, *, total_bytes: int | None, done_bytes: int) -> None:
        pass

    def advance(self, count_bytes: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def done(self) -> None:
        pass
