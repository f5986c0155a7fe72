"""A program as files: what may be in one, and the one form of them that its identity is the hash of.

    nimbos-program 1 ⏎          then, in the order of the paths:
    SIZE PATH ⏎ BYTES

No times, no modes, no absolute paths, no links: the same files are the same program on any machine, and different
programs never have the same bytes. The first line keeps them from being another part's contents in `blobs`. Knows
nothing of what the files say; read `programs.py` next. Everything here may come from a stranger.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

from nimbos.errors import BrokenProgram, PayloadTooLarge

FILES_MAX = 512
FILE_BYTES_MAX = 4 * 1024 * 1024
PROGRAM_BYTES_MAX = 8 * 1024 * 1024
PATH_BYTES_MAX = 200
DEPTH_MAX = 8

_FIRST_LINE = b"nimbos-program 1\n"
_HEAD = re.compile(rb"(\d{1,9}) ([^\n]+)\n")
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')  # that some system gives a meaning, or cannot write
_LEFT_OUT = frozenset({"__pycache__", "node_modules"})  # what tools leave behind is nobody's program


def pack(files: Mapping[str, bytes]) -> bytes:
    """Raises: BrokenProgram naming the path, PayloadTooLarge."""
    check_files(files)
    pieces = [_FIRST_LINE]
    for path in sorted(files, key=str.encode):
        pieces += [b"%d %s\n" % (len(files[path]), path.encode()), files[path]]
    return b"".join(pieces)


def unpack(content: bytes) -> dict[str, bytes]:
    """The inverse of `pack`. Raises: BrokenProgram for what `pack` has not made."""
    if not content.startswith(_FIRST_LINE):
        raise BrokenProgram("", why="these are not the bytes of a program")
    files: dict[str, bytes] = {}
    at, count = len(_FIRST_LINE), 0
    while at < len(content):
        count += 1
        if count > FILES_MAX:  # before any more of a stranger's bytes are taken apart
            raise BrokenProgram("", why=f"it has more than {FILES_MAX} files")
        head = _HEAD.match(content, at)
        end = head.end() + int(head[1]) if head else len(content) + 1
        if head is None or end > len(content):
            raise BrokenProgram("", why=f"its bytes end inside of a file, at {at}")
        files[head[2].decode(errors="replace")] = content[head.end() : end]
        at = end
    check_files(files)
    return files


def check_files(files: Mapping[str, bytes]) -> None:
    """Raises: BrokenProgram naming the path, PayloadTooLarge."""
    if len(files) > FILES_MAX:
        raise BrokenProgram("", why=f"it has {len(files)} files and may have {FILES_MAX}")
    for path, content in files.items():
        check_path(path)
        if len(content) > FILE_BYTES_MAX:
            raise PayloadTooLarge(have=len(content), limit=FILE_BYTES_MAX, what=f"file {path!r} of the program")
    size_bytes = sum(map(len, files.values()))
    if size_bytes > PROGRAM_BYTES_MAX:
        raise PayloadTooLarge(have=size_bytes, limit=PROGRAM_BYTES_MAX, what="program")
    _check_apart(files)


def check_path(path: str) -> None:
    """Of a file inside a program. Raises: BrokenProgram."""
    why = _wrong_with(path)
    if why:
        raise BrokenProgram(path, why=f"not a path for a file of a program: {why}")


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a program that is being written: hidden ones and what tools leave behind are left out, links are
    refused. Reads no more than a program may have. Blocks.

    Raises: BrokenProgram naming the path, PayloadTooLarge; OSError.
    """
    if not folder.is_dir():
        raise BrokenProgram("", why=f"there is no folder {str(folder)!r}")
    files: dict[str, bytes] = {}
    size_bytes = 0
    for entry, path in _walk(folder, ""):
        if entry.is_symlink() or not entry.is_file(follow_symlinks=False):
            raise BrokenProgram(path, why="it is a link or a device; put the file itself here")
        if len(files) >= FILES_MAX:
            raise BrokenProgram("", why=f"it has more than {FILES_MAX} files")
        files[path] = _read(Path(entry.path), path)
        size_bytes += len(files[path])
        if size_bytes > PROGRAM_BYTES_MAX:
            raise PayloadTooLarge(have=size_bytes, limit=PROGRAM_BYTES_MAX, what="program")
    check_files(files)
    return files


def _walk(folder: Path, prefix: str) -> Iterator[tuple[os.DirEntry[str], str]]:
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith(".") or entry.name in _LEFT_OUT or entry.name.endswith(".pyc"):
            continue
        path = f"{prefix}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            check_path(f"{path}/x")  # before going deeper
            yield from _walk(Path(entry.path), f"{path}/")
        else:
            yield entry, path


def _read(file: Path, path: str) -> bytes:
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BrokenProgram(path, why="it is no file any more")
        content = stream.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise PayloadTooLarge(have=None, limit=FILE_BYTES_MAX, what=f"file {path!r} of the program")
    return content


def _wrong_with(path: str) -> str:
    parts = path.split("/")
    try:
        size_bytes = len(path.encode())
    except UnicodeEncodeError:
        return "it is not Unicode"
    if size_bytes > PATH_BYTES_MAX:
        return f"it is longer than {PATH_BYTES_MAX} bytes"
    if len(parts) > DEPTH_MAX:
        return f"it is deeper than {DEPTH_MAX} levels"
    if not path or path.startswith("/"):
        return "it must be relative"
    if _FORBIDDEN.search(path):
        return "it has a character that not every system can write"
    if unicodedata.normalize("NFC", path) != path:
        return "write it in Unicode's composed form (NFC)"
    for part in parts:
        if part in ("", ".", ".."):
            return f"it has the part {part!r}"
        if part.startswith(".") or part in _LEFT_OUT or part.endswith(".pyc"):
            return f"{part!r} is hidden, or left behind by a tool"
        if part.endswith((" ", ".")) or part.startswith(" "):
            return "a part of it ends in a space or a dot"
    return ""


def _check_apart(files: Mapping[str, bytes]) -> None:
    """No two paths are one file, or file and folder, on a system that does not tell cases apart."""
    seen: dict[str, str] = {}
    for path in sorted(files):
        other = seen.setdefault(path.casefold(), path)
        if other != path:
            raise BrokenProgram(path, why=f"it differs from {other!r} by case only")
    folders = {parent for path in seen for parent in _parents(path)}
    both = sorted(folders & seen.keys())
    if both:
        raise BrokenProgram(seen[both[0]], why="it is a file and a folder")


def _parents(path: str) -> Iterator[str]:
    parts = path.split("/")
    return ("/".join(parts[:count]) for count in range(1, len(parts)))
