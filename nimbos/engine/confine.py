"""Confinement of the engine process: a GGUF is hostile input to C code.

Before the model's file is read and before any compute thread starts, the process gives up what it does not need: with
Landlock (Linux ≥ 5.13) it can write no file, read only the model, the library and Python's own code, and open no TCP
connection (ABI ≥ 4); it can gain no privileges, and its memory, which holds prompts, is never dumped. Says what it
reached, and never pretends: `tier` is shown by `nimbos doctor`.
Source: linux/landlock.h, `man 7 landlock`; the system call numbers are the same on x86-64 and arm64.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import sys
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_READ = (1 << 0) | (1 << 2) | (1 << 3)  # execute (mapping code), read a file, read a directory
_FILESYSTEM_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_NETWORK = 0b11  # bind and connect TCP
_SCOPES = 0b11  # abstract sockets and signals to outside (ABI 6)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38


class _Ruleset(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def die_with_parent() -> None:
    """Linux: this process is killed when the one that started it dies, also by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def confine(readable: list[Path]) -> str:
    """Confines the calling thread and every thread it starts later, so call it while there is no other.

    Returns: the tier reached: `landlock-N` (N is the kernel's ABI), or `none` with the reason.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return f"none (no Landlock on {sys.platform})"
    others = _threads() - 1
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    abi = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if abi < 1:
        return f"none ({os.strerror(ctypes.get_errno())})"
    filesystem = _FILESYSTEM_BY_ABI.get(min(abi, 5), _FILESYSTEM_BY_ABI[1])
    rules = _Ruleset(fs=filesystem, net=_NETWORK if abi >= 4 else 0, scoped=_SCOPES if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(rules), size, 0)
    if ruleset < 0:
        return f"none ({os.strerror(ctypes.get_errno())})"
    try:
        for path in readable:
            _allow(libc, ruleset, path)
        if libc.syscall(_RESTRICT_SELF, ruleset, 0) != 0:
            return f"none ({os.strerror(ctypes.get_errno())})"
    finally:
        os.close(ruleset)
    if others:
        return f"none (threads that were there before it: {others})"
    return f"landlock-{abi}"


def _threads() -> int:
    with contextlib.suppress(OSError):
        return sum(1 for _ in Path("/proc/self/task").iterdir())
    return 1


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # not there, or no business of ours: it stays closed
        return
    try:
        allowed = _READ if path.is_dir() else _READ & ~(1 << 3)
        rule = _PathBeneath(allowed=allowed, parent=descriptor)
        libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(descriptor)


def model_files(path: Path) -> list[Path]:
    """The file, or all parts of a model that is split."""
    split = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    if split is None:
        return [path]
    return [
        f for f in path.parent.iterdir() if re.fullmatch(rf"{re.escape(split[1])}-\d{{5}}-of-{split[2]}\.gguf", f.name)
    ]


def code_paths() -> list[Path]:
    """Where Python and shared libraries are read from, for modules that are imported late."""
    found = {Path(p) for p in (sys.prefix, sys.base_prefix, *sys.path) if p}
    found |= {
        Path(p) for p in ("/usr/lib", "/lib", "/lib64", "/usr/share/zoneinfo", "/proc/self", "/sys/devices/system")
    }
    found.add(Path(__file__).parent.parent)
    return sorted(found)
