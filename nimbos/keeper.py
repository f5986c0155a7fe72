"""The process between a server and a worker: whatever a program's tools start ends with their worker.

    server ── life, a pipe that is never written to ──▶ keeper ── fork ──▶ worker ──▶ what its tools start

The system gives the keeper whatever loses its parent below it, also what has made itself a session of its own. When the
worker ends, or the server does, it stops all that is below, so that nothing more is started, kills it until nothing
is left, and ends as the worker did. Meanwhile it counts what is below: RLIMIT_NPROC counts all processes of a user,
and binds no administrator. A worker whose keeper is killed dies with it; what a tool that kills or stops its keeper has
started may live on: that is the sandbox's to end.

`python -m nimbos.keeper SOCKET LIFE PROCESSES`. It imports little, as there is one for each worker, and forks before
the worker's own code is loaded. Linux alone has all this: elsewhere it becomes the worker itself, and the process
group is what ends with it (`adk/confinement.py`).
Source: `man 2 prctl` (PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG), `man 5 proc` (/proc/pid/task/tid/children).
"""

from __future__ import annotations

import ctypes
import gc
import os
import runpy
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

TOO_MANY_CODE: Final = 90  # with which it ends when it has counted too many
_COUNT_S: Final = 1.0
_END_S: Final = 5.0  # what the system itself holds on to is left to it then
_STEP_S: Final = 0.002
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_CHILD_SUBREAPER: Final = 36


def main() -> None:
    connection, life, most = (int(word) for word in sys.argv[1:4])
    if sys.platform == "linux" and _prctl(_PR_SET_CHILD_SUBREAPER, 1):
        keeper = os.getpid()
        worker = os.fork()
        if worker:
            os.close(connection)
            _keep(worker, life, most)
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:  # it was killed before that was in force
            os._exit(1)
    gc.disable()  # what the worker imports stays; walking it again and again is a tenth of its start
    runpy.run_module("nimbos.adk.worker", run_name="__main__", alter_sys=True)


def _keep(worker: int, life: int, most: int) -> NoReturn:
    watched = select.poll()
    watched.register(life, select.POLLIN)
    with suppress(OSError):  # an old system: it is found at the next count
        watched.register(os.pidfd_open(worker), select.POLLIN)
    while True:
        over = any(which == life for which, _ in watched.poll(_COUNT_S * 1000))
        status = _reap(worker)
        if over or status is not None:
            late = _end_below(worker if status is None else None)
            _end_like(late if status is None else status)
        if len(_below()) > most:
            _end_below(worker)
            os._exit(TOO_MANY_CODE)


def _end_below(worker: int | None) -> int | None:
    """Until nothing is left. `worker`: it has not ended yet; how it did."""
    status: int | None = None
    before: set[int] = set()
    until = time.monotonic() + _END_S
    while not _has_no_child() and time.monotonic() < until:
        below = _below()
        for pid in below:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL if below == before else signal.SIGSTOP)
        before = below
        time.sleep(_STEP_S)
        ended = _reap(worker)
        status = ended if status is None else status
    return status


def _below() -> set[int]:
    """All processes below this one, those that wait to be reaped, too."""
    found: set[int] = set()
    left = [os.getpid()]
    while left:
        for words in _children(Path(f"/proc/{left.pop()}/task")):
            new = {int(word) for word in words.split()} - found
            found |= new
            left += new
    return found


def _children(tasks: Path) -> Iterator[str]:
    """Of each thread of a process, which may be gone."""
    with suppress(OSError):
        for task in tasks.iterdir():
            with suppress(OSError):
                yield (task / "children").read_text()


def _reap(worker: int | None) -> int | None:
    """Whoever has ended. How the worker did, if it is among them."""
    status = None
    with suppress(ChildProcessError):
        while True:
            pid, ended = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if pid == worker:
                status = ended
    return status


def _has_no_child() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


def _end_like(status: int | None) -> NoReturn:
    code = 1 if status is None else os.waitstatus_to_exitcode(status)
    if code < 0:
        _prctl(_PR_SET_DUMPABLE, 0)  # no second core
        with suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(abs(code))


def _prctl(option: int, value: int) -> bool:
    return bool(ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0)


if __name__ == "__main__":
    main()
