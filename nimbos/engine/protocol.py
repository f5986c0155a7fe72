"""What server and engine process say to each other: MessagePack frames, each behind its length in four bytes.

Both sides come from the same release, so there is no version to agree on.
"""

from __future__ import annotations

import struct

import msgspec

from nimbos.config import Settings
from nimbos.errors import EngineFailed, InvalidRequest, NimbosError, PromptTooLong
from nimbos.types import Ask, AskClass, Chunk, ModelCard

LENGTH = struct.Struct("<I")
FRAME_BYTES_MAX = 256 * 1024 * 1024


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """First frame to the engine process. `lease_path`: "" for none. `table`: what is known of step times, encoded.
    `skip_libraries`: so many of the candidates crashed here before. `meter_descriptor`: of the meter file, inherited;
    None: nothing is counted there."""

    model_path: str
    model_id: str
    model_hash: str
    settings: Settings
    lease_path: str
    table: bytes = b""
    skip_libraries: int = 0
    meter_descriptor: int | None = None


class Prepare(msgspec.Struct, frozen=True, kw_only=True, tag="prepare"):
    number: int
    ask: Ask


class Forget(msgspec.Struct, frozen=True, kw_only=True, tag="forget"):
    """Nobody waits any more for the reply to the Prepare with this number."""

    number: int


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """`cached[branch]`: prompt tokens that the first run found in memory, when this one follows an engine's death.
    `begun[branch]`: how many of the tokens in `ask.emitted` were there when the ask was first made, and paid for then.
    """

    ask: Ask
    begun: dict[int, int] = msgspec.field(default_factory=dict)
    cached: dict[int, int] = msgspec.field(default_factory=dict)
    restarts: int = 0


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    ask_id: str


class Extend(msgspec.Struct, frozen=True, kw_only=True, tag="extend"):
    """See `TokenSource.extend`."""

    ask_id: str
    allowance_tokens: int | None
    last: bool


class StatsRequest(msgspec.Struct, frozen=True, kw_only=True, tag="stats?"):
    number: int


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """`refused`: libraries that did not fit, with reasons. `tier`: of the confinement."""

    card: ModelCard
    library: str
    variant: str
    features: str
    tier: str
    threads: int
    cells: int
    limit_tokens: int
    refused: tuple[str, ...] = ()


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag="load-failed"):
    unusable: bool
    reason: str


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """An error on its way to the caller. `have`/`limit` make a PromptTooLong; `param` an InvalidRequest."""

    message: str
    param: str | None = None
    have: int | None = None
    limit: int | None = None
    server_fault: bool = False

    def error(self) -> NimbosError:
        """The exception that it stands for."""
        if self.have is not None and self.limit is not None:
            return PromptTooLong(have=self.have, limit=self.limit)
        if self.server_fault:
            return EngineFailed(self.message)
        return InvalidRequest(self.message, param=self.param)


def refusal_of(error: NimbosError) -> Refusal:
    if isinstance(error, PromptTooLong):
        return Refusal(message=error.message, param=error.param, have=error.have, limit=error.limit)
    return Refusal(message=error.message, param=error.param, server_fault=not isinstance(error, InvalidRequest))


class PreparedReply(msgspec.Struct, frozen=True, kw_only=True, tag="prepared"):
    """`inputs`: token ids, one tuple for a prompt, or one for each input of an embedding."""

    number: int
    inputs: tuple[tuple[int, ...], ...] = ()
    refusal: Refusal | None = None


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    ask_id: str
    refusal: Refusal


class Admitted(msgspec.Struct, frozen=True, kw_only=True, tag="admitted"):
    ask_id: str
    branch: int
    cached: int


class Produced(msgspec.Struct, frozen=True, kw_only=True, tag="produced"):
    """Everything that one step gave, and how many asks still wait."""

    chunks: tuple[tuple[str, Chunk], ...]
    waiting: int


class Learned(msgspec.Struct, frozen=True, kw_only=True, tag="learned"):
    """Step times as learned so far, encoded; the server keeps them on disk (the engine process may not write)."""

    table: bytes


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """Counters since the process started, and gauges. `step_seconds[i]`: steps that took at most STEP_BUCKETS_S[i]."""

    number: int = 0
    waiting: dict[AskClass, int] = msgspec.field(default_factory=dict)
    live: dict[AskClass, int] = msgspec.field(default_factory=dict)
    cells_used: int = 0
    cells_total: int = 0
    cells_pinned: int = 0
    swapped_bytes: int = 0
    swapped_out_tokens: int = 0
    swapped_in_tokens: int = 0
    sequences_used: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: dict[AskClass, int] = msgspec.field(default_factory=dict)
    recomputed_tokens: int = 0
    computed_tokens: int = 0
    steps: int = 0
    step_rows: int = 0
    step_seconds: tuple[int, ...] = ()
    step_seconds_sum: float = 0.0
    overhead_seconds_sum: float = 0.0
    preemptions: int = 0
    stalls: int = 0
    evictions: int = 0
    guessed_tokens: int = 0
    guessed_right_tokens: int = 0
    account_ms: dict[str, float] = msgspec.field(default_factory=dict)
    resident_bytes: int = 0
    threads: int = 0
    contended: bool = False
    restarts: int = 0
    pid: int = 0


STEP_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, float("inf"))

ToEngine = Start | Prepare | Forget | Submit | Cancel | Extend | StatsRequest
FromEngine = Ready | LoadFailed | PreparedReply | Failed | Admitted | Produced | Learned | EngineStats

_encoder = msgspec.msgpack.Encoder()


def encode(message: ToEngine | FromEngine) -> bytes:
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
