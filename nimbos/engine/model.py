"""One loaded model: tokenize, decode a batch, copy and drop sequences.

Knows the C library and nothing of asks. `context.py` decides which sequences exist, `scheduler.py` which rows go into a
batch; this performs it. Read `worker.py` next.

All KV lives in one pool (`kv_unified`), so copying a sequence is a bit update in each cell and copies no memory.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nimbos.engine import llama
from nimbos.engine.llama import Library
from nimbos.engine.vocab import Vocab
from nimbos.errors import EngineFailed, ModelUnusable
from nimbos.types import Kind

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
SEQUENCES_MAX = 256  # LLAMA_MAX_SEQ at compile time


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """`cells`: tokens of KV for all sequences together. `sequences`: ids in use, at most 256.
    `step_tokens`: longest batch. `micro_tokens`: longest pass inside a batch; an abort loses at most one.
    `flash_attention`: where the library can."""

    cells: int
    sequences: int
    threads: int
    step_tokens: int = 512
    micro_tokens: int = 256
    flash_attention: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Consecutive tokens of one sequence in a batch: `tokens` stand at positions `start, start + 1, …`.
    With `logits`, the last of them gets a row of logits."""

    sequence: int
    start: int
    tokens: Sequence[int]
    logits: bool


class Model:
    """Owns the C model and context; `close` frees both. Not thread-safe, except `tokenize`."""

    def __init__(self, library: Library, path: Path, options: ModelOptions) -> None:
        """Raises: ModelUnusable with libllama's own reason; the library stays usable."""
        self.library = library
        self.path = path
        self.options = options
        library.errors.clear()
        params = library.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = library.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise ModelUnusable(str(path), reason=library.last_error())
        self._vocab = library.llama_model_get_vocab(self._model)
        self.n_vocab: int = library.llama_vocab_n_tokens(self._vocab)
        self.context_tokens: int = library.llama_model_n_ctx_train(self._model)
        self.embedding_size: int = library.llama_model_n_embd(self._model)
        self.kind = self._kind()
        self.causal = self._architecture_value("attention.causal") != "false"
        has_head = not self.causal or bool(self.head_labels)
        # whether an output is one vector or score of a sequence, instead of logits
        self.pools = self.kind is Kind.EMBED or (self.kind is Kind.RERANK and has_head)
        self.shares_prefixes = not (
            library.llama_model_is_recurrent(self._model)
            or library.llama_model_is_hybrid(self._model)
            or library.llama_model_n_swa(self._model) > 0
            or self.kind is Kind.EMBED
            or not self.causal
        )
        # a recurrent state has no tail to take off, so a step of such a model is never aborted
        self.can_truncate = not (
            library.llama_model_is_recurrent(self._model) or library.llama_model_is_hybrid(self._model)
        )
        self._context = 0
        self._vocabulary: Vocab | None = None

    def open_context(self, flag: ctypes.Array[ctypes.c_char] | None = None) -> None:
        """Allocates KV and buffers. Threads that compute start here or in the first decode, so confine before it.
        `flag`: two bytes, both 0, which others may reach as well: a step is stopped while the first is not 0.

        Raises: ModelUnusable when memory does not suffice.
        """
        library, options = self.library, self.options
        params = library.llama_context_default_params()
        params.n_ctx = options.cells
        params.n_batch = max(options.step_tokens, options.sequences)  # libllama asks for an output of each at once
        params.n_ubatch = options.step_tokens if self.pools else min(options.micro_tokens, options.step_tokens)
        params.n_seq_max = min(options.sequences, SEQUENCES_MAX)
        params.n_threads = params.n_threads_batch = options.threads
        params.no_perf = True
        params.kv_unified = True
        params.swa_full = False
        params.flash_attn_type = llama.FLASH_ATTENTION_AUTO if options.flash_attention else llama.FLASH_ATTENTION_OFF
        params.embeddings = self.pools
        self._context = library.llama_init_from_model(self._model, params)
        if not self._context:
            raise ModelUnusable(str(self.path), reason=f"no context of {options.cells} cells: {library.last_error()}")
        self.cells: int = library.llama_n_ctx(self._context)
        self._memory = library.llama_get_memory(self._context)
        self._abort = flag if flag is not None else ctypes.create_string_buffer(b"\0\0", 2)
        library.llama_set_abort_callback(self._context, llama.strlen_address(), ctypes.addressof(self._abort))
        pool = library.threadpool(options.threads, poll=THREADPOOL_POLL)
        if pool is not None:
            library.llama_attach_threadpool(self._context, pool, pool)
        self._threads = options.threads
        self._allocate_batch(options.step_tokens)

    def _allocate_batch(self, rows: int) -> None:
        self._token = np.zeros(rows, np.int32)
        self._pos = np.zeros(rows, np.int32)
        self._n_seq = np.ones(rows, np.int32)
        self._seq = np.zeros(rows, np.int32)
        # seq_id[i] is a pointer to row i's sequence ids; each row has one, so the table never changes
        self._seq_pointers = self._seq.ctypes.data + 4 * np.arange(rows, dtype=np.uint64)
        self._wanted = np.zeros(rows, np.int8)
        self._batch = llama.Batch(
            token=self._token.ctypes.data,
            pos=self._pos.ctypes.data,
            n_seq_id=self._n_seq.ctypes.data,
            seq_id=self._seq_pointers.ctypes.data,
            logits=self._wanted.ctypes.data,
        )

    def _kind(self) -> Kind:
        library = self.library
        if library.llama_model_has_encoder(self._model) or library.llama_model_is_diffusion(self._model):
            raise ModelUnusable(str(self.path), reason="encoder-decoder and diffusion models are not served yet")
        pooling = self._architecture_value("pooling_type")
        if pooling == str(llama.POOLING_RANK):
            return Kind.RERANK
        if pooling not in (None, "0") or self._architecture_value("attention.causal") == "false":
            return Kind.EMBED
        named = f"{self.metadata('general.name')} {self.metadata('general.basename')}".lower()
        return Kind.RERANK if "rerank" in named else Kind.GENERATE  # as `hub/facts.py` decides

    def _architecture_value(self, key: str) -> str | None:
        return self.metadata(f"{self.metadata('general.architecture') or ''}.{key}")

    def close(self) -> None:
        if self._context:
            self.library.llama_free(self._context)
            self._context = 0
            del self._abort  # nobody looks at it any more
        if self._model:
            self.library.llama_model_free(self._model)
            self._model = 0

    def metadata(self, key: str) -> str | None:
        """A scalar of the GGUF as text, or None where the file has none."""
        buffer = ctypes.create_string_buffer(4096)
        length = self.library.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        if length < 0:
            return None
        if length >= len(buffer):
            buffer = ctypes.create_string_buffer(length + 1)
            self.library.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    @property
    def chat_template(self) -> str:
        template = self.library.llama_model_chat_template(self._model, None)
        return template.decode(errors="replace") if template else ""

    @property
    def rerank_template(self) -> str:
        template = self.library.llama_model_chat_template(self._model, b"rerank")
        return template.decode(errors="replace") if template else ""

    @property
    def head_outputs(self) -> int:
        return int(self.library.llama_model_n_cls_out(self._model))

    @property
    def head_labels(self) -> tuple[str, ...]:
        """What the outputs of the classification head mean, where the file says it."""
        found = (self.library.llama_model_cls_label(self._model, i) for i in range(min(self.head_outputs, 1024)))
        return tuple(label.decode(errors="replace") for label in found if label is not None)

    @property
    def weight_bytes(self) -> int:
        return int(self.library.llama_model_size(self._model))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V (f16) that one cell takes over all layers, from the GGUF's own numbers."""
        arch = self.metadata("general.architecture") or ""
        number = self._number
        layers, heads = number(f"{arch}.block_count", 1), number(f"{arch}.attention.head_count", 1)
        kv_heads = number(f"{arch}.attention.head_count_kv", heads)
        key = number(f"{arch}.attention.key_length", self.embedding_size // max(1, heads))
        value = number(f"{arch}.attention.value_length", key)
        return 2 * layers * kv_heads * (key + value)

    @property
    def attention_heads(self) -> int:
        """Of all layers together."""
        arch = self.metadata("general.architecture") or ""
        return self._number(f"{arch}.block_count", 1) * self._number(f"{arch}.attention.head_count", 1)

    def _number(self, key: str, default: int) -> int:
        text = self.metadata(key)
        return int(text) if text is not None and text.isdecimal() else default

    @property
    def adds_bos(self) -> bool:
        return bool(self.library.llama_vocab_get_add_bos(self._vocab))

    @property
    def adds_eos(self) -> bool:
        return bool(self.library.llama_vocab_get_add_eos(self._vocab))

    @property
    def separator(self) -> int | None:
        return _token_or_none(self.library.llama_vocab_sep(self._vocab))

    @property
    def adds_separator(self) -> bool:
        return bool(self.library.llama_vocab_get_add_sep(self._vocab))

    @property
    def vocab(self) -> Vocab:
        """Pieces and marks of the vocabulary, read once (0.2 s for 150,000 tokens)."""
        if self._vocabulary is None:
            self._vocabulary = self._read_vocab()
        return self._vocabulary

    def _read_vocab(self) -> Vocab:
        library, vocab = self.library, self._vocab
        piece_of, attribute_of, is_eog = (
            library.llama_token_to_piece,
            library.llama_vocab_get_attr,
            library.llama_vocab_is_eog,
        )
        buffer = ctypes.create_string_buffer(512)
        pieces: list[bytes] = []
        control: set[int] = set()
        eog: set[int] = set()
        for token in range(self.n_vocab):
            length = piece_of(vocab, token, buffer, 512, 0, True)
            pieces.append(buffer.raw[:length] if length >= 0 else (library.llama_vocab_get_text(vocab, token) or b""))
            if attribute_of(vocab, token) & (llama.TOKEN_CONTROL | llama.TOKEN_UNKNOWN):
                control.add(token)
            if is_eog(vocab, token):
                eog.add(token)
        return Vocab(
            pieces=tuple(pieces),
            control=frozenset(control),
            eog=frozenset(eog),
            eos=_token_or_none(library.llama_vocab_eos(vocab)),
            bos=_token_or_none(library.llama_vocab_bos(vocab)),
            tokenize=self.tokenize,
        )

    def user_defined(self) -> tuple[str, ...]:
        """Tokens added as whole strings (`<think>`, `<tool_call>`), which the tokenizer also matches in plain text."""
        attribute_of = self.library.llama_vocab_get_attr
        return tuple(
            piece.decode(errors="replace")
            for token, piece in enumerate(self.vocab.pieces)
            if attribute_of(self._vocab, token) & llama.TOKEN_USER_DEFINED
        )

    def fim_marks(self) -> tuple[str, str, str] | None:
        """Text of the fill-in-the-middle marks (prefix, suffix, middle), where the vocabulary has all three."""
        library = self.library
        ids = [
            library.llama_vocab_fim_pre(self._vocab),
            library.llama_vocab_fim_suf(self._vocab),
            library.llama_vocab_fim_mid(self._vocab),
        ]
        if min(ids) < 0:
            return None
        prefix, suffix, middle = (self.vocab.pieces[i].decode(errors="replace") for i in ids)
        return prefix, suffix, middle

    def tokenize(self, text: bytes, special: bool) -> list[int]:
        """Token ids of UTF-8 `text`; with `special`, control tokens written in it become those. Thread-safe."""
        capacity = len(text) + 16
        out = np.empty(capacity, np.int32)
        count = self.library.llama_tokenize(self._vocab, text, len(text), out.ctypes.data, capacity, False, special)
        if count < 0:
            raise EngineFailed(f"The tokenizer needs {-count} tokens for {len(text)} bytes.")
        return out[:count].tolist()  # type: ignore[no-any-return]

    def decode(self, rows: Sequence[Rows], *, every: bool = False) -> int:
        """Computes the rows; afterwards `logits()` has one row for each `Rows` with logits, in their order.
        With `every`, all tokens are outputs, as pooled embeddings want it.

        Returns: llama.DECODED, or llama.ABORTED after `abort()` — then what was computed is unknown: ask
        `position_end` for each sequence and drop the rest.
        Raises: EngineFailed when cells ran out (a bug of the caller's budget) or the library failed.
        """
        at = 0
        self._wanted[: self._batch_rows(rows)] = every
        for row in rows:
            end = at + len(row.tokens)
            self._token[at:end] = row.tokens
            self._pos[at:end] = np.arange(row.start, row.start + len(row.tokens), dtype=np.int32)
            self._seq[at:end] = row.sequence
            if row.logits:
                self._wanted[end - 1] = 1
            at = end
        self._batch.n_tokens = at
        result: int = self.library.llama_decode(self._context, self._batch)
        if result in (llama.DECODED, llama.ABORTED):
            return result
        reason = "no free cells" if result == llama.NO_CELLS else self.library.last_error()
        raise EngineFailed(f"llama_decode of {at} rows returned {result}: {reason}")

    def _batch_rows(self, rows: Sequence[Rows]) -> int:
        total = sum(len(row.tokens) for row in rows)
        if total > self.options.step_tokens:
            raise EngineFailed(f"A step of {total} rows was planned, the limit is {self.options.step_tokens}.")
        return total

    def use_threads(self, threads: int) -> None:
        """From the next step on. At most the number that the options gave."""
        if threads != self._threads:
            self.library.llama_set_n_threads(self._context, threads, threads)
            self._threads = threads

    def arm(self) -> None:
        """Takes back an `abort`. Call it before looking for new work, so that an abort after that look is not lost."""
        self._abort[0] = b"\0"

    def abort(self) -> None:
        """Stops a running decode within one graph node (about 10 ms), or the next one. Callable from another thread."""
        self._abort[0] = b"x"

    def logits(self, rows: int) -> Floats:
        """A view (rows, n_vocab) on the library's own buffer, valid until the next decode; writing to it is allowed."""
        pointer = self.library.llama_get_logits(self._context)
        floats = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(floats, (rows, self.n_vocab))

    def embedding(self, sequence: int) -> Floats:
        """The pooled vector of a sequence after `decode`, or its scores, copied, not normalised."""
        size = self.head_outputs if self.kind is Kind.RERANK else self.embedding_size
        pointer = self.library.llama_get_embeddings_seq(self._context, sequence)
        if not pointer:
            raise EngineFailed("This model gave no pooled embedding.")
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (size,)).copy()

    def copy(self, source: int, target: int, end: int, *, start: int = 0) -> None:
        """Sequence `target` gets positions [start, end) of `source` too; no memory is copied."""
        self.library.llama_memory_seq_cp(self._memory, source, target, start, end)

    def save(self, sequence: int) -> Bytes:
        """All that is in memory of a sequence, as bytes for `load`. Raises: EngineFailed."""
        size = self.library.llama_state_seq_get_size(self._context, sequence)
        state = np.empty(size, np.uint8)
        if self.library.llama_state_seq_get_data(self._context, state.ctypes.data, size, sequence) != size:
            raise EngineFailed(f"The state of sequence {sequence} could not be written: {self.library.last_error()}")
        return state

    def load(self, sequence: int, state: Bytes) -> bool:
        """Puts back what `save` gave, as this sequence, in cells of its own. Returns: False when it is not taken, which
        leaves the sequence empty."""
        taken = self.library.llama_state_seq_set_data(self._context, state.ctypes.data, state.nbytes, sequence)
        if taken != state.nbytes:
            self.drop(sequence)
        return bool(taken == state.nbytes)

    def drop(self, sequence: int, start: int = 0) -> None:
        """Forgets positions [start, ∞) of a sequence; a cell that no other sequence holds becomes free."""
        if not self.library.llama_memory_seq_rm(self._memory, sequence, start, -1):
            if start > 0:
                raise EngineFailed("This model cannot take back a part of a sequence.")
            self.library.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def clear(self) -> None:
        self.library.llama_memory_clear(self._memory, False)

    def position_end(self, sequence: int) -> int:
        """One past the last position in memory; 0 for an empty sequence."""
        return int(self.library.llama_memory_seq_pos_max(self._memory, sequence)) + 1


THREADPOOL_POLL = 0  # of 100: no slower on a quiet machine, and gives way to other processes at once


def _token_or_none(token: int) -> int | None:
    return token if token >= 0 else None
