"""Programs as folders on this machine, for the workers that run them: read-only, whole or not there.

A folder is written under another name and then renamed, and looked at again, to the last byte, whenever a worker is
to begin: what was deleted or changed meanwhile is made anew. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from nimbos.errors import StorageUnavailable

_LEFT_BEHIND_S = 3_600  # an incoming folder that old is of a server that died
_FILE_MODE, _FOLDER_MODE = 0o444, 0o555


def unpacked(root: Path, name: str, hashes: Mapping[str, str], read: Callable[[], Mapping[str, bytes]]) -> Path:
    """`root/name` with the files of `hashes`, SHA-256 by path. `read` is asked for them only when they are not there.

    Raises: StorageUnavailable.
    """
    target = root / name
    try:
        if not is_whole(target, hashes):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            _remove_left_behind(root)
            incoming = root / f".incoming-{secrets.token_hex(8)}"
            try:
                _write(incoming, read())
                _put(incoming, target, hashes)
            finally:
                _remove(incoming)
    except OSError as error:
        raise StorageUnavailable(str(target), reason=f"{error.strerror or type(error).__name__}.") from error
    return target


def is_whole(folder: Path, hashes: Mapping[str, str]) -> bool:
    """Those files, with their bytes, and nothing else: also a file too many could be run."""
    found = set()
    for place, folders, names in os.walk(folder, followlinks=False):
        if any((Path(place) / name).is_symlink() for name in (*folders, *names)):
            return False
        for name in names:
            file = Path(place) / name
            path = file.relative_to(folder).as_posix()
            if path not in hashes or hashlib.sha256(file.read_bytes()).hexdigest() != hashes[path]:
                return False
            found.add(path)
    return bool(found) and found == hashes.keys()


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(mode=0o700)
    for path, content in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        file.chmod(_FILE_MODE)
    for place, _, _ in os.walk(folder, topdown=False):
        if Path(place) != folder:  # the outermost is renamed, which some systems allow only where it can be written
            Path(place).chmod(_FOLDER_MODE)


def _put(incoming: Path, target: Path, hashes: Mapping[str, str]) -> None:
    """Another server may do the same right now: whoever is first wins, and what is whole stays."""
    if target.exists() or target.is_symlink():
        if is_whole(target, hashes):
            return
        aside = target.with_name(f".incoming-{secrets.token_hex(8)}")
        with contextlib.suppress(FileNotFoundError):
            target.rename(aside)
        _remove(aside)
    try:
        incoming.rename(target)
    except OSError:
        if not is_whole(target, hashes):
            raise
    target.chmod(_FOLDER_MODE)


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
        return
    for place, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            Path(place).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_left_behind(root: Path) -> None:
    oldest = time.time() - _LEFT_BEHIND_S
    for folder in root.glob(".incoming-*"):
        with contextlib.suppress(FileNotFoundError):
            if folder.lstat().st_mtime < oldest:
                _remove(folder)
