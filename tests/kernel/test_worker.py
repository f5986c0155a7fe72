"""The worker's promises, each held by a real process that misbehaves."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nimbos.errors import BrokenProgram
from nimbos.kernel.tools import live, process
from nimbos.kernel.tools.live import WorkerDied
from nimbos.kernel.tools.process import OUTPUT_BYTES
from nimbos.kernel.tools.worker import Place, ToolWorker
from nimbos.kernel.words import Effect
from nimbos.toolwire import ROOM_BYTES, CallDone, RunDone, Step, WorkerLimits, pack

PATIENCE_S = 60.0

TOOLS = '''
import asyncio, os, signal, socket, struct, subprocess, sys, time
from nimbos.adk import Happened, tool

class Detached:
    def to_dict(self):
        raise KeyError("no session")

@tool(effect="pure")
def add(a: int, b: int = 2) -> int:
    """Adds two numbers.

    Args:
        a: the first
    """
    print("adding, on standard output")
    return a + b

@tool(effect="pure")
async def environment() -> dict[str, str]:
    """What it can see of the server."""
    return dict(os.environ)

@tool(effect="pure")
def here() -> str:
    """Where it works."""
    return os.getcwd()

@tool(effect="idempotent")
def pay(amount: int, key: str) -> str:
    """Pays."""
    return f"{amount} {key}"

def _booked(room: str, key: str):
    if room == "detached":
        return Happened(Detached())
    return {"yes": Happened({"room": 7}), "no": False, "plainly": True, "who knows": None}[room]

@tool(effect="checkable", verify=_booked)
def book(room: str, key: str) -> str:
    """Books."""
    return room

@tool(effect="opaque")
def fails() -> None:
    """Raises."""
    raise ValueError("no such city: Atlantis")

@tool(effect="opaque")
def leaves(how: str) -> None:
    """Ends in some way."""
    if how == "exit": sys.exit(3)
    if how == "hard": os._exit(3)
    if how == "signal": os.kill(os.getpid(), signal.SIGSEGV)
    if how == "cancel": raise asyncio.CancelledError
    if how == "stop": raise StopIteration

@tool(effect="pure")
def hang_plain() -> None:
    """Never returns."""
    while True: time.sleep(60)

@tool(effect="pure")
async def hang_async() -> None:
    """Never returns, and can be stopped."""
    await asyncio.sleep(10_000)

@tool(effect="pure")
def hang_in_c() -> None:
    """Holds the interpreter."""
    import re
    open("in_c", "w").close()
    re.match(r"(a+)+$", "a" * 64 + "b")

@tool(effect="pure")
def returns(what: str):
    """Something odd."""
    deep = []
    for _ in range(100_000): deep = [deep]
    odd = {"large": lambda: "x" * 100_000_000, "bytes": lambda: bytes([255, 254]), "text": lambda: "é".encode(),
           "surrogate": lambda: "\\ud800", "object": object,
           "detached": Detached, "deep": lambda: deep, "nan": lambda: [float("nan")]}
    return odd[what]()

@tool(effect="pure")
def child_process() -> int:
    """Starts a process that would stay."""
    return subprocess.Popen(["sleep", "600"]).pid

@tool(effect="pure")
def daemons() -> list[int]:
    """Starts two processes that would stay, each in a session of its own, one without a parent."""
    alone = subprocess.Popen(["sleep", "600"], start_new_session=True).pid
    shell = subprocess.run(["sh", "-c", "sleep 600 >&2 & echo $!"], stdout=subprocess.PIPE, start_new_session=True)
    return [alone, int(shell.stdout)]

@tool(effect="pure")
def breeds(count: int, stay: bool = True) -> None:
    """Starts many."""
    bred = [subprocess.Popen(["sleep", "600"], start_new_session=True).pid for _ in range(count)]
    open("bred", "w").write(" ".join(map(str, bred)))
    while stay: time.sleep(60)

@tool(effect="pure")
def itself() -> int:
    """Which process it is."""
    return os.getpid()

@tool(effect="pure")
def collects() -> bool:
    """Whether what nobody needs is let go."""
    import gc
    return gc.isenabled()

@tool(effect="pure")
def greedy() -> int:
    """Takes memory."""
    return len(bytearray(900_000_000))

@tool(effect="pure")
def fills_the_disk() -> int:
    """Writes."""
    with open("big", "wb") as file: return file.write(bytes(2_000_000))

@tool(effect="pure")
def forges(frame: bytes) -> None:
    """Writes to the server by itself."""
    line = socket.socket(fileno=os.dup(int(sys.argv[1])))
    line.sendall(frame)
    time.sleep(600)
'''


class Bench:
    """Makes workers for programs, and ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[ToolWorker] = []

    def worker(
        self, tools: str = TOOLS, *, main: str = "", entry: str = "", limits: WorkerLimits | None = None
    ) -> ToolWorker:
        program = self.folder / f"program{len(self.made)}"
        place = Place(folder=program, workspace=program.with_suffix(".work"), output=program.with_suffix(".output"))
        for folder in (place.folder, place.workspace):
            folder.mkdir()
        (program / "tools.py").write_text(tools)
        (program / "main.py").write_text(main)

        async def where() -> Place:
            return place

        made = ToolWorker(where, tools="tools.py", entry=entry, limits=limits)
        self.made.append(made)
        return made

    def output(self) -> str:
        return (self.folder / "program0.output").read_text()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for made in bench.made:
        await made.close()


def gone(pid: int) -> bool:
    """There is no such process, or what is left of it waits to be read by whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def ended(pid: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not gone(pid):
            await asyncio.sleep(0.01)


async def test_a_worker_says_what_its_tools_are(bench: Bench) -> None:
    specs = {spec.name: spec for spec in await bench.worker().describe()}
    assert specs["add"].effect is Effect.PURE
    assert specs["add"].description == "Adds two numbers."
    assert specs["add"].parameters == {
        "type": "object",
        "properties": {"a": {"type": "integer", "description": "the first"}, "b": {"type": "integer", "default": 2}},
        "required": ["a"],
        "additionalProperties": False,
    }
    assert list(specs["pay"].parameters["properties"]) == ["amount"]  # the key is the kernel's
    assert len({spec.definition_hash for spec in specs.values()}) == len(specs)


async def test_a_definition_that_changes_has_another_hash(bench: Bench) -> None:
    before = {spec.name: spec.definition_hash for spec in await bench.worker().describe()}
    after = {s.name: s.definition_hash for s in await bench.worker(TOOLS.replace("Adds two", "Joins two")).describe()}
    assert {name for name in before if before[name] != after[name]} == {"add"}


async def test_a_call_returns_its_value_and_what_it_prints_stays_beside(bench: Bench) -> None:
    worker = bench.worker()
    result = await worker.call("add", {"a": 40}, deadline_s=PATIENCE_S)
    assert (result.value, result.error, result.size_bytes) == (42, "", 2)
    assert "adding, on standard output" in bench.output()


async def test_what_a_worker_prints_is_kept_to_its_last_part(bench: Bench) -> None:
    worker = bench.worker(
        "from nimbos.adk import tool\n@tool(effect='pure')\n"
        "def talk() -> None:\n    'Talks.'\n    print('x' * 3_000_000 + ' the end')"
    )
    assert (await worker.call("talk", {}, deadline_s=PATIENCE_S)).error == ""
    await worker.close()
    assert len(bench.output()) == OUTPUT_BYTES and bench.output().endswith(" the end\n")


async def test_calls_run_at_once_and_each_gets_its_own_answer(bench: Bench) -> None:
    worker = bench.worker()
    calls = [worker.call("add", {"a": n, "b": 0}, deadline_s=PATIENCE_S) for n in range(50)]
    assert [result.value for result in await asyncio.gather(*calls)] == list(range(50))


async def test_an_idempotent_tool_is_given_the_key(bench: Bench) -> None:
    result = await bench.worker().call("pay", {"amount": 3}, key="k1", deadline_s=PATIENCE_S)
    assert result.value == "3 k1"
    forged = await bench.worker().call("pay", {"amount": 3, "key": "mine"}, key="k1", deadline_s=PATIENCE_S)
    assert forged.error == "bad_arguments"


@pytest.mark.parametrize(
    ("room", "happened", "result"),
    [("yes", True, {"room": 7}), ("plainly", True, None), ("no", False, None), ("who knows", None, None)],
)
async def test_a_checkable_tool_says_whether_it_happened(
    bench: Bench, room: str, happened: bool | None, result: object
) -> None:
    verified = await bench.worker().verify("book", {"room": room}, key="k", deadline_s=PATIENCE_S)
    assert (verified.happened, verified.result) == (happened, result)


async def test_what_cannot_be_verified_is_not_told_to_have_happened(bench: Bench) -> None:
    worker = bench.worker()
    raised = await worker.verify("book", {"room": "a room that raises"}, key="k", deadline_s=PATIENCE_S)
    detached = await worker.verify("book", {"room": "detached"}, key="k", deadline_s=PATIENCE_S)
    assert detached.happened is None and "no session" in detached.message
    other = await worker.verify("add", {"a": 1}, key="k", deadline_s=PATIENCE_S)
    assert raised.happened is None and "KeyError" in raised.message
    assert other.happened is None


@pytest.mark.parametrize(
    ("tool", "arguments", "error", "says"),
    [
        ("fails", {}, "raised", "ValueError: no such city: Atlantis (tools.py:"),
        ("leaves", {"how": "exit"}, "raised", "SystemExit: 3"),
        ("leaves", {"how": "cancel"}, "raised", "CancelledError"),
        ("leaves", {"how": "stop"}, "raised", "StopIteration"),
        ("nothing", {}, "unknown_tool", "nothing"),
        ("add", {}, "bad_arguments", "`a`"),
        ("add", {"a": "x"}, "bad_arguments", "$.a"),
        ("add", {"a": 1, "c": 1}, "bad_arguments", "`c`"),
        ("returns", {"what": "large"}, "too_large", "100000002"),
        ("returns", {"what": "bytes"}, "not_utf8", "UTF-8"),
        ("returns", {"what": "surrogate"}, "not_utf8", "UTF-8"),
        ("returns", {"what": "object"}, "not_json", "object"),
        ("returns", {"what": "deep"}, "not_json", "recursion"),
        ("returns", {"what": "detached"}, "raised", "KeyError: 'no session'"),
        ("fills_the_disk", {}, "raised", "File too large"),
    ],
)
async def test_what_goes_wrong_in_a_tool_is_a_value_and_the_worker_lives_on(
    bench: Bench, tool: str, arguments: dict[str, object], error: str, says: str
) -> None:
    worker = bench.worker(limits=WorkerLimits(file_bytes=1_000_000))
    result = await worker.call(tool, arguments, deadline_s=PATIENCE_S)
    assert (result.error, result.value) == (error, None)
    assert says in result.message and not result.perhaps
    pid = worker.pid
    assert (await worker.call("add", {"a": 1}, deadline_s=PATIENCE_S)).value == 3
    assert worker.pid == pid


async def test_odd_values_that_json_can_say_are_said(bench: Bench) -> None:
    worker = bench.worker()
    assert (await worker.call("returns", {"what": "text"}, deadline_s=PATIENCE_S)).value == "é"
    assert (await worker.call("returns", {"what": "nan"}, deadline_s=PATIENCE_S)).value == [None]


async def test_an_async_tool_is_stopped_at_its_deadline_and_the_worker_lives_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "GRACE_S", PATIENCE_S)
    worker = bench.worker()
    await worker.describe()
    pid = worker.pid
    result = await worker.call("hang_async", {}, deadline_s=0.05)
    assert (result.error, result.perhaps) == ("deadline", True)
    assert worker.pid == pid


@pytest.mark.parametrize("tool", ["hang_plain", "hang_in_c"])
async def test_a_tool_that_hangs_is_killed_at_its_deadline_and_the_next_call_has_a_new_worker(
    bench: Bench, tool: str
) -> None:
    worker = bench.worker()
    await worker.describe()
    pid = worker.pid
    assert pid is not None
    result = await worker.call(tool, {}, deadline_s=0.05)
    assert (result.error, result.perhaps) == ("deadline", True)
    await ended(pid)
    assert (await worker.call("add", {"a": 1}, deadline_s=PATIENCE_S)).value == 3


async def test_what_left_the_workers_group_ends_with_it_too(bench: Bench) -> None:
    worker = bench.worker()
    started = (await worker.call("daemons", {}, deadline_s=PATIENCE_S)).value
    assert len(started) == 2
    for pid in started:
        os.kill(pid, 0)
    await worker.close()
    for pid in started:
        assert gone(pid), "when it is closed, and not some time later"


async def test_too_many_processes_end_the_worker(bench: Bench) -> None:
    worker = bench.worker(limits=WorkerLimits(below=4))
    result = await worker.call("breeds", {"count": 8}, deadline_s=PATIENCE_S)
    assert result.error == "died" and "too many processes were started" in result.message
    started = (bench.folder / "program0.work" / "bred").read_text().split()
    assert len(started) == 8 and all(gone(int(pid)) for pid in started)
    assert (await worker.call("breeds", {"count": 2, "stay": False}, deadline_s=PATIENCE_S)).error == ""


async def test_a_worker_dies_with_its_keeper_and_the_next_call_has_another(bench: Bench) -> None:
    worker = bench.worker()
    own = (await worker.call("itself", {}, deadline_s=PATIENCE_S)).value
    keeper = worker.pid
    assert keeper is not None and keeper != own
    os.kill(keeper, signal.SIGKILL)
    await ended(own)
    assert (await worker.call("itself", {}, deadline_s=PATIENCE_S)).value != own


async def test_a_keeper_that_a_tool_stopped_is_not_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_PATIENCE_S", 0.1)
    worker = bench.worker()
    own = (await worker.call("itself", {}, deadline_s=PATIENCE_S)).value
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    await worker.close()
    await ended(own)


@pytest.mark.parametrize(("how", "says"), [("hard", "ended with 3"), ("signal", "SIGSEGV")])
async def test_a_worker_that_dies_takes_only_its_calls_with_it(bench: Bench, how: str, says: str) -> None:
    worker = bench.worker()
    result = await worker.call("leaves", {"how": how}, deadline_s=PATIENCE_S)
    assert (result.error, result.perhaps) == ("died", True)
    assert says in result.message
    assert (await worker.call("add", {"a": 1}, deadline_s=PATIENCE_S)).value == 3


async def test_a_cancelled_call_kills_the_worker(bench: Bench) -> None:
    worker = bench.worker()
    await worker.describe()
    pid = worker.pid
    assert pid is not None
    call = asyncio.create_task(worker.call("hang_plain", {}, deadline_s=PATIENCE_S))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await ended(pid)


async def test_a_programs_garbage_is_collected(bench: Bench) -> None:
    assert (await bench.worker().call("collects", {}, deadline_s=PATIENCE_S)).value is True


async def test_memory_has_a_limit(bench: Bench) -> None:
    worker = bench.worker(limits=WorkerLimits(memory_bytes=500_000_000))
    result = await worker.call("greedy", {}, deadline_s=PATIENCE_S)
    assert (result.error, result.message.partition(" ")[0]) == ("raised", "MemoryError")


NO_THREADS = """
import resource, threading, time
from pathlib import Path
from nimbos.adk import tool

threading.stack_size(256 * 1024 * 1024)  # so that the room for a stack and that for all else are not near each other

@tool(effect="pure")
async def room_for_threads(there_is: bool) -> None:
    'From now on.'
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    used = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (hard if there_is else int(used.split()[1]) * 1024 + (128 << 20), hard))

@tool(effect="pure")
def hold() -> None:
    'Until told to go.'
    Path("held").touch()
    while not Path("go").exists():
        time.sleep(0.01)

@tool(effect="opaque")
def mail(to: str) -> None:
    'Sends.'
    with open("sent", "a") as file:
        file.write(to)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of private memory is Linux's")
async def test_a_call_that_has_no_thread_is_told_as_not_made_and_is_not_made_later(bench: Bench) -> None:
    worker = bench.worker(NO_THREADS, limits=WorkerLimits(memory_bytes=4 * 1024**3))
    await worker.describe()
    place = bench.folder / "program0.work"
    async with asyncio.timeout(PATIENCE_S):
        holding = asyncio.create_task(worker.call("hold", {}, deadline_s=PATIENCE_S))
        while not (place / "held").exists():
            await asyncio.sleep(0.01)  # another process makes it, and rings no bell
        assert (await worker.call("room_for_threads", {"there_is": False}, deadline_s=PATIENCE_S)).error == ""
        refused = await worker.call("mail", {"to": "Ada"}, deadline_s=PATIENCE_S)
        assert (refused.error, refused.perhaps) == ("raised", False) and "thread" in refused.message
        assert (await worker.call("room_for_threads", {"there_is": True}, deadline_s=PATIENCE_S)).error == ""
        (place / "go").touch()
        assert (await holding).error == ""
        assert (await worker.call("mail", {"to": "Bob"}, deadline_s=PATIENCE_S)).error == ""
    assert (place / "sent").read_text() == "Bob"


async def test_processor_time_has_a_limit(bench: Bench) -> None:
    worker = bench.worker(limits=WorkerLimits(processor_s=1))
    result = await worker.call("hang_in_c", {}, deadline_s=PATIENCE_S)
    assert result.error == "died" and ("SIGXCPU" in result.message or "SIGKILL" in result.message)


async def test_a_tool_sees_nothing_of_the_server(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIMBOS_DATABASE_URL", "postgresql://secret")
    monkeypatch.setenv("SOME_API_KEY", "secret")
    worker = bench.worker()
    seen = (await worker.call("environment", {}, deadline_s=PATIENCE_S)).value
    assert "secret" not in str(seen) and not any(name.startswith("NIMBOS") for name in seen)
    where = (await worker.call("here", {}, deadline_s=PATIENCE_S)).value
    assert seen["HOME"] == where == str((bench.folder / "program0.work").resolve())


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ("import nothing_of_that_name", "nothing_of_that_name"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(4)", "SystemExit: 4"),
        ("import os; os._exit(4)", "ended with 4"),
        ("from nimbos.adk import tool\n@tool(effect='pure')\ndef f(a) -> int:\n    'x'", "no type"),
        ("from nimbos.adk import tool\n@tool(effect='pure')\ndef f(a: 'Nowhere') -> int:\n    'x'", "Nowhere"),
        ("from nimbos.adk import tool\n@tool(effect='pure')\ndef f(*a: int) -> int:\n    'x'", "*a"),
        ("from nimbos.adk import tool\n@tool(effect='pure')\ndef f(a: object = 1 + 2j) -> int:\n    'x'", "JSON"),
        ("from nimbos.adk import tool\n@tool(effect='idempotent')\ndef f(a: int) -> int:\n    'x'", "key"),
        ("from nimbos.adk import tool\n@tool(effect='pure')\ndef f(a: int) -> int: ...", "docstring"),
    ],
)
async def test_python_that_cannot_be_used_is_an_error_that_says_why(bench: Bench, tools: str, says: str) -> None:
    worker = bench.worker(tools)
    with pytest.raises(BrokenProgram) as raised:
        await worker.describe()
    assert says in raised.value.message
    result = await worker.call("f", {}, deadline_s=PATIENCE_S)
    assert result.error == "not_loaded" and says in result.message


DIES_AT_IMPORT = """
import os, signal
open("starts", "a").write("x")
if os.path.getsize("starts") <= {times}:
    os.kill(os.getpid(), signal.SIGKILL)
"""


async def test_a_worker_that_is_killed_while_it_loads_is_started_once_more(bench: Bench) -> None:
    once = bench.worker(DIES_AT_IMPORT.format(times=1) + TOOLS)
    assert (await once.call("add", {"a": 1}, deadline_s=PATIENCE_S)).value == 3
    always = bench.worker(DIES_AT_IMPORT.format(times=2) + TOOLS)
    with pytest.raises(WorkerDied, match="SIGKILL"):
        await always.describe()
    assert (await always.call("add", {"a": 1}, deadline_s=PATIENCE_S)).value == 3


def frame(body: bytes, *, length: int | None = None) -> bytes:
    return (len(body) if length is None else length).to_bytes(4, "big") + body


@pytest.mark.parametrize(
    "forged",
    [
        frame(b"\xc1 this is no MessagePack"),
        frame(b"", length=2**31),
        frame(b"\x80"),
        frame(b"\x93" * 500),
        frame(b"\x81\xa4type\xa6loaded"),
        frame(b"\x83\xa4type\xa9call_done\xa6number\xcd\x03\xe7\xa5value\xc4\x041234"),
        frame(b"\x82\xa4type\xa8run_done\xa5value\xc4\x041234"),
        b"\x00\x00\x00\x40 and then nothing",
    ],
    ids=["no-msgpack", "huge", "no-kind", "nested", "loaded-again", "wrong-number", "no-run", "cut-off"],
)
async def test_a_worker_that_breaks_the_protocol_is_ended_and_the_server_is_not(bench: Bench, forged: bytes) -> None:
    worker = bench.worker(TOOLS.replace("frame: bytes", "frame: list[int]").replace("(frame)", "(bytes(frame))"))
    await worker.describe()
    pid = worker.pid
    assert pid is not None
    result = await worker.call("forges", {"frame": list(forged)}, deadline_s=1.0)
    assert result.error in ("died", "deadline") and result.perhaps
    await ended(pid)
    assert (await worker.call("add", {"a": 1}, deadline_s=PATIENCE_S)).value == 3


async def test_what_a_tool_started_ends_with_the_worker(bench: Bench) -> None:
    worker = bench.worker()
    started = (await worker.call("child_process", {}, deadline_s=PATIENCE_S)).value
    await worker.close()
    await ended(started)


SERVER = """
import asyncio, sys
from pathlib import Path
from nimbos.kernel.tools.process import OUTPUT_BYTES
from nimbos.kernel.tools.worker import Place, ToolWorker

async def main(folder: Path) -> None:
    async def where() -> Place:
        return Place(folder=folder / "program0", workspace=folder / "program0.work", output=folder / "program0.output")
    worker = ToolWorker(where, tools="tools.py")
    started = await worker.call("child_process", {}, deadline_s=30)
    daemons = await worker.call("daemons", {}, deadline_s=30)
    asyncio.create_task(worker.call("hang_in_c", {}, deadline_s=600))
    while not (folder / "program0.work" / "in_c").exists():
        await asyncio.sleep(0.01)
    print(worker.pid, started.value, *daemons.value, flush=True)
    await asyncio.Event().wait()

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_a_worker_and_what_it_started_end_when_the_server_is_killed_even_while_c_code_runs(
    bench: Bench, tmp_path: Path
) -> None:
    bench.worker()
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        pids = [int(pid) for pid in (await asyncio.wait_for(server.stdout.readline(), PATIENCE_S)).split()]
        assert len(pids) == 4
        for pid in pids:
            os.kill(pid, 0)
    finally:
        server.kill()
        await server.wait()
    for pid in pids:
        await ended(pid)


MAIN = """
from nimbos.adk import StepFailed, child, gather, think

async def main(input):
    if input == "raise":
        raise ValueError("not like that")
    if input == "many":
        await gather(*(think(str(n)) for n in range(2000)))
    first, second = await gather(think("a"), think("b"))
    try:
        await think(first + second)
    except StepFailed as failed:
        return [first, second, failed.code]

@child
async def helper(input):
    return {"helped": input}
"""


async def test_a_durable_function_gets_its_steps_answered(bench: Bench) -> None:
    run = await bench.worker(main=MAIN, entry="main.py:main").run_function(None)
    first, second = await run.next(), await run.next()
    assert isinstance(first, Step) and isinstance(second, Step)
    assert (first.verb, first.name, second.number) == ("think", "think", 2)
    await run.answer(second.number, value=b'"B"')
    await run.answer(first.number, value=b'"A"')
    third = await run.next()
    assert isinstance(third, Step) and b"AB" in third.arguments
    await run.answer(third.number, error="denied", message="no")
    done = await run.next()
    assert isinstance(done, RunDone) and done.value == b'["A","B","denied"]'


async def test_a_quiet_worker_says_so_after_what_an_answer_set_off(bench: Bench) -> None:
    run = await bench.worker(main=MAIN, entry="main.py:main").run_function(None)
    for _ in range(2):
        step = await run.next()
        assert isinstance(step, Step)
        await run.answer(step.number, value=b'"x"')
    number = await run.ask_quiet()
    assert isinstance(await run.next(), Step)
    quiet = await run.next()
    assert not isinstance(quiet, Step | RunDone) and (quiet.number, quiet.steps) == (number, 3)


async def test_only_marked_functions_can_be_run_by_name(bench: Bench) -> None:
    worker = bench.worker(main=MAIN, entry="main.py:main")
    helped = await (await worker.run_function({"nimbos.child": "helper", "input": 1})).next()
    assert isinstance(helped, RunDone) and helped.value == b'{"helped":1}'
    other = await (await worker.run_function({"nimbos.child": "gather", "input": 1})).next()
    assert isinstance(other, RunDone) and other.error == "raised"


async def test_a_function_that_raises_says_where(bench: Bench) -> None:
    done = await (await bench.worker(main=MAIN, entry="main.py:main").run_function("raise")).next()
    assert isinstance(done, RunDone)
    assert (done.error, done.message) == ("raised", "ValueError: not like that (main.py:6)")


FORGES = """
import os, socket, sys, time

async def main(frames):
    line = socket.socket(fileno=os.dup(int(sys.argv[1])))
    for content, times in frames:
        for _ in range(times):
            line.sendall(bytes(content))
    time.sleep(600)
"""


async def test_a_function_ends_once(bench: Bench) -> None:
    run = await bench.worker(main=FORGES, entry="main.py:main").run_function([[list(pack(RunDone())), 1_000]])
    assert isinstance(await run.next(), RunDone)
    with pytest.raises(WorkerDied, match="ended twice"):
        await run.next()


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (RunDone(value=b"1" * 1_001), "a value of 1001 bytes; at most 1000"),
        (Step(number=1, verb="think", name="x", arguments=b"1" * 1_001), "a value of 1001 bytes; at most 1000"),
        (RunDone(message="x" * (ROOM_BYTES + 1_000)), "a frame of"),
    ],
    ids=["result", "arguments", "message"],
)
async def test_a_function_says_no_more_at_once_than_a_result_may_have(
    bench: Bench, message: RunDone | Step, says: str
) -> None:
    worker = bench.worker(main=FORGES, entry="main.py:main", limits=WorkerLimits(result_bytes=1_000))
    run = await worker.run_function([[list(pack(message)), 1]])
    with pytest.raises(WorkerDied, match=says):
        await run.next()


async def test_a_tool_says_no_more_than_a_result_may_have(bench: Bench) -> None:
    forged = TOOLS.replace("frame: bytes", "frame: list[int]").replace("(frame)", "(bytes(frame))")
    worker = bench.worker(forged, limits=WorkerLimits(result_bytes=1_000))
    answer = pack(CallDone(number=1, value=b'"' + b"x" * 1_000 + b'"'))
    result = await worker.call("forges", {"frame": list(answer)}, deadline_s=PATIENCE_S)
    assert (result.error, result.perhaps) == ("died", True)
    assert "a value of 1002 bytes; at most 1000" in result.message


async def test_a_flood_of_steps_ends_the_worker(bench: Bench) -> None:
    run = await bench.worker(main=MAIN, entry="main.py:main").run_function("many")
    with pytest.raises(WorkerDied, match="too many steps"):
        while True:
            await run.next()


async def test_an_entry_that_is_not_there_is_said(bench: Bench) -> None:
    with pytest.raises(BrokenProgram, match="async def other"):
        await bench.worker(main=MAIN, entry="main.py:other").run_function(None)
