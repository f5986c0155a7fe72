"""What a GGUF file says about its model, as far as a catalog, a scheduler or a memory budget wants to know it.
`gguf.py` reads the container; `memory.py` counts bytes with this. A split model is read from all of its files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from nimbos.errors import ModelUnusable
from nimbos.hub.ggml import ARCHITECTURES, FILE_TYPES, MAX_LAYERS
from nimbos.hub.gguf import GgufFile, Value, read_file

ModelKind = Literal["generate", "embed", "rerank"]

KV_VALUE_BYTES = 2  # the cache holds f16
_STATE_VALUE_BYTES = 4  # recurrent states are f32
_POOLING_RANK = 4
_SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
# A layer looks at a window unless its number is the last of a group this long; the file may say otherwise.
_WINDOW_GROUPS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4}
_ENCODERS = frozenset(
    ("bert", "eurobert", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe")
)


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Read from the file itself. The defaults describe a file that could not be read.

    `kv_bytes_per_cell`: of the layers that see the whole context; `window_bytes_per_cell`: of those that see
    only `window_tokens`; `state_bytes`: of recurrent layers, for each sequence.
    `template_sha256`: of the chat template's UTF-8, "" where there is none.
    """

    name: str = ""
    architecture: str = ""
    kind: ModelKind = "generate"
    parameters: int = 0
    quantisation: str = ""
    context_tokens: int = 0
    licence: str = ""
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    embedding_size: int = 0
    feed_forward_size: int = 0
    vocabulary: int = 0
    file_bytes: int = 0
    has_chat_template: bool = False
    template_sha256: str = ""
    kv_bytes_per_cell: int = 0
    window_bytes_per_cell: int = 0
    window_tokens: int = 0
    state_bytes: int = 0

    @property
    def supported(self) -> bool:
        """Whether the pinned libllama knows the architecture."""
        return self.architecture in ARCHITECTURES

    @property
    def keeps_cells(self) -> bool:
        """Whether what was computed stays in memory; else a row sees only those of its own pass."""
        return bool(self.kv_bytes_per_cell or self.window_bytes_per_cell)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gguf:
    """A readable model: `parts` in order (one, unless it is split) and the first file's metadata."""

    facts: ModelFacts
    metadata: Mapping[str, Value]
    parts: tuple[Path, ...]


def split_names(name: str) -> tuple[str, ...]:
    """All file names of the model that `name` is a part of; `name` alone where it is not split.

    Raises: ValueError for numbers that cannot be.
    """
    match = _SPLIT_NAME.match(name)
    if match is None:
        return (name,)
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count <= 999:
        raise ValueError(f"part {number} of {count}")
    return tuple(f"{match['stem']}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1))


def read_gguf(path: Path) -> Gguf:
    """Reads metadata and tensor tables, never weights.

    Raises: ModelUnusable naming the file and the reason. An architecture that libllama does not know is no such
    reason: see `ModelFacts.supported`.
    """
    try:
        names = split_names(path.name)
    except ValueError as error:
        raise ModelUnusable(str(path), reason=f"its name says that it is {error}") from None
    files = [read_file(path.with_name(name)) for name in names]
    _check_parts(files)
    return Gguf(
        facts=_facts(path, files),
        metadata=files[0].metadata,
        parts=tuple(file.path for file in files),
    )


def require_supported(path: Path, facts: ModelFacts) -> None:
    """Raises: ModelUnusable naming an architecture that the pinned libllama does not know."""
    if not facts.supported:
        raise ModelUnusable(str(path), reason=unsupported(facts.architecture))


def unsupported(architecture: str) -> str:
    return f"its architecture {architecture!r} is not known to this libllama"


def _check_parts(files: list[GgufFile]) -> None:
    if len(files) == 1:
        count = files[0].metadata.get("split.count", 0)
        if isinstance(count, int) and count > 1:
            reason = f"it is one of {count} parts and its name does not say which (…-00001-of-{count:05d}.gguf)"
            raise ModelUnusable(str(files[0].path), reason=reason)
        return
    for number, file in enumerate(files):
        have = file.metadata.get("split.no"), file.metadata.get("split.count")
        if have != (number, len(files)):
            reason = f"it should be part {number} of {len(files)} and says {have[0]} of {have[1]}"
            raise ModelUnusable(str(file.path), reason=reason)


class _Fields:
    """Typed access to metadata under the architecture's prefix; a wrong type is the file's fault."""

    def __init__(self, path: Path, metadata: Mapping[str, Value]) -> None:
        self.path = path
        self.metadata = metadata
        self.architecture = self.word("general.architecture")
        if not self.architecture:
            raise self.wrong("it names no architecture (general.architecture)")

    def wrong(self, reason: str) -> ModelUnusable:
        return ModelUnusable(str(self.path), reason=reason)

    def word(self, key: str) -> str:
        """Text that is safe to show: one line, printable, short."""
        value = self.metadata.get(key, "")
        if not isinstance(value, str):
            raise self.wrong(f"{key} is {value!r}, not text")
        return "".join(letter if letter.isprintable() else " " for letter in value[:200]).strip()

    def number(self, key: str, default: int = 0) -> int:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 40:
            raise self.wrong(f"{self.architecture}.{key} is {value!r}, not a count")
        return value

    def per_layer(self, key: str, layers: int, default: int) -> list[int]:
        """A number that may differ from layer to layer."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        if not isinstance(value, tuple):
            return [self.number(key, default)] * layers
        counts = [count for count in value if isinstance(count, int) and 0 <= count < 1 << 40]
        if len(counts) != len(value) or len(counts) < layers:
            raise self.wrong(f"{self.architecture}.{key} has {len(value)} numbers for {layers} layers")
        return counts[:layers]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cache:
    kv_bytes: int
    window_bytes: int
    window_tokens: int
    state_bytes: int


def _facts(path: Path, files: list[GgufFile]) -> ModelFacts:
    fields = _Fields(path, files[0].metadata)
    if not any(file.tensors for file in files):
        raise fields.wrong("it holds no tensors")
    layers = fields.number("block_count")
    if layers > MAX_LAYERS:
        raise fields.wrong(f"it claims {layers} layers; libllama takes at most {MAX_LAYERS}")
    heads = max(fields.per_layer("attention.head_count", layers, 0), default=0)
    embedding = fields.number("embedding_length")
    head_dim = fields.number("attention.key_length", embedding // heads if heads else 0)
    kv_heads = fields.per_layer("attention.head_count_kv", layers, heads)
    cache = _cache(fields, layers, kv_heads, head_dim)
    template = fields.metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise fields.wrong("its chat template is not text")
    return ModelFacts(
        name=fields.word("general.name") or path.stem,
        architecture=fields.architecture,
        kind=_kind(fields),
        parameters=sum(file.parameters for file in files),
        quantisation=_quantisation(fields, files),
        context_tokens=fields.number("context_length"),
        licence=fields.word("general.license"),
        layers=layers,
        heads=heads,
        kv_heads=max(kv_heads, default=0),
        head_dim=head_dim,
        embedding_size=embedding,
        feed_forward_size=max(fields.per_layer("feed_forward_length", layers, 0), default=0),
        vocabulary=files[0].lengths.get("tokenizer.ggml.tokens", 0),
        file_bytes=sum(file.file_bytes for file in files),
        has_chat_template=bool(template),
        template_sha256=hashlib.sha256(template.encode()).hexdigest() if template else "",
        kv_bytes_per_cell=cache.kv_bytes,
        window_bytes_per_cell=cache.window_bytes,
        window_tokens=cache.window_tokens,
        state_bytes=cache.state_bytes,
    )


def _kind(fields: _Fields) -> ModelKind:
    pooling = fields.number("pooling_type")
    if pooling == _POOLING_RANK:
        return "rerank"
    if pooling or fields.architecture in _ENCODERS:
        return "embed"
    named = f"{fields.word('general.name')} {fields.word('general.basename')}".lower()
    return "rerank" if "rerank" in named else "generate"  # as `engine/model.py` decides


def _quantisation(fields: _Fields, files: list[GgufFile]) -> str:
    """What the file says, or else the type that most of its bytes have."""
    number = fields.metadata.get("general.file_type")
    if isinstance(number, int) and number in FILE_TYPES:
        return FILE_TYPES[number]
    totals: dict[str, int] = {}
    for file in files:
        for kind, size in file.type_bytes.items():
            totals[kind] = totals.get(kind, 0) + size
    return max(totals, key=lambda kind: totals[kind])


def _cache(fields: _Fields, layers: int, kv_heads: list[int], head_dim: int) -> _Cache:
    """Bytes of memory that one token leaves behind, by kind of layer."""
    if fields.architecture in _ENCODERS or fields.metadata.get(f"{fields.architecture}.attention.causal") is False:
        return _Cache(kv_bytes=0, window_bytes=0, window_tokens=0, state_bytes=0)
    row = head_dim + fields.number("attention.value_length", head_dim)
    state = _state_bytes(fields)
    every = fields.number("full_attention_interval", 4 if fields.architecture == "qwen3next" else 0)
    window = fields.number("attention.sliding_window")
    group = _WINDOW_GROUPS.get(fields.architecture, 0) if window else 0
    totals = {"full": 0, "window": 0, "state": 0}
    for layer, count in enumerate(kv_heads):
        if count == 0 or (every and (layer + 1) % every):
            totals["state"] += state
        elif group and layer % group < group - 1:
            totals["window"] += count * row * KV_VALUE_BYTES
        else:
            totals["full"] += count * row * KV_VALUE_BYTES
    return _Cache(
        kv_bytes=totals["full"],
        window_bytes=totals["window"],
        window_tokens=window if group else 0,
        state_bytes=totals["state"],
    )


def _state_bytes(fields: _Fields) -> int:
    """Of one recurrent layer and sequence: a convolution's tail and a state matrix, or RWKV's two."""
    inner, state = fields.number("ssm.inner_size"), fields.number("ssm.state_size")
    tail = max(fields.number("ssm.conv_kernel", 1) - 1, 0) * (inner + 2 * fields.number("ssm.group_count") * state)
    embedding = fields.number("embedding_length")
    shifted = fields.number("token_shift_count", 2) * embedding if fields.number("wkv.head_size") else 0
    return (tail + inner * state + shifted + embedding * fields.number("wkv.head_size")) * _STATE_VALUE_BYTES
