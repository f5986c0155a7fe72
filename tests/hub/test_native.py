"""Installing a library: from npm's client (a false one, and the real one where there is one), a folder, a build."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import shutil
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest

from nimbos.config import Settings
from nimbos.errors import DownloadFailed, InvalidRequest
from nimbos.hub import NativeLibrary
from nimbos.hub.archive import extract
from nimbos.hub.build import build_library
from nimbos.hub.native import NPM_NAME, NPM_PINNED, _npm_member, npm_platform
from nimbos.hub.packages import Expected, fetch_npm_package
from tests.hub.conftest import Watcher

LIBRARIES = {"libllama.v0.5.0.so": b"llama", "libggml-base.so": b"base", "libggml-cpu-zen4.so": b"zen4"}


def tarball(path: Path, members: dict[str, bytes], *, links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path


def npm_archive(folder: Path) -> Path:
    system = npm_platform()
    assert system is not None
    members = {f"package/bins/{system}/{name}": content for name, content in LIBRARIES.items()}
    members |= {
        "package/package.json": b'{"name": "tiny", "version": "1.0.0"}',
        "package/LICENSE": b"MIT",
        f"package/bins/{system}/llama-addon.node": b"no",
        f"package/bins/{system}/sub/libdeep.so": b"no",
        "package/bins/other/libllama.so": b"no",
        f"package/bins/{system}/../../../libescape.so": b"no",
    }
    links = {f"package/bins/{system}/libpasswd.so": "/etc/passwd"}
    return tarball(folder / "native.tgz", members, links=links)


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An npm that hands out one archive, and writes down how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    archive = npm_archive(tmp_path)
    (folder / "npm").write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
test -f {tmp_path}/broken && {{ echo "npm error 404 Not Found" >&2; exit 1; }}
cp {archive} "$4/native.tgz"
"""
    )
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return archive


def library(settings: Settings, archive: Path) -> NativeLibrary:
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    return NativeLibrary(settings, pinned={npm_platform() or "": Expected(sha256=sha256)})


async def test_the_libraries_of_the_archive_are_installed_flat(npm: Path, settings: Settings, tmp_path: Path) -> None:
    native = library(settings, npm)
    assert native.installed() is None
    path = await native.install()
    assert path == native.installed() == settings.engines_dir / NPM_NAME
    assert {file.name for file in path.iterdir()} == {*LIBRARIES, "LICENSE", "manifest.json"}
    assert all((path / name).read_bytes() == content for name, content in LIBRARIES.items())
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith(f"pack @node-llama-cpp/{npm_platform()}@3.22.1 ")
    assert os.listdir(settings.engines_dir / ".scratch") == [".lock"]


async def test_an_installed_library_is_left_alone(npm: Path, settings: Settings, tmp_path: Path) -> None:
    native = library(settings, npm)
    await native.install()
    watcher = Watcher()
    assert await native.install(if_possible=True, progress=watcher) == native.installed()
    assert await native.install(progress=watcher) == native.installed()
    assert (watcher.notes, watcher.starts) == ([], [])
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


async def test_an_incomplete_library_is_no_library(npm: Path, settings: Settings) -> None:
    native = library(settings, npm)
    path = await native.install()
    assert path is not None
    (path / "libggml-base.so").unlink()
    assert native.installed() is None
    assert await native.install() == path
    assert (path / "libggml-base.so").read_bytes() == LIBRARIES["libggml-base.so"]


async def test_a_damaged_library_is_installed_again_when_that_is_asked_for(npm: Path, settings: Settings) -> None:
    """Else there would be no way out of it but to find its folder. Each start does without reading it all."""
    native = library(settings, npm)
    path = await native.install()
    assert path is not None
    (path / "libggml-base.so").write_bytes(b"cut")
    assert await native.install(if_possible=True) == path
    assert (path / "libggml-base.so").read_bytes() == b"cut"
    assert await native.install() == path
    assert (path / "libggml-base.so").read_bytes() == LIBRARIES["libggml-base.so"]


async def test_another_archive_than_pinned_is_refused(npm: Path, settings: Settings) -> None:
    native = NativeLibrary(settings, pinned={npm_platform() or "": Expected(sha256="0" * 64)})
    with pytest.raises(DownloadFailed, match=f"should have {'0' * 64}"):
        await native.install()
    assert native.installed() is None
    watcher = Watcher()
    assert await native.install(if_possible=True, progress=watcher) is None
    assert len(watcher.notes) == 1


async def test_a_failing_npm_is_told_in_its_words(npm: Path, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(DownloadFailed, match=r"npm could not get .*404 Not Found"):
        await library(settings, npm).install()


async def test_cancelling_ends_the_client_and_all_its_children(npm: Path, settings: Settings, tmp_path: Path) -> None:
    pids = _endless(tmp_path)
    installing = asyncio.create_task(library(settings, npm).install())
    started = [int(pid) for pid in (await asyncio.to_thread(pids.read_text)).split()]
    await _end(installing, started)
    assert os.listdir(settings.engines_dir / ".scratch") == [".lock"]


async def test_cancelling_while_the_client_starts_ends_its_children_too(
    npm: Path, settings: Settings, tmp_path: Path
) -> None:
    """The loop stands still from the fork until the client has a child, so that it is cancelled before it is known."""
    pids = _endless(tmp_path)
    before = _children()
    installing = asyncio.create_task(library(settings, npm).install())
    while not (set(_children()) - set(before)):
        assert not installing.done()
        await asyncio.sleep(0)
    started = [int(pid) for pid in pids.read_text().split()]
    await _end(installing, started)


def _endless(tmp_path: Path) -> Path:
    """A client with a child that both go on for long. Returns: where it tells their ids."""
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    (tmp_path / "bin" / "npm").write_text(f"#!/bin/sh\nsleep 600 &\necho $$ $! > {pids}\nwait\n")
    return pids


async def _end(installing: asyncio.Task[Any], started: list[int]) -> None:
    """Cancels it, and waits until the processes that it started are gone."""
    installing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await installing
    async with asyncio.timeout(60):
        while any(_alive(pid) for pid in started):
            await asyncio.to_thread(os.sched_yield)


def _children() -> list[str]:
    return Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()


def _alive(pid: int) -> bool:
    """A zombie that waits for its reaper counts as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_without_npm_the_wheel_is_used_and_said_in_one_line(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    native = NativeLibrary(settings)
    with pytest.raises(DownloadFailed, match="--source build"):
        await native.install()
    watcher = Watcher()
    assert await native.install(if_possible=True, progress=watcher) is None
    (note,) = watcher.notes
    assert "xllamacpp wheel" in note
    assert "\n" not in note


@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm here")
async def test_the_real_npm_packs_what_we_unpack(tmp_path: Path) -> None:
    system = npm_platform()
    archive = npm_archive(tmp_path)
    work, staged = tmp_path / "work", tmp_path / "staged"
    work.mkdir()
    staged.mkdir()
    packed = await fetch_npm_package(str(archive), work, expected=Expected(), progress=Watcher())
    assert system is not None
    written = extract(packed, staged, _npm_member(system))
    assert {path.name for path in written} == {*LIBRARIES, "LICENSE"}


def test_an_archive_cannot_write_elsewhere_or_make_links(tmp_path: Path) -> None:
    archive = tarball(tmp_path / "x.tgz", {"../a": b"1", "/b": b"2", "c": b"3"}, links={"d": "/etc/passwd", "e": "c"})
    folder = tmp_path / "out"
    with pytest.raises(DownloadFailed, match="refused"):
        extract(archive, folder, lambda member: member)
    written = extract(archive, folder, lambda member: member if member.name == "c" or member.name in "de" else None)
    assert written == [folder / "c"]
    assert list(folder.iterdir()) == [folder / "c"]


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    archive = tarball(tmp_path / "x.tgz", {"a": os.urandom(100_000)})
    content = archive.read_bytes()
    for number, broken in enumerate((content[:50_000], b"no archive", content[:40_000] + b"!" * 9 + content[40_009:])):
        archive.write_bytes(broken)
        with pytest.raises(DownloadFailed, match="damaged"):
            extract(archive, tmp_path / str(number), lambda member: member)


async def test_a_folder_is_copied_with_its_links_and_replaces_the_other(
    npm: Path, settings: Settings, tmp_path: Path
) -> None:
    native = library(settings, npm)
    await native.install()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "libllama.so.0.1").write_bytes(b"mine")
    (mine / "libllama.so").symlink_to("libllama.so.0.1")
    (mine / "libggml.so").symlink_to("/etc/hostname")
    (mine / "notes.txt").write_text("no")
    path = await native.install(folder=mine)
    assert path is not None
    assert path.name.startswith("local-")
    assert (path / "libllama.so").readlink() == Path("libllama.so.0.1")
    assert not (path / "libggml.so").is_symlink()
    assert not (path / "notes.txt").exists()
    assert native.installed() == path
    assert [f.name for f in settings.engines_dir.iterdir() if not f.name.startswith(".")] == [path.name]
    assert await native.install(if_possible=True) == path


async def test_a_folder_without_a_library_is_refused(settings: Settings, tmp_path: Path) -> None:
    native = NativeLibrary(settings)
    with pytest.raises(InvalidRequest, match="no libllama"):
        await native.install(folder=tmp_path)
    with pytest.raises(InvalidRequest, match="no folder"):
        await native.install(folder=tmp_path / "none")
    assert native.installed() is None


CMAKE = """cmake_minimum_required(VERSION 3.16)
project(tiny C)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_library(ggml ggml.c)
add_library(llama llama.c)
set_target_properties(llama ggml PROPERTIES VERSION 0.1 SOVERSION 0)
target_link_libraries(llama ggml)
"""
BACKEND = """
import shutil, pathlib
def prepare_metadata_for_build_wheel(directory, settings=None):
    folder = pathlib.Path(directory) / "tinylib-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: tinylib\\nVersion: 1.0\\n")
    return folder.name
def build_wheel(*unused):
    raise SystemExit("only the source is wanted")
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Expected:
    """An sdist that carries a small library where llama-cpp-python carries llama.cpp."""
    folder = tmp_path / "sdists"
    folder.mkdir()
    root, inner = "tinylib-1.0", "tinylib-1.0/vendor/llama.cpp"
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    archive = tarball(
        folder / "tinylib-1.0.tar.gz",
        {
            f"{root}/PKG-INFO": b"Metadata-Version: 2.1\nName: tinylib\nVersion: 1.0\n",
            f"{root}/pyproject.toml": (project + '[project]\nname = "tinylib"\nversion = "1.0"\n').encode(),
            f"{root}/backend.py": BACKEND.encode(),
            f"{inner}/CMakeLists.txt": CMAKE.encode(),
            f"{inner}/ggml.c": b"int ggml(void) { return 1; }\n",
            f"{inner}/llama.c": b"int ggml(void);\nint llama(void) { return ggml(); }\n",
            f"{inner}/LICENSE": b"MIT",
        },
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return Expected(sha256=hashlib.sha256(archive.read_bytes()).hexdigest())


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake here")
async def test_a_build_gives_libraries_that_find_each_other(source: Expected, tmp_path: Path) -> None:
    import ctypes

    scratch, staged = tmp_path / "scratch", tmp_path / "staged"
    scratch.mkdir()
    staged.mkdir()
    watcher = Watcher()
    origin = await build_library(scratch, staged, watcher, requirement="tinylib==1.0", expected=source)
    assert origin == "pypi:tinylib==1.0"
    assert (staged / "LICENSE").read_bytes() == b"MIT"
    moved = staged.rename(tmp_path / "elsewhere")
    shutil.rmtree(scratch)
    assert ctypes.CDLL(str(moved / "libllama.so")).llama() == 1
    assert any("built 100 %" in note for note in watcher.notes)


async def test_another_source_than_pinned_is_not_built(source: Expected, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake here")
    with pytest.raises(DownloadFailed, match=r"pip could not get|hash"):
        await build_library(
            tmp_path, tmp_path / "staged", Watcher(), requirement="tinylib==1.0", expected=Expected(sha256="0" * 64)
        )


def test_the_pinned_archive_is_named() -> None:
    assert set(NPM_PINNED) == {"linux-x64"}
    assert all(len(expected.sha256) == 64 and expected.size_bytes for expected in NPM_PINNED.values())


async def test_a_folder_that_cannot_be_written_stops_nothing_if_possible(settings: Settings) -> None:
    settings.engines_dir.parent.mkdir(parents=True, exist_ok=True)
    settings.engines_dir.write_text("a file")
    native = NativeLibrary(settings)
    with pytest.raises(OSError, match="engines"):
        await native.install()
    watcher = Watcher()
    assert await native.install(if_possible=True, progress=watcher) is None
    assert len(watcher.notes) == 1
