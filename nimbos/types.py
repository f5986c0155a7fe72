"""The shared words: what an ask for tokens is, and what comes back.

These structs cross process borders (server ↔ engine) as MessagePack, so a change of one is a change of protocol.
Nothing here imports more of Nimbos than `errors`. Read `service.py` for the door that takes an `Ask`.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

import msgspec


def new_id(prefix: str) -> str:
    """A sortable id: `prefix_` and a UUIDv7 (RFC 9562) in 32 hexadecimal digits. It tells its moment to a quarter of a
    microsecond (section 6.2, method 3): what one server makes within a millisecond has the order it was made in."""
    milliseconds, rest_ns = divmod(time.time_ns(), 1_000_000)
    fraction = (rest_ns << 12) // 1_000_000
    return id_at(prefix, milliseconds, (fraction << 4).to_bytes(2, "big") + os.urandom(8))


def id_at(prefix: str, milliseconds: int, seed: bytes) -> str:
    """The id of a moment; the same for the same ten bytes of seed."""
    random = int.from_bytes(seed[:10], "big")
    value = (milliseconds << 80) | (0x7 << 76) | ((random >> 68) << 64) | (0b10 << 62) | (random & ((1 << 62) - 1))
    return f"{prefix}_{value:032x}"


class AskClass(StrEnum):
    """How urgent an ask is; lower classes wait for higher ones, but age."""

    INTERACTIVE = "interactive"
    AGENT = "agent"
    BATCH = "batch"


class Kind(StrEnum):
    GENERATE = "generate"
    EMBED = "embed"
    RERANK = "rerank"


class Channel(StrEnum):
    TEXT = "text"
    THINKING = "thinking"


class FinishReason(StrEnum):
    STOP = "stop"  # end of text, or a stop string
    LENGTH = "length"  # the limit on tokens, or the end of the context
    CANCELLED = "cancelled"


class Text(msgspec.Struct, frozen=True, tag="text"):
    """Text to tokenize. With `special`, control tokens written in it (`<|im_end|>`) become those tokens; without,
    they stay ordinary characters, which is how a user's words can never end their own turn."""

    text: str
    special: bool = True


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    ids: tuple[int, ...]


Part = Text | Tokens


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How a token is chosen from logits. Defaults choose from the untouched distribution.

    temperature 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0, `typical_p` 1 and neutral penalties are off.
    Penalties look at the prompt's and the answer's last `penalty_window` tokens.
    `logprobs`: None is off; k ≥ 0 gives each token's log-probability and those of the k likeliest.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_window: int = 256
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    seed: int = 0
    logprobs: int | None = None


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer (never the thinking) must look like. `source` is a JSON Schema, a regular expression,
    a Lark grammar in llguidance's dialect, or GBNF."""

    kind: Literal["json_schema", "regex", "lark", "gbnf"]
    source: str


class Thinking(msgspec.Struct, frozen=True, kw_only=True):
    """How the model's thinking is marked and how much of it there may be.

    `open` and `close` are the marks (`<think>`, `</think>`). With `started` the prompt ends inside an open block.
    After `budget_tokens` tokens of thinking the engine writes `farewell` itself, which contains `close`: the farewell's
    own tokens before `close` count as thinking too and are reserved from the budget, so it is never overrun.
    """

    open: str
    close: str
    budget_tokens: int
    started: bool = False
    farewell: str = ""


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request for tokens.

    `parts`: the prompt, joined in order (for `Kind.EMBED`: each part is an input of its own).
    `emitted[branch]`: token ids already produced; the answer goes on after them (text of them is not sent again).
    `finished`: branches that need nothing more (after a restart).
    `limit_tokens`: at most so many tokens of answer in each branch, thinking included; None: to the end of the context.
    `best_of`/`n`: `n` branches share the prompt and are sampled apart.
    `allowance_tokens`: what is paid for so far, in each branch, counted like `limit_tokens`; a branch that has used it
    waits until the source is told more (`TokenSource.extend`), or with `allowance_last` ends there. None: no budget
    holds it.
    `paid_prompt_tokens`, `paid_output_tokens`: what an ask that this one goes on with has paid for already, of the
    prompt and, of all branches together, of tokens behind `emitted` that were lost; computing them again is
    `recomputed`.
    `meter_row`: the row of the meter file that is this ask's; None: nothing is counted there.
    For `Kind.RERANK` `parts[0]` is the query and each further part a document; their scores come as `ScoreChunk`s.
    `pin_s`: the prompt's prefix of `pin_tokens` tokens is kept for so long (explicit caching).
    `weight`: its account's share of the scheduler; twice the weight is twice the computing while others wait, too.
    `process`: whose part of a longer run it is, "" for none; the runs that have had little go first.
    `stop_ids`: tokens that end a branch, outside of thinking and behind `min_tokens`; their text is not sent.
    """

    id: str
    account: str
    model: str
    kind: Kind = Kind.GENERATE
    parts: tuple[Part, ...] = ()
    emitted: dict[int, tuple[int, ...]] = msgspec.field(default_factory=dict)
    finished: tuple[int, ...] = ()
    n: int = 1
    ask_class: AskClass = AskClass.INTERACTIVE
    limit_tokens: int | None = None
    allowance_tokens: int | None = None
    allowance_last: bool = False
    paid_prompt_tokens: int = 0
    paid_output_tokens: int = 0
    meter_row: int | None = None
    pin_s: float = 0.0
    pin_tokens: int = 0
    weight: float = 1.0
    process: str = ""
    min_tokens: int = 0
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    thinking: Thinking | None = None

    @property
    def unpaid_pin_tokens(self) -> int:
        """Of the prefix that is to be kept, what is behind the part of the prompt that is paid for already."""
        return max(0, self.pin_tokens - self.paid_prompt_tokens)


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    id: int
    piece: bytes
    logprob: float


class ChosenLogprob(msgspec.Struct, frozen=True, array_like=True):
    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


class TokenChunk(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """Some tokens of one branch. `text` is whole characters only, and lags behind `ids` while a character or a
    possible stop string is incomplete. Control tokens have no text."""

    branch: int
    ids: tuple[int, ...]
    text: str
    channel: Channel = Channel.TEXT
    logprobs: tuple[ChosenLogprob, ...] | None = None


class VectorChunk(msgspec.Struct, frozen=True, kw_only=True, tag="vector"):
    """`values`: float32, little endian, of the input number `index`."""

    index: int
    values: bytes


class ScoreChunk(msgspec.Struct, frozen=True, kw_only=True, tag="score"):
    """How well the document number `index` answers the query, from 0 to 1."""

    index: int
    score: float


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens, by meter. `cached` is a part of `input`, `thinking` a part of `output`.
    `recomputed`: computed again, after an engine's death, after giving way or for another branch; never billed."""

    input: int = 0
    cached: int = 0
    output: int = 0
    thinking: int = 0
    recomputed: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            input=self.input + other.input,
            cached=self.cached + other.cached,
            output=self.output + other.output,
            thinking=self.thinking + other.thinking,
            recomputed=self.recomputed + other.recomputed,
        )


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """How an ask was served. `mean_batch`: rows in the same step as this ask's tokens, on average."""

    queue_ms: int = 0
    compute_ms: int = 0
    steps: int = 0
    mean_batch: float = 0.0
    preemptions: int = 0
    restarts: int = 0


class Final(msgspec.Struct, frozen=True, kw_only=True, tag="final"):
    """The end of one branch. `usage` is that branch's own part (the prompt counts on branch 0), so a sum over
    branches is the ask's usage. `stopped_by` is the stop string, if one ended it. `budget_ended`: the branch was ended
    (with LENGTH) because nothing more was reserved for it."""

    branch: int
    reason: FinishReason
    usage: Usage
    receipt: Receipt = Receipt()
    stopped_by: str | None = None
    budget_ended: bool = False


Chunk = TokenChunk | VectorChunk | ScoreChunk | Final


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a source says about its model; everything `chat` needs to turn messages into a prompt.

    `control`: the vocabulary's control tokens as text. `bos`/`eos`: as text, "" where there is none.
    `user_defined`: those in `control` that an answer still shows as text (Qwen's `<tool_call>`); None: not known.
    `model_hash`: of the weights file. `fim`: prefix, suffix and middle marks, where the model has them.
    """

    id: str
    model_hash: str
    architecture: str
    context_tokens: int
    n_vocab: int = 0
    kind: Kind = Kind.GENERATE
    chat_template: str = ""
    bos: str = ""
    eos: str = ""
    control: tuple[str, ...] = ()
    user_defined: tuple[str, ...] | None = None
    fim: tuple[str, str, str] | None = None
    shares_prefixes: bool = True
    embedding_size: int = 0
    created: int = 0


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """An ask whose prompt the source has counted; give `ask` (not the original) to `generate`."""

    ask: Ask
    prompt_tokens: int


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Who pays, and whose prefixes are shared: a project, with what the key that proved it may do.

    `key`, `organisation`, `user`: ids, "" where there is none. `scopes`: `admin`, `class:NAME`, `programs:code`.
    `models`, `routes`: those allowed, None for all; `denied_models` are not, whatever `models` says. `weight`: its
    share of the scheduler, 1.0 is everybody's.
    """

    id: str
    name: str
    organisation: str = ""
    key: str = ""
    key_name: str = ""
    user: str = ""
    scopes: frozenset[str] = frozenset()
    models: frozenset[str] | None = None
    denied_models: frozenset[str] = frozenset()
    routes: frozenset[str] | None = None
    weight: float = 1.0


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where an ask came from, for the ledger: the route's path, and the process or batch it belongs to."""

    route: str = ""
    process: str = ""
    batch: str = ""


@dataclass(slots=True, eq=False)
class Admission:
    """Filled by the service when an ask is let in: `headers` are the `x-ratelimit-…` ones of its answer,
    `prompt_tokens` what the source has counted."""

    headers: dict[str, str] = field(default_factory=dict)
    prompt_tokens: int = 0


class TokenSource(Protocol):
    """Something that answers asks: an engine process, a scripted model, later an upstream engine.

    Closing the iterator of `generate` cancels the ask and frees what it held.
    """

    async def describe(self) -> ModelCard: ...

    async def prepare(self, ask: Ask) -> Prepared:
        """Counts (and where it can, tokenizes) the prompt.

        Raises: PromptTooLong when not even one token of answer fits; InvalidRequest for a grammar that is wrong.
        """
        ...

    def generate(self, ask: Ask) -> AsyncIterator[Chunk]:
        """Raises: Overloaded when the inbox is full; EngineFailed."""
        ...

    def extend(self, ask_id: str, *, allowance_tokens: int | None, last: bool) -> None:
        """More is paid for: each branch may go on to `allowance_tokens`. With `last` nothing follows: a branch that
        reaches it ends with LENGTH and `budget_ended`. An ask that is over is no error."""
        ...

    async def close(self) -> None: ...
