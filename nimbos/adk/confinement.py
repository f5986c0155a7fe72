"""What a worker gives up before it reads a program's code: it ends with its server, and has limits.

On Linux the kernel itself kills the worker and whatever it started in its group, the moment the server's end of the
`life` pipe is closed, however the server ended and whatever the worker's Python is busy with, and the keeper what has
left the group; elsewhere a thread does, as soon as it runs. The sandbox goes around this process later; these are not
walls against code that means harm.
Source: `man 2 fcntl` (F_SETOWN, F_SETSIG, O_ASYNC), `man 2 setrlimit`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading

from nimbos.toolwire import WorkerLimits

_F_SETSIG = 10  # Linux; Python's fcntl does not name it
_NICENESS = 5  # below the engines, whose steps everybody waits for


def end_with_server(life: int) -> None:
    """`life`: the reading end of a pipe that the server holds open and never writes to."""
    threading.Thread(target=_watch, args=(life,), name="life", daemon=True).start()
    if sys.platform != "linux":
        return
    import fcntl

    with contextlib.suppress(OSError):  # the thread is there, too
        fcntl.fcntl(life, _F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    if _is_over(life):  # it ended before that was in force
        end()


def end() -> None:
    """This process and whatever it started that is still in its group."""
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def limit(limits: WorkerLimits) -> tuple[str, ...]:
    """Gives: the names of those that are in force. None can be raised again by the program."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(_NICENESS)
    try:
        import resource
    except ImportError:  # Windows
        return ()
    wanted = {
        "CORE": 0,
        "DATA" if sys.platform == "linux" else "AS": limits.memory_bytes,
        "FSIZE": limits.file_bytes,
        "NOFILE": limits.open_files,
        "NPROC": limits.processes,
        "CPU": limits.processor_s,
    }
    reached = []
    for name, value in wanted.items():
        which = getattr(resource, f"RLIMIT_{name}", None)
        if which is None:
            continue
        hard = resource.getrlimit(which)[1]
        lowered = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(which, (lowered, lowered))
            reached.append(name.lower())
    return tuple(reached)


def _watch(life: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(life, 1):
            pass
    end()


def _is_over(life: int) -> bool:
    import select

    return bool(select.select([life], [], [], 0)[0])
