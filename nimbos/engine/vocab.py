"""One model's vocabulary, as plain data.

Knows nothing of libllama; `model.py` builds it once per loaded model, `grammar.py` and `answer.py` read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocab:
    """`pieces[id]`: the bytes of each token; of a control token its literal text (`b"<|im_end|>"`).

    A piece may hold a part of a UTF-8 character, and may be empty.
    `control`: ids that have no text in an answer: control tokens, and what a model must never say (unknown, unused).
    User-defined tokens (Qwen's `<think>`, `<tool_call>`) are text and not in it.
    `eog`: ids that end a generation. `tokenize(text, parse_special)` adds neither a bos nor a leading space, may be
    called from any thread, and with `parse_special` reads control tokens out of the text.
    """

    pieces: tuple[bytes, ...]
    control: frozenset[int]
    eog: frozenset[int]
    eos: int | None
    bos: int | None
    tokenize: Callable[[bytes, bool], list[int]]

    def __len__(self) -> int:
        return len(self.pieces)

    def join(self, ids: tuple[int, ...] | list[int]) -> bytes:
        """The bytes that these tokens write, control tokens as their literal text."""
        return b"".join([self.pieces[token] for token in ids])
