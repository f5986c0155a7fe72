"""A libllama made for this processor, under `engines/` of the home folder: `nimbos engine install`.

    engines/<name>/manifest.json, libllama*, libggml*, LICENSE     flat; the engine looks for them here
    engines/.lock, engines/.scratch

One is installed at a time: a new one replaces the others once it is complete. What the engine does with it, and what
it falls back to (the wheel), is `nimbos.engine.library`.
"""

from __future__ import annotations

import asyncio
import hashlib
import platform
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from nimbos.config import Settings
from nimbos.errors import DownloadFailed, InvalidRequest, NimbosError
from nimbos.hub.archive import extract
from nimbos.hub.build import BUILD_NAME, build_library
from nimbos.hub.disk import require_space, sync_folder
from nimbos.hub.lock import FileLock, scratch_folder
from nimbos.hub.packages import Expected, fetch_npm_package
from nimbos.hub.progress import Progress, Silent
from nimbos.hub.reading import sha256_of

NPM_VERSION = "3.22.1"
NPM_NAME = f"node-llama-cpp-{NPM_VERSION}"
# What the archive must be; for the other platforms npm's own check against its registry has to do.
NPM_PINNED = {
    "linux-x64": Expected(
        size_bytes=10_824_547, sha256="0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0"
    ),
}
_PLATFORMS = {
    ("linux", "x86_64"): "linux-x64",
    ("linux", "aarch64"): "linux-arm64",
    ("linux", "armv7l"): "linux-armv7l",
    ("darwin", "arm64"): "mac-arm64-metal",
    ("darwin", "x86_64"): "mac-x64",
    ("win32", "amd64"): "win-x64",
    ("win32", "arm64"): "win-arm64",
}
_LIBRARY = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._+-]*\.(so(\.[0-9.]+)?|dylib|dll|metal|metallib)$")
_UNPACKED_BYTES = 64 << 20


class _Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`files`: sha256 by name; `links`: names of the same folder by name."""

    version: Literal[1] = 1
    name: str
    source: str
    files: dict[str, str]
    links: dict[str, str] = {}


class NativeLibrary:
    """`pinned` is what npm's archives must be, by platform."""

    def __init__(self, settings: Settings, *, pinned: dict[str, Expected] | None = None) -> None:
        self._folder = settings.engines_dir
        self._pinned = NPM_PINNED if pinned is None else pinned

    def installed(self) -> Path | None:
        """The folder of a complete library, found without reading its files."""
        for folder in sorted(self._folder.glob("*/"), reverse=True):
            if not folder.name.startswith(".") and _complete(folder):
                return folder
        return None

    async def install(
        self,
        *,
        if_possible: bool = False,
        source: Literal["npm", "build"] = "npm",
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> Path | None:
        """Installs from npm, by building, or from `folder`; one that is there already is left alone, if its files are
        as they were. With `if_possible` it is content with any library that is there, and None with a note takes the
        place of an error.

        Raises: DownloadFailed; InvalidRequest for a folder without a libllama.
        """
        progress = progress or Silent()
        present = self.installed()
        if present is not None and if_possible:
            return present
        try:
            same = present if folder is None and present is not None and present.name == _name(source) else None
            if same is not None and await asyncio.to_thread(_unchanged, same):
                return same
            return await self._install(source, folder, progress)
        except (NimbosError, OSError) as error:
            if not if_possible:
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            progress.note(f"Using the library of the xllamacpp wheel, as none was made for this processor: {reason}")
            return None
        finally:
            progress.done()

    async def _install(self, source: Literal["npm", "build"], folder: Path | None, progress: Progress) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._folder / ".lock")
        if not lock.try_acquire():
            raise DownloadFailed("A library is being installed by another process. Wait for it and try again.")
        try:
            require_space(self._folder, _UNPACKED_BYTES, "The library")
            with scratch_folder(self._folder / ".scratch") as scratch:
                staged = scratch / "library"
                staged.mkdir()
                if folder is not None:
                    name, origin = await asyncio.to_thread(_copy_folder, folder, staged)
                elif source == "build":
                    name, origin = BUILD_NAME, await build_library(scratch, staged, progress)
                else:
                    name, origin = NPM_NAME, await self._from_npm(scratch, staged, progress)
                return await asyncio.to_thread(self._adopt, staged, name, origin)
        finally:
            lock.release()

    async def _from_npm(self, scratch: Path, staged: Path, progress: Progress) -> str:
        system = npm_platform()
        if system is None:
            raise DownloadFailed(f"There is no prebuilt library for {sys.platform} {platform.machine()}.")
        specifier = f"@node-llama-cpp/{system}@{NPM_VERSION}"
        expected = self._pinned.get(system, Expected())
        archive = await fetch_npm_package(specifier, scratch, expected=expected, progress=progress)
        await asyncio.to_thread(extract, archive, staged, _npm_member(system))
        return f"npm:{specifier}"

    def _adopt(self, staged: Path, name: str, origin: str) -> Path:
        """Gives a complete library its name, then lets the others go."""
        _require_library(staged, origin)
        files = {path.name: sha256_of(path) for path in sorted(staged.iterdir()) if not path.is_symlink()}
        links = {path.name: str(path.readlink()) for path in sorted(staged.iterdir()) if path.is_symlink()}
        manifest = _Manifest(name=name, source=origin, files=files, links=links)
        (staged / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
        target = self._folder / name
        if target.exists():
            shutil.rmtree(target)
        staged.replace(target)
        sync_folder(self._folder)
        for other in self._folder.glob("*/"):
            if other != target and not other.name.startswith("."):
                shutil.rmtree(other)
        return target


def npm_platform() -> str | None:
    """npm's name for this system, where there is a build for it (glibc only)."""
    if sys.platform == "linux" and platform.libc_ver()[0] != "glibc":
        return None
    return _PLATFORMS.get((sys.platform, platform.machine().lower()))


def _name(source: Literal["npm", "build"]) -> str:
    return BUILD_NAME if source == "build" else NPM_NAME


def _npm_member(system: str) -> Callable[[PurePosixPath], PurePosixPath | None]:
    """The libraries and the licence, flat."""
    libraries = PurePosixPath("package/bins") / system

    def choose(member: PurePosixPath) -> PurePosixPath | None:
        licence = member == PurePosixPath("package/LICENSE")
        return PurePosixPath(member.name) if licence or _is_library(member, libraries) else None

    return choose


def _is_library(member: PurePosixPath, folder: PurePosixPath) -> bool:
    return member.parent == folder and _LIBRARY.match(member.name) is not None


def _copy_folder(folder: Path, staged: Path) -> tuple[str, str]:
    """Copies a folder's libraries. Links to a neighbour stay links; any other is followed."""
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is no folder.")
    for path in sorted(folder.iterdir()):
        if path.name != "LICENSE" and not _LIBRARY.match(path.name):
            continue
        if path.is_symlink() and path.readlink() == Path(path.readlink().name):
            (staged / path.name).symlink_to(path.readlink())
        elif path.is_file():
            shutil.copyfile(path, staged / path.name)
    digest = hashlib.sha256()
    for path in sorted(staged.iterdir()):
        digest.update(f"{path.name} {sha256_of(path) if path.is_file() else ''}\n".encode())
    return f"local-{digest.hexdigest()[:12]}", str(folder.absolute())


def _require_library(staged: Path, origin: str) -> None:
    for stem in ("llama", "ggml"):
        found = [path for path in staged.iterdir() if path.name.removeprefix("lib").startswith(stem) and path.is_file()]
        if not found:
            raise InvalidRequest(f"{origin} holds no lib{stem}; a folder with libllama and libggml is needed.")


def _read_manifest(folder: Path) -> _Manifest | None:
    try:
        return msgspec.json.decode((folder / "manifest.json").read_bytes(), type=_Manifest)
    except (OSError, msgspec.DecodeError):
        return None


def _unchanged(folder: Path) -> bool:
    """Whether its files' bytes are those that were installed."""
    manifest = _read_manifest(folder)
    return manifest is not None and all(sha256_of(folder / name) == sha256 for name, sha256 in manifest.files.items())


def _complete(folder: Path) -> bool:
    manifest = _read_manifest(folder)
    return manifest is not None and all((folder / name).is_file() for name in (*manifest.files, *manifest.links))
