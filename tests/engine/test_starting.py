"""Starting an engine: confined before the model's file is read, and never waited for in vain."""

from __future__ import annotations

import asyncio
import errno
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nimbos.engine import Engine, confine, engine, handshake, protocol
from nimbos.engine.library import quiet_environment
from nimbos.errors import EngineFailed
from tests import tiny_gguf
from tests.engine.asking import answer, ask, settings_in, started

# The engine process itself, whose model says what a hostile file could reach while libllama reads it.
LOADING = """
import json, os, socket, sys, threading
from pathlib import Path
from nimbos.engine import worker
from nimbos.errors import ModelUnusable

def can(act):
    try:
        act()
        return True
    except OSError:
        return False

def connect():
    with socket.socket() as tcp:
        tcp.connect(("127.0.0.1", int(sys.argv[2])))

class Spy(worker.Model):
    def __init__(self, library, path, options):
        home = path.parent
        found = {
            "threads": ["NoNewPrivs:\\t1" in (t / "status").read_text() for t in Path("/proc/self/task").iterdir()],
            "model": can(path.read_bytes),
            "secret": can((home / "secret").read_bytes),
            "write": can(lambda: (home / "written").write_bytes(b"x")),
            "connect": can(connect),
        }
        print(json.dumps(found), flush=True)
        super().__init__(library, path, options)

worker.Model = Spy
worker.main()
"""


@dataclass(frozen=True, slots=True)
class Loaded:
    """`found`: by the spy. `confined`: of each thread, when the model had answered."""

    found: dict[str, Any]
    ready: protocol.Ready
    confined: list[bool]


def loaded(home: Path, before: str = "") -> Loaded:
    """`before`: what the process does first of all."""
    path = tiny_gguf.write("qwen2", home)
    (home / "secret").write_text("another model's")
    ours, theirs = socket.socketpair()
    environment = dict(os.environ)
    quiet_environment(environment)
    with ours, theirs, socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
        with subprocess.Popen(
            [sys.executable, "-c", before + LOADING, str(theirs.fileno()), port],
            pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, env=environment,
        ) as process:  # fmt: skip
            start = protocol.Start(
                model_path=str(path), model_id="tiny", model_hash="", settings=settings_in(home, threads=2),
                lease_path="",
            )  # fmt: skip
            ours.sendall(protocol.encode(start))
            assert process.stdout is not None
            found = json.loads(process.stdout.readline())
            length = protocol.LENGTH.unpack(ours.recv(protocol.LENGTH.size, socket.MSG_WAITALL))[0]
            ready = protocol.decode_from_engine(ours.recv(length, socket.MSG_WAITALL))
            threads = Path(f"/proc/{process.pid}/task").iterdir()
            confined = ["NoNewPrivs:\t1" in (thread / "status").read_text() for thread in threads]
            ours.shutdown(socket.SHUT_RDWR)
    assert isinstance(ready, protocol.Ready)
    return Loaded(found, ready, confined)


def test_the_process_is_confined_when_the_model_is_loaded(tmp_path: Path) -> None:
    process = loaded(tmp_path)
    found, tier = process.found, process.ready.tier
    missing = [f"none ({os.strerror(code)})" for code in (errno.ENOSYS, errno.EOPNOTSUPP)]
    if tier in missing or tier.startswith("none (no Landlock"):  # anything else is our fault
        pytest.skip(f"no confinement here: {tier}")
    assert found["model"]
    assert not found["secret"]
    assert not found["write"]
    assert not (tmp_path / "written").exists()
    assert all(found["threads"]), "a thread stands outside of the confinement"
    assert len(process.confined) > len(found["threads"]), "none was started since"
    assert all(process.confined), "a thread that was started since stands outside of the confinement"
    if int(tier.removeprefix("landlock-")) >= 4:
        assert not found["connect"]


def test_a_kernel_without_landlock_is_said_and_the_model_answers_all_the_same(tmp_path: Path) -> None:
    """The number of a system call that no kernel has: the answer is the one of a kernel without Landlock."""
    process = loaded(tmp_path, "from nimbos.engine import confine\nconfine._CREATE_RULESET = 1_000_000\n")
    assert process.ready.tier == f"none ({os.strerror(errno.ENOSYS)})"
    assert process.found["model"]
    assert process.found["secret"], "then the process boundary is all there is"
    assert all(process.confined), "it can still gain no privileges"


def test_a_thread_that_was_there_before_is_no_confinement(tmp_path: Path) -> None:
    early = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    process = loaded(tmp_path, early)
    assert process.ready.tier.startswith("none (")
    assert not all(process.confined)


def test_of_a_split_model_all_parts_may_be_read_and_nothing_else(tmp_path: Path) -> None:
    names = ["big-00001-of-00003.gguf", "big-00002-of-00003.gguf", "big-00003-of-00003.gguf"]
    others = ["big-00001-of-00002.gguf", "other-00001-of-00003.gguf", "big.gguf"]
    for name in (*names, *others):
        (tmp_path / name).touch()
    assert sorted(f.name for f in confine.model_files(tmp_path / names[0])) == names
    assert confine.model_files(tmp_path / "big.gguf") == [tmp_path / "big.gguf"]


async def test_a_process_that_is_stuck_while_loading_is_ended_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = functools.partial(handshake.first_word, stuck_s=0.5, look_every_s=0.1)
    monkeypatch.setattr(engine, "first_word", soon)
    path = tiny_gguf.write("qwen2", tmp_path)
    running = Engine(model_path=path, model_id="tiny", settings=settings_in(tmp_path))
    starting = asyncio.create_task(running.start())
    while running.pid is None:
        await asyncio.sleep(0)
    pid = running.pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EngineFailed, match=r"tiny.*nothing for"):
        await starting
    assert not Path(f"/proc/{pid}").exists()
    monkeypatch.undo()
    await running.start()
    assert (await answer(running, ask())).tokens == 24
    await running.close()


async def test_one_that_loads_for_too_long_is_told_with_the_time() -> None:
    """This process is busy, so it is not stuck; what is awaited never comes."""
    never: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    with pytest.raises(EngineFailed, match="not loaded after"):
        await handshake.first_word(never, os.getpid(), load_s_max=0.3, stuck_s=60, look_every_s=0.05)
    assert never.cancelled()


async def test_one_that_gets_on_is_waited_for() -> None:
    """Its work shows in the kernel's own counts; those of a process that only waits do not change."""
    word: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    busy = await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass")
    try:
        waiting = asyncio.ensure_future(
            handshake.first_word(word, busy.pid, stuck_s=1.5, load_s_max=60, look_every_s=0.1)
        )
        before = handshake._work_of(busy.pid)
        while handshake._work_of(busy.pid) == before:
            await asyncio.sleep(0)
        await asyncio.wait({waiting}, timeout=2)
        assert not waiting.done()
        word.set_result(7)
        assert await waiting == 7
    finally:
        busy.kill()
        await busy.wait()


async def test_what_began_with_one_file_does_not_go_on_with_another(tmp_path: Path) -> None:
    """Other weights under the same name, and then the engine dies: its tokens mean nothing to the new file."""
    running = await started("qwen2", tmp_path)
    other = tiny_gguf.write("qwen2", tmp_path, seed=2)
    try:
        prepared = await running.prepare(ask(limit_tokens=1500))
        with pytest.raises(EngineFailed, match="another file than the one that was loaded"):
            async with aclosing(running.generate(prepared.ask)) as chunks:
                async for _ in chunks:
                    if other.exists():
                        other.replace(running.model_path)
                        assert running.pid is not None
                        os.kill(running.pid, signal.SIGKILL)
        assert running.given_up  # so that the next ask loads what is there now
        assert running.restarts == 0
    finally:
        await running.close()


async def test_a_process_that_gives_up_by_itself_is_not_called_a_crash(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    broken = msgspec.structs.replace(settings, engine=msgspec.structs.replace(settings.engine, inbox=0))  # never valid
    model = tiny_gguf.write("qwen2", tmp_path)
    starting = Engine(model_path=model, model_id="a/b", settings=broken)
    with pytest.raises(EngineFailed, match=r"ended with 1; what it said last is in run/engine-a_b\.log"):
        await starting.start()
    assert b"ValidationError" in (settings.run_dir / "engine-a_b.log").read_bytes()


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "run/x.log"), (1, "run/x.log"), (-signal.SIGKILL, "memory runs out"), (-signal.SIGSEGV, "crashes libllama")],
)
def test_each_end_has_its_reason(code: int, words: str) -> None:
    assert words in engine.ending_of(code, "x.log")


async def test_an_engine_that_cannot_start_any_more_is_given_up_though_others_keep_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their prompts, which may be why an engine dies, are not why another one does not start."""
    running = await started("qwen2", tmp_path, restart_limit=3)
    tries = itertools.count(1)
    coming: list[asyncio.Task[Any]] = []

    async def spawn() -> None:
        assert next(tries) <= 3, "it would be tried for ever"
        coming.append(asyncio.create_task(running.prepare(ask(f"{len(coming)}"))))
        await asyncio.sleep(0)
        raise EngineFailed("no memory")

    monkeypatch.setattr(running, "_spawn", spawn)
    try:
        prepared = await running.prepare(ask(limit_tokens=1500))
        async with aclosing(running.generate(prepared.ask)) as chunks:
            await anext(chunks)
            assert running.pid is not None
            os.kill(running.pid, signal.SIGKILL)
            with pytest.raises(EngineFailed, match="its process died"):
                async for _ in chunks:
                    pass
        assert running.given_up
        assert all(isinstance(end, EngineFailed) for end in await asyncio.gather(*coming, return_exceptions=True))
    finally:
        await running.close()
