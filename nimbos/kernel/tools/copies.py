"""Workspaces of forks: the same folder until one of those that have it is about to write there.

    ROOT/PID               the files
    ROOT/PID.forks/FORK    FORK has no files of its own yet, and works with PID's as they are
    ROOT/FORK.from         the same from the other side: one line, PID

A worker is started before anything is written, so the copy is made then (`settle`). What is in a workspace was written
by a program: links are copied as links, and what is neither file, folder nor link is left out. A copy is made beside
and renamed, so that a death in the middle leaves none that is half. One at a time changes who has what, whichever
server does: a fork that is made while its original settles would else be owed by a folder that owes nothing any more.
Blocks; call it in a thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EACCES})
_FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file until one of them is written to


def owe(root: Path, of: str, forks: Sequence[str]) -> None:
    """From now on the forks have what `of` has, or what that is owed itself. Raises: OSError."""
    with _alone(root):
        source = _source(root, of) or of
        owed = _owed(root, source)
        owed.mkdir(exist_ok=True, mode=0o700)
        for fork in forks:
            _from(root, fork).write_text(source)
            (owed / fork).touch(mode=0o600)


def settle(root: Path, pid: str) -> None:
    """Before anything is written to a workspace: whoever shares it gets a copy, and `pid` one of its own.

    Raises: OSError.
    """
    with _alone(root):
        _settle(root, pid)


def drop(root: Path, pid: str) -> None:
    """It wants no files any more; forks keep what they share. Raises: OSError."""
    with _alone(root):
        source = _source(root, pid)
        if source is not None:
            (_owed(root, source) / pid).unlink(missing_ok=True)
            _from(root, pid).unlink(missing_ok=True)
        _settle(root, pid)
        shutil.rmtree(root / pid, ignore_errors=True)


def _settle(root: Path, pid: str) -> None:
    source = _source(root, pid)
    if source is not None:
        _give(root, source, pid)
    owed = _owed(root, pid)
    if owed.is_dir():
        for fork in sorted(owed.iterdir()):
            _give(root, pid, fork.name)
        owed.rmdir()


def copy_tree(source: Path, target: Path) -> None:
    """`target` is not there yet. Raises: OSError."""
    target.mkdir(mode=0o700)
    left = [(source, target)]  # no recursion: how deep folders nest is the program's choice
    while left:
        folder, copy = left.pop()
        with _unless_gone(), os.scandir(folder) as entries:
            for entry in entries:
                with _unless_gone():
                    _copy_entry(entry, copy / entry.name, left)


def _copy_entry(entry: os.DirEntry[str], made: Path, left: list[tuple[Path, Path]]) -> None:
    """What is in a folder stands in `left` then."""
    if entry.is_symlink():
        made.symlink_to(Path(entry.path).readlink())
    elif entry.is_dir(follow_symlinks=False):
        made.mkdir(mode=0o700)
        left.append((Path(entry.path), made))
    elif entry.is_file(follow_symlinks=False):
        _copy_file(entry.path, made)


@contextmanager
def _unless_gone() -> Iterator[None]:
    """A program may be at work in what is copied: what it removes or replaces meanwhile is left out, and what it does
    not let itself read."""
    try:
        yield
    except OSError as error:
        if error.errno not in _GONE:
            raise


def _copy_file(source: str, target: Path) -> None:
    reading = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(reading, "rb") as original, target.open("xb") as copy:
        status = os.fstat(reading)
        try:
            fcntl.ioctl(copy.fileno(), _FICLONE, reading)
        except OSError:  # the file system cannot, or the files are on two
            shutil.copyfileobj(original, copy, 1 << 20)
        os.fchmod(copy.fileno(), status.st_mode & 0o700)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Waits for whoever changes what is shared now; the system lets go for a server that dies."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (root / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _give(root: Path, source: str, fork: str) -> None:
    files, draft = root / fork, root / f"{fork}.copy"
    if not files.exists():
        shutil.rmtree(draft, ignore_errors=True)
        if (root / source).is_dir():
            copy_tree(root / source, draft)
        else:
            draft.mkdir(mode=0o700)
        draft.rename(files)
    _from(root, fork).unlink(missing_ok=True)
    (_owed(root, source) / fork).unlink(missing_ok=True)


def _source(root: Path, pid: str) -> str | None:
    try:
        return _from(root, pid).read_text() or None
    except FileNotFoundError:
        return None


def _from(root: Path, pid: str) -> Path:
    return root / f"{pid}.from"


def _owed(root: Path, pid: str) -> Path:
    return root / f"{pid}.forks"
