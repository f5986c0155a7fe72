"""libllama by ctypes: the calls we use, for one pinned layout of its parameter structs.

Knows how to find, load and check a library, and nothing of asks or schedules. `model.py` is the only caller.

The layout of `llama_context_params` changes almost monthly and a wrong one does not crash, it computes nonsense, so a
library is refused unless its own default values stand where this file expects them. Pinned: sizeof 160, as in the
wheel xllamacpp 2026.9.11063, the npm package @node-llama-cpp/* 3.22.1 and llama-cpp-python 0.3.36.
Source: llama.h of those releases.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
import re
from collections import deque
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from nimbos.errors import EngineFailed

TOKEN_CONTROL = 1 << 3  # llama_token_attr
TOKEN_UNKNOWN = 1 << 0
TOKEN_USER_DEFINED = 1 << 4
POOLING_UNSPECIFIED, POOLING_NONE, POOLING_MEAN, POOLING_CLS, POOLING_LAST, POOLING_RANK = -1, 0, 1, 2, 3, 4
FLASH_ATTENTION_AUTO, FLASH_ATTENTION_OFF, FLASH_ATTENTION_ON = -1, 0, 1

DECODED, NO_CELLS, ABORTED = 0, 1, 2  # what llama_decode returns; below zero is a failure


class ContextParams(ctypes.Structure):
    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class ModelParams(ctypes.Structure):
    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", c_void_p),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", c_void_p),
    ]


class ThreadpoolParams(ctypes.Structure):
    _fields_ = [
        ("cpumask", c_bool * 512),
        ("n_threads", c_int32),
        ("prio", c_int32),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    ]


class _Overlong(ctypes.Structure):
    """A by-value return buffer longer than any layout, so that a grown struct cannot write past it."""

    _fields_ = [("bytes", ctypes.c_ubyte * 512)]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_model_n_embd": (c_int32, [c_void_p]),
    "llama_model_n_layer": (c_int32, [c_void_p]),
    "llama_model_n_swa": (c_int32, [c_void_p]),
    "llama_model_meta_val_str": (c_int32, [c_void_p, c_char_p, c_char_p, c_size_t]),
    "llama_model_size": (c_uint64, [c_void_p]),
    "llama_model_n_params": (c_uint64, [c_void_p]),
    "llama_model_chat_template": (c_char_p, [c_void_p, c_char_p]),
    "llama_model_n_cls_out": (c_uint32, [c_void_p]),
    "llama_model_cls_label": (c_char_p, [c_void_p, c_uint32]),
    "llama_model_is_recurrent": (c_bool, [c_void_p]),
    "llama_model_is_hybrid": (c_bool, [c_void_p]),
    "llama_model_has_encoder": (c_bool, [c_void_p]),
    "llama_model_has_decoder": (c_bool, [c_void_p]),
    "llama_model_is_diffusion": (c_bool, [c_void_p]),
    "llama_pooling_type": (c_int32, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_get_attr": (c_int32, [c_void_p, c_int32]),
    "llama_vocab_get_text": (c_char_p, [c_void_p, c_int32]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_vocab_sep": (c_int32, [c_void_p]),
    "llama_vocab_get_add_sep": (c_bool, [c_void_p]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_vocab_get_add_eos": (c_bool, [c_void_p]),
    "llama_vocab_fim_pre": (c_int32, [c_void_p]),
    "llama_vocab_fim_suf": (c_int32, [c_void_p]),
    "llama_vocab_fim_mid": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, c_void_p, c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_encode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (c_void_p, [c_void_p]),
    "llama_get_embeddings_seq": (c_void_p, [c_void_p, c_int32]),
    "llama_set_abort_callback": (None, [c_void_p, c_void_p, c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_attach_threadpool": (None, [c_void_p, c_void_p, c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_memory_seq_pos_max": (c_int32, [c_void_p, c_int32]),
    "llama_state_seq_get_size": (c_size_t, [c_void_p, c_int32]),
    "llama_state_seq_get_data": (c_size_t, [c_void_p, c_void_p, c_size_t, c_int32]),
    "llama_state_seq_set_data": (c_size_t, [c_void_p, c_void_p, c_size_t, c_int32]),
    "llama_print_system_info": (c_char_p, []),
}

_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_LOG_ERROR = 4


class Library:
    """One loaded libllama. Attributes named like the C functions call them (the GIL is released in each call).

    `folder` is where it came from, `variant` the CPU backend it chose by itself ("" where it has one only).
    """

    def __init__(self, path: Path) -> None:
        """`path`: a folder with libllama and libggml, or one shared object that holds everything.

        Raises: EngineFailed naming the path and what does not fit.
        """
        self.folder = path if path.is_dir() else path.parent
        self.errors: deque[str] = deque(maxlen=8)
        self._cpu: ctypes.CDLL | None = None
        self.variant = ""
        self._log = _LOG_CALLBACK(self._keep_log)
        try:
            self._lib = self._open_folder(path) if path.is_dir() else ctypes.CDLL(str(path))
        except OSError as error:
            raise EngineFailed(f"{path}: the shared library cannot be loaded: {error}") from error
        self._bind(path)
        self._check_layout(path)
        self.llama_log_set(ctypes.cast(self._log, c_void_p), None)
        self.llama_backend_init()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"libllama has no bound function {name}")

    def _open_folder(self, folder: Path) -> ctypes.CDLL:
        base, ggml = _one(folder, r"libggml-base(\..*)?\.(so|dylib).*"), _one(folder, r"libggml(\..*)?\.(so|dylib).*")
        log_set = ctypes.CDLL(str(base), mode=ctypes.RTLD_GLOBAL).ggml_log_set
        log_set.restype, log_set.argtypes = None, [c_void_p, c_void_p]
        log_set(ctypes.cast(self._log, c_void_p), None)
        backends = ctypes.CDLL(str(ggml), mode=ctypes.RTLD_GLOBAL)
        variants = [f for f in folder.iterdir() if re.fullmatch(r"libggml-cpu-[a-z0-9]+\.(so|dylib)", f.name)]
        if variants:
            backends.ggml_backend_load_all_from_path.argtypes = [c_char_p]
            backends.ggml_backend_load_all_from_path.restype = None
            backends.ggml_backend_load_all_from_path(os.fsencode(folder))
            chosen = _mapped(variants)
            if chosen is None:
                raise EngineFailed(f"{folder}: none of its CPU backends runs on this processor.")
            self.variant = chosen.stem.removeprefix("libggml-cpu-")
            self._cpu = ctypes.CDLL(str(chosen))
        return ctypes.CDLL(str(_one(folder, r"libllama(\..*)?\.(so|dylib).*")))

    def _bind(self, path: Path) -> None:
        for name, (result, arguments) in _SIGNATURES.items():
            try:
                function = getattr(self._lib, name)
            except AttributeError as error:
                raise EngineFailed(f"{path}: this libllama has no {name}; use the pinned release.") from error
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def _check_layout(self, path: Path) -> None:
        for name, expected, size in (
            ("llama_context_default_params", _CONTEXT_DEFAULTS, ctypes.sizeof(ContextParams)),
            ("llama_model_default_params", _MODEL_DEFAULTS, ctypes.sizeof(ModelParams)),
        ):
            function = self._lib[name]
            function.restype, function.argtypes = _Overlong, []
            seen = bytes(function().bytes)
            for offset, want in expected:
                if seen[offset : offset + len(want)] != want:
                    raise EngineFailed(
                        f"{path}: {name} has another layout than the pinned one of {size} bytes "
                        f"(at byte {offset}: {seen[offset : offset + len(want)].hex()}, expected {want.hex()}). "
                        "Install the pinned release with `nimbos engine install`."
                    )

    def _keep_log(self, level: int, text: bytes | None, _user: object) -> None:
        if level == _LOG_ERROR and text:
            self.errors.append(text.decode(errors="replace").strip())

    def last_error(self) -> str:
        """What libllama itself said last, for messages to people."""
        return "; ".join(self.errors) or "libllama gave no reason"

    def threadpool(self, threads: int, *, poll: int) -> int | None:
        """A pool of ggml's own threads that spins little (`poll` 0…100), or None where the build uses OpenMP.

        The default polling collapses to a fifth of the speed when anything else uses the cores.
        """
        if self._cpu is None or not hasattr(self._cpu, "ggml_threadpool_new"):
            return None
        params = ThreadpoolParams(n_threads=threads, prio=0, poll=poll, strict_cpu=False, paused=False)
        self._cpu.ggml_threadpool_new.argtypes = [POINTER(ThreadpoolParams)]
        self._cpu.ggml_threadpool_new.restype = c_void_p
        pool: int | None = self._cpu.ggml_threadpool_new(ctypes.byref(params))
        return pool

    @property
    def features(self) -> str:
        """CPU features the library was built for and uses, as it says itself."""
        return str(self.llama_print_system_info().decode(errors="replace"))


_CONTEXT_DEFAULTS: tuple[tuple[int, bytes], ...] = (
    (0, (512).to_bytes(4, "little") + (2048).to_bytes(4, "little") + (512).to_bytes(4, "little")),
    (ContextParams.type_k.offset, (1).to_bytes(4, "little") * 2),  # f16
    (ContextParams.embeddings.offset, bytes((0, 1, 1, 1, 1, 0))),  # embeddings … kv_unified
)
_MODEL_DEFAULTS: tuple[tuple[int, bytes], ...] = (
    (ModelParams.split_mode.offset, (1).to_bytes(4, "little")),  # by layer
    (ModelParams.vocab_only.offset, bytes((0, 0, 1, 0, 0))),  # vocab_only … no_alloc
)


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(f for f in folder.iterdir() if re.fullmatch(pattern, f.name))
    if not found:
        raise EngineFailed(f"{folder}: no file like {pattern}; is this a folder of libllama?")
    return found[0]


def _mapped(candidates: list[Path]) -> Path | None:
    """Which of these this process has loaded (the loader says it nowhere else)."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        text = maps.read_text()
        return next((c for c in candidates if str(c.resolve()) in text or str(c) in text), None)
    return candidates[0]


def wheel_library() -> Path:
    """The extension inside the `xllamacpp` wheel, which exports the whole C API. It is not imported."""
    spec = importlib.util.find_spec("xllamacpp")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    found = sorted(folder.glob("*.so")) + sorted(folder.glob("*.pyd")) if folder else []
    if not found:
        raise EngineFailed("The wheel xllamacpp is not installed: `pip install xllamacpp==2026.9.11063`.")
    return found[0]


def open_library(candidates: list[Path]) -> tuple[Library, list[str]]:
    """The first of `candidates` that loads and has the pinned layout, and why the ones before it did not.

    Raises: EngineFailed when none is left.
    """
    refused: list[str] = []
    for path in candidates:
        try:
            return Library(path), refused
        except EngineFailed as error:
            refused.append(error.message)
    raise EngineFailed("No usable libllama: " + " | ".join(refused))


def strlen_address() -> int:
    """Address of libc's strlen: a ready C function that reads a flag, used as abort callback without the GIL."""
    libc = ctypes.CDLL(None)
    address = ctypes.cast(libc.strlen, c_void_p).value
    if address is None:
        raise EngineFailed("libc has no strlen")
    return address
