"""The pipe between a server and the process that runs a program's Python: frames, and what they say.

A frame is four bytes of length, big endian, and a MessagePack map. Values that a tool or a step takes and gives are
JSON texts inside (`bytes`), so a frame is flat however deep a value nests, and what is stored is what was sent.
The worker is not trusted: its frames are bounded here and judged in `kernel/tools/`. `adk/worker.py` is its side.
"""

from __future__ import annotations

import struct
from typing import Literal, TypeAlias

import msgspec

LENGTH = struct.Struct(">I")
FRAME_BYTES_MAX = 32 * 1024 * 1024
ROOM_BYTES = 64 * 1024  # in a frame, beside the value it carries
MESSAGE_CHARACTERS = 2_000  # of an error's text
TOOLS_MAX = 128
CALLS_MAX = 64  # that a worker is given at a time: each may hold a thread, and its deadline counts from then

EffectName = Literal["opaque", "idempotent", "checkable", "pure"]


class WorkerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """`memory_bytes`: private memory, all threads together. `processes`: of the user, where the system holds it;
    `below`: that the worker and what it started are at a time, counted every second. `processor_s`: of the whole
    life of the process; one that uses it up is killed, and the next call starts another. `result_bytes`: a result as
    JSON."""

    memory_bytes: int = 2 * 1024**3
    file_bytes: int = 256 * 1024**2
    open_files: int = 1024
    processes: int = 4096
    below: int = 512
    processor_s: int = 3600
    result_bytes: int = 4 * 1024**2


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """The first frame to a worker. `folder`: the program's, read-only. `tools`: a file in it, "" for none.
    `entry`: `main.py:main` for a durable function, "" for none."""

    folder: str
    tools: str
    entry: str
    limits: WorkerLimits


class Call(msgspec.Struct, frozen=True, kw_only=True, tag="call"):
    """`arguments`: a JSON object. `key`: the effect's; the same at each try. `deadline_ms`: from now."""

    number: int
    tool: str
    arguments: bytes
    key: str
    deadline_ms: int


class Verify(msgspec.Struct, frozen=True, kw_only=True, tag="verify"):
    """Did the call with this key happen?"""

    number: int
    tool: str
    arguments: bytes
    key: str
    deadline_ms: int


class Run(msgspec.Struct, frozen=True, kw_only=True, tag="run"):
    """Start the entry with this input, a JSON value. At most one in a worker's life."""

    input: bytes


class StepDone(msgspec.Struct, frozen=True, kw_only=True, tag="step_done"):
    """`error`: a code, "" when it went well; `value` is JSON then."""

    number: int
    value: bytes = b"null"
    error: str = ""
    message: str = ""


class AskQuiet(msgspec.Struct, frozen=True, kw_only=True, tag="ask_quiet"):
    """Answer when everything that was sent before has had its effect."""

    number: int


ToWorker: TypeAlias = Load | Call | Verify | Run | StepDone | AskQuiet


class ToolWire(msgspec.Struct, frozen=True, kw_only=True):
    """`parameters`: a JSON Schema of an object. `deadline_ms`: 0 for the program's."""

    name: str
    description: str
    parameters: bytes
    effect: EffectName
    deadline_ms: int = 0


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """The first frame from a worker. `error`: for people, why the program's Python cannot be used.
    `limited`: which limits are in force here."""

    tools: tuple[ToolWire, ...] = ()
    error: str = ""
    limited: tuple[str, ...] = ()


class CallDone(msgspec.Struct, frozen=True, kw_only=True, tag="call_done"):
    """`error`: `unknown_tool`, `bad_arguments`, `raised`, `deadline`, `too_large`, `not_utf8` or `not_json`."""

    number: int
    value: bytes = b"null"
    error: str = ""
    message: str = ""


class VerifyDone(msgspec.Struct, frozen=True, kw_only=True, tag="verify_done"):
    """`happened` None: it cannot be told, and `message` says why."""

    number: int
    happened: bool | None
    value: bytes = b"null"
    message: str = ""


class Step(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """A durable function asks for something. `number`: dense from 1. `name`: part of the step's key.
    `arguments`: a JSON object."""

    number: int
    verb: str
    name: str
    arguments: bytes


class Quiet(msgspec.Struct, frozen=True, kw_only=True, tag="quiet"):
    """`steps`: how many were asked for so far."""

    number: int
    steps: int


class RunDone(msgspec.Struct, frozen=True, kw_only=True, tag="run_done"):
    value: bytes = b"null"
    error: str = ""
    message: str = ""


FromWorker: TypeAlias = Loaded | CallDone | VerifyDone | Step | Quiet | RunDone


def pack(message: ToWorker | FromWorker) -> bytes:
    """A whole frame."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


def to_worker(body: bytes) -> ToWorker:
    message: ToWorker = msgspec.msgpack.decode(body, type=ToWorker)
    return message


def from_worker(body: bytes) -> FromWorker:
    """Raises: msgspec.DecodeError, also for what is no such message."""
    message: FromWorker = msgspec.msgpack.decode(body, type=FromWorker)
    return message


def shortened(text: str, characters: int = MESSAGE_CHARACTERS) -> str:
    """Fit for a frame: no longer than that, and without what UTF-8 cannot say."""
    clean = text[: characters + 1].encode(errors="replace").decode()
    return clean if len(clean) <= characters else clean[: characters - 1] + "…"
