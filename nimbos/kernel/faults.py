"""What can be wrong with a log. Each names the process and the event."""

from __future__ import annotations

from nimbos.errors import Conflict, NimbosError
from nimbos.kernel.events import Event


class Illegal(Conflict):
    """An event that must not follow what is in the log; nothing was written. A bug of ours, or a damaged log."""

    code = "illegal_event"

    def __init__(self, pid: str, kind: str, why: str) -> None:
        super().__init__(f"The event {kind} cannot be in the log of process {pid} there: {why}.")
        self.why = why


class FromNewerVersion(NimbosError):
    """A newer Nimbos wrote this event; nothing was changed."""

    code = "log_from_newer_version"
    status = 503

    def __init__(self, event: Event) -> None:
        super().__init__(
            f"Event {event.seq} of process {event.pid} ({event.kind[:40]!r}, version {event.version}) was written by a "
            "newer version of Nimbos, which this one cannot read. Nothing is lost: go on with the newer version."
        )


class Unreadable(NimbosError):
    """An event's bytes are not what any version wrote."""

    code = "log_unreadable"
    status = 500

    def __init__(self, event: Event, *, why: str) -> None:
        super().__init__(
            f"Event {event.seq} of process {event.pid} cannot be read: {why}. "
            "`nimbos logs --verify` says whether the log was changed."
        )
