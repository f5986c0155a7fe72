"""GGUF files made byte by byte, so that a test knows what stands where and can break it there."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def strings(values: list[str]) -> bytes:
    return struct.pack("<IQ", STRING, len(values)) + b"".join(text(value) for value in values)


def numbers(values: list[int]) -> bytes:
    return struct.pack("<IQ", U32, len(values)) + struct.pack(f"<{len(values)}I", *values)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def default_pairs() -> list[bytes]:
    return [
        pair("general.architecture", STRING, text("llama")),
        pair("general.name", STRING, text("Tiny")),
        pair("general.license", STRING, text("mit")),
        pair("general.file_type", U32, u32(0)),
        pair("llama.block_count", U32, u32(2)),
        pair("llama.context_length", U32, u32(128)),
        pair("llama.embedding_length", U32, u32(8)),
        pair("llama.feed_forward_length", U32, u32(16)),
        pair("llama.attention.head_count", U32, u32(2)),
        pair("llama.attention.head_count_kv", U32, u32(1)),
        pair("tokenizer.ggml.tokens", ARRAY, strings(["a", "b", "cc"])),
        pair("tokenizer.chat_template", STRING, text("{{ messages }}")),
    ]


@dataclass
class Made:
    """The parts of a file; `bytes()` puts them together. `data`: of all tensors."""

    pairs: list[bytes] = field(default_factory=default_pairs)
    tensors: list[bytes] = field(default_factory=lambda: [tensor("w", [8, 4])])
    data: bytes = bytes(8 * 4 * 4)
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int, int] | None = None
    alignment: int = 32

    def head(self) -> bytes:
        counts = self.counts or (len(self.tensors), len(self.pairs))
        head = self.magic + struct.pack("<IQQ", self.version, *counts)
        return head + b"".join(self.pairs) + b"".join(self.tensors)

    def bytes(self) -> bytes:
        head = self.head()
        return head + bytes(-len(head) % self.alignment) + self.data


def sized(count: int) -> bytes:
    """A valid model of about `count` bytes, different at each place."""
    rows = max(count // 32, 1)
    data = b"".join(struct.pack("<8I", *([row] * 8)) for row in range(rows))
    return Made(tensors=[tensor("w", [8, rows])], data=data).bytes()
