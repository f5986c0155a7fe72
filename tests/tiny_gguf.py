"""Tiny models with random weights: real files that libllama loads in milliseconds, one for each family we verify.

A file is a function of (architecture, seed, context, chat template): the same arguments give the same bytes. Their
answers mean nothing, but they behave like a model's: greedy text depends on all of the context, and logits have a
standard deviation of about 2. All weights are float32, so that logits differ between batch shapes by rounding only.

The vocabulary is the same for all: 256 bytes, `MERGES` pairs, then `CONTROL` and `WORDS` marks. The output rows of the
marks are zero (logit exactly 0), so greedy text holds no mark and never ends by itself; ask for one with a logit bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
CONTROL = (END_OF_TEXT, IM_START, IM_END, *FIM)
WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # user-defined: matched whole, and have text

CHATML = (
    "{%- if tools %}<|im_start|>system\nTools:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Call one as <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>\n{% endif -%}'
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
)
THINKING_CHATML = CHATML + (
    "{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif -%}"
)

# Frequent English pairs, most frequent first; "_" is the space. Each is made of two tokens that exist before it.
_PAIRS = (
    "_ t|h e|i n|e r|a n|_t he|o n|r e|a t|e n|o r|e s|i s|_ a|_ s|_ w|i t|an d|o u|_ o|a l|in g|_ i|_ c|_ b|_ f|_ m"
    "|_ p|_ d|a r|_t o|_o f|_ and|_ in|a s|e d|i c|l e|o m|s t|v e|l l|_w h|i on|at ion|_t h|e l|_ is|_ he|ll o|_he llo"
    "|n t|_ y|_y ou|_f or|_w it|_wit h|a m|u r|t er|_w or|l d|_wor ld|en t|_b e|_ n|_n o|_ re|_m e|k e|_ l|_l i"
    "|_li ke|_th at"
)
_RANK_PAIRS = "|y es|n o"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of one architecture. `window`: of its local layers, which are all but each sixth. `recurrent`: all but each
    fourth layer are linear attention. `pooling`: makes it an embedding model, or with RANK a reranker; its head is the
    output rows of the words "yes" and "no". `ranks`: those words are tokens. `encoder`: BERT's, with a head of its own.
    """

    architecture: str
    layers: int = 3
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    hidden: int = 128
    head_norm: bool = True
    post_norm: bool = False
    bias: bool = False
    experts: int = 0
    experts_used: int = 0
    window: int = 0
    recurrent: bool = False
    add_bos: bool = False
    thinks: bool = False
    pooling: gguf.PoolingType | None = None
    ranks: bool = False
    encoder: bool = False


_QWEN3 = Shape(architecture="qwen3", head_size=32, thinks=True)
SHAPES = {
    "qwen2": Shape(architecture="qwen2", head_norm=False, bias=True),
    "qwen3": _QWEN3,
    "qwen3moe": Shape(architecture="qwen3moe", head_size=32, hidden=64, experts=8, experts_used=2, thinks=True),
    "llama": Shape(architecture="llama", head_norm=False, add_bos=True),
    "gemma3": Shape(architecture="gemma3", layers=7, post_norm=True, window=16, add_bos=True),
    "qwen35": Shape(architecture="qwen35", layers=4, head_size=32, post_norm=True, recurrent=True, thinks=True),
    "qwen3-embedding": replace(_QWEN3, thinks=False, pooling=gguf.PoolingType.LAST),
    "qwen3-embedding-mean": replace(_QWEN3, thinks=False, pooling=gguf.PoolingType.MEAN),
    "qwen3-reranker": replace(_QWEN3, thinks=False, ranks=True, pooling=gguf.PoolingType.RANK),
    "qwen3-reranker-words": replace(_QWEN3, thinks=False, ranks=True),
    "bert-reranker": Shape(architecture="bert", kv_heads=4, encoder=True, pooling=gguf.PoolingType.RANK),
    "bert-embedding": Shape(architecture="bert", kv_heads=4, encoder=True, pooling=gguf.PoolingType.CLS),
}
GENERATING = tuple(name for name, shape in SHAPES.items() if shape.pooling is None and not shape.ranks)
RERANK_PROMPT = "<|im_start|>system\nAnswer yes or no.<|im_end|>\n<|im_start|>user\n{query}\n{document}<|im_end|>\n"


def write(arch: str, folder: Path, *, seed: int = 1, context: int = 4096, chat_template: str | None = None) -> Path:
    """Writes `folder/tiny-ARCH-SEED.gguf` and returns its path.

    `arch`: a key of `SHAPES`. `chat_template`: None is ours (ChatML), "" is none at all; embedding models have none
    unless given. Another context or template writes to the same name.
    """
    shape = SHAPES[arch]
    path = folder / f"tiny-{arch}-{seed}.gguf"
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name(f"Tiny {arch}")
    writer.add_license("apache-2.0")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_sizes(writer, shape, context)
    size = _add_vocabulary(writer, shape)
    template = _template(shape) if chat_template is None else chat_template
    if template:
        writer.add_chat_template(template)
    if shape.ranks:
        writer.add_chat_template([{"name": "rerank", "template": RERANK_PROMPT}])
    random = np.random.default_rng(seed)
    weights = _encoder(shape, size, context, random) if shape.encoder else _weights(shape, size, random)
    for name, values in weights:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary(*, ranks: bool = False) -> tuple[list[str], list[gguf.TokenType], list[str]]:
    """Tokens, their types, and merges ("left right", best first), in GPT-2's spelling of bytes."""
    letters = _byte_letters()
    pairs = _PAIRS + (_RANK_PAIRS if ranks else "")
    merges = [_spell(pair, letters) for pair in pairs.split("|")]
    tokens = [letters[byte] for byte in range(256)]
    tokens += dict.fromkeys(merge.replace(" ", "") for merge in merges)
    types = [gguf.TokenType.NORMAL] * len(tokens)
    return (
        [*tokens, *CONTROL, *WORDS],
        [*types, *[gguf.TokenType.CONTROL] * len(CONTROL), *[gguf.TokenType.USER_DEFINED] * len(WORDS)],
        merges,
    )


def _template(shape: Shape) -> str:
    if shape.pooling is not None or shape.ranks:
        return ""
    return THINKING_CHATML if shape.thinks else CHATML


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it is printable Latin-1, else the next one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def _spell(pair: str, letters: dict[int, str]) -> str:
    """`_t he` as the letters of its bytes, the two sides still apart."""
    return " ".join("".join(letters[ord(" " if c == "_" else c)] for c in side) for side in pair.split(" "))


def _add_sizes(writer: gguf.GGUFWriter, shape: Shape, context: int) -> None:
    writer.add_context_length(context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    if shape.encoder:
        writer.add_layer_norm_eps(1e-6)
        writer.add_causal_attention(False)
    if not shape.recurrent:
        writer.add_rope_dimension_count(shape.head_size)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape.hidden)
    if shape.window:
        writer.add_sliding_window(shape.window)
    if shape.pooling is not None:
        writer.add_pooling_type(shape.pooling)
    if shape.recurrent:
        writer.add_rope_dimension_count(shape.head_size // 2)
        writer.add_rope_dimension_sections([3, 3, 2, 0])
        writer.add_full_attention_interval(4)
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_state_size(_STATE)
        writer.add_ssm_group_count(_KEY_HEADS)
        writer.add_ssm_time_step_rank(_VALUE_HEADS)
        writer.add_ssm_inner_size(_STATE * _VALUE_HEADS)


def _add_vocabulary(writer: gguf.GGUFWriter, shape: Shape) -> int:
    tokens, types, merges = vocabulary(ranks=shape.ranks)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index(END_OF_TEXT))
    writer.add_pad_token_id(tokens.index(END_OF_TEXT))
    writer.add_eos_token_id(tokens.index(IM_END))
    writer.add_eot_token_id(tokens.index(IM_END))
    for part, mark in zip(("prefix", "suffix", "middle"), FIM, strict=True):
        writer.add_uint32(f"tokenizer.ggml.fim_{part[:3]}_token_id", tokens.index(mark))
    writer.add_add_bos_token(shape.add_bos or shape.encoder)
    if shape.pooling is not None:
        writer.add_add_eos_token(True)
    if shape.encoder:
        writer.add_sep_token_id(tokens.index(IM_END))
        writer.add_add_sep_token(True)
        writer.add_token_type_count(2)
    if shape.ranks and shape.pooling is not None:
        writer.add_classifier_output_labels(["yes", "no"])
    return len(tokens)


# Linear attention of the recurrent family: two key heads and four value heads with a 32-by-32 state each.
_STATE, _KEY_HEADS, _VALUE_HEADS = 32, 2, 4


def _weights(shape: Shape, vocabulary: int, random: np.random.Generator) -> Iterator[tuple[str, Floats]]:
    """Tensors by GGUF name; a matrix is (outputs, inputs).

    A small embedding, strong attention scores (standard deviation about 3) and a strong attention output make the
    last token's logits depend on what stands far before it, which a default initialisation does not.
    """
    width = shape.width
    embedding_scale = 0.3 / np.sqrt(width) if shape.architecture == "gemma3" else 0.3  # Gemma multiplies it again
    yield "token_embd.weight", _normal(random, (vocabulary, width), embedding_scale)
    yield "output_norm.weight", _near_one(random, width)
    output = _normal(random, (vocabulary, width), 2 / np.sqrt(width))
    output[vocabulary - len(CONTROL) - len(WORDS) :] = 0
    yield "output.weight", output
    if shape.ranks and shape.pooling is not None:
        yield "cls.output.weight", output[[_words(shape).index(word) for word in ("yes", "no")]]
    for layer in range(shape.layers):
        linear = shape.recurrent and (layer + 1) % 4 != 0
        for part in (_linear_attention if linear else _attention, _feed_forward):
            for name, values in part(shape, random):
                yield f"blk.{layer}.{name}", values


def _words(shape: Shape) -> list[str]:
    return vocabulary(ranks=shape.ranks)[0]


def _encoder(shape: Shape, vocabulary: int, context: int, random: np.random.Generator) -> Iterator[tuple[str, Floats]]:
    """BERT's: layer norms with biases, positions that are learnt, and a head in two layers."""
    width = shape.width
    yield "token_embd.weight", _normal(random, (vocabulary, width), 1.0)
    yield "token_types.weight", _normal(random, (2, width), 0.3)
    yield "position_embd.weight", _normal(random, (context, width), 0.3)
    sizes = {"attn_q": width, "attn_k": width, "attn_v": width, "attn_output": width}
    norms = ["token_embd_norm"]
    matrices = {}
    for layer in range(shape.layers):
        matrices |= {f"blk.{layer}.{name}": (size, width) for name, size in sizes.items()}
        matrices[f"blk.{layer}.ffn_up"] = (shape.hidden, width)
        matrices[f"blk.{layer}.ffn_down"] = (width, shape.hidden)
        norms += [f"blk.{layer}.attn_output_norm", f"blk.{layer}.layer_output_norm"]
    for name in norms:
        yield f"{name}.weight", _near_one(random, width)
        yield f"{name}.bias", _normal(random, (width,), 0.1)
    for name, (outputs, inputs) in matrices.items():
        yield f"{name}.weight", _matrix(random, outputs, inputs, 1.5)
        yield f"{name}.bias", _normal(random, (outputs,), 0.1)
    if shape.pooling is gguf.PoolingType.RANK:
        for name, values in encoder_head(shape.width):
            yield name, values


def encoder_head(width: int) -> Iterator[tuple[str, Floats]]:
    """The same for every seed, so that a test can compute it."""
    random = np.random.default_rng(99)
    yield "cls.weight", _matrix(random, width, width)
    yield "cls.bias", _normal(random, (width,), 0.1)
    yield "cls.output.weight", _matrix(random, 1, width, 2.0)
    yield "cls.output.bias", _normal(random, (1,), 0.1)


def _attention(shape: Shape, random: np.random.Generator) -> Iterator[tuple[str, Floats]]:
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    sharpness = 1.0 if shape.head_norm else 1.7
    gated = 2 if shape.recurrent else 1  # that family's query matrix also makes a gate
    yield "attn_norm.weight", _near_one(random, shape.width)
    yield "attn_q.weight", _matrix(random, queries * gated, shape.width, sharpness)
    yield "attn_k.weight", _matrix(random, keys, shape.width, sharpness)
    yield "attn_v.weight", _matrix(random, keys, shape.width)
    yield "attn_output.weight", _matrix(random, shape.width, queries, 2.0)
    if shape.head_norm:
        yield "attn_q_norm.weight", 1.7 * _near_one(random, shape.head_size)
        yield "attn_k_norm.weight", 1.7 * _near_one(random, shape.head_size)
    if shape.bias:
        yield "attn_q.bias", _normal(random, (queries,), 0.1)
        yield "attn_k.bias", _normal(random, (keys,), 0.1)
        yield "attn_v.bias", _normal(random, (keys,), 0.1)
    if shape.post_norm:
        yield "post_attention_norm.weight", _near_one(random, shape.width)


def _linear_attention(shape: Shape, random: np.random.Generator) -> Iterator[tuple[str, Floats]]:
    keys, values = _STATE * _KEY_HEADS, _STATE * _VALUE_HEADS
    yield "attn_norm.weight", _near_one(random, shape.width)
    yield "attn_qkv.weight", _matrix(random, 2 * keys + values, shape.width)
    yield "attn_gate.weight", _matrix(random, values, shape.width)
    yield "ssm_conv1d.weight", _normal(random, (2 * keys + values, 4), 0.5)
    yield "ssm_dt.bias", _normal(random, (_VALUE_HEADS,), 0.1)
    yield "ssm_a", -np.exp(_normal(random, (_VALUE_HEADS,), 0.3) - 3)  # negative: the state decays slowly
    yield "ssm_beta.weight", _matrix(random, _VALUE_HEADS, shape.width)
    yield "ssm_alpha.weight", _matrix(random, _VALUE_HEADS, shape.width)
    yield "ssm_norm.weight", _near_one(random, _STATE)
    yield "ssm_out.weight", _matrix(random, shape.width, values)
    yield "post_attention_norm.weight", _near_one(random, shape.width)


def _feed_forward(shape: Shape, random: np.random.Generator) -> Iterator[tuple[str, Floats]]:
    if not shape.recurrent:
        yield "ffn_norm.weight", _near_one(random, shape.width)
    if shape.post_norm and not shape.recurrent:
        yield "post_ffw_norm.weight", _near_one(random, shape.width)
    if not shape.experts:
        yield "ffn_gate.weight", _matrix(random, shape.hidden, shape.width)
        yield "ffn_up.weight", _matrix(random, shape.hidden, shape.width)
        yield "ffn_down.weight", _matrix(random, shape.width, shape.hidden)
        return
    yield "ffn_gate_inp.weight", _matrix(random, shape.experts, shape.width)
    for name, outputs, inputs in (
        ("gate", shape.hidden, shape.width),
        ("up", shape.hidden, shape.width),
        ("down", shape.width, shape.hidden),
    ):
        yield f"ffn_{name}_exps.weight", _normal(random, (shape.experts, outputs, inputs), 1 / np.sqrt(inputs))


def _normal(random: np.random.Generator, shape: tuple[int, ...], scale: float) -> Floats:
    return random.standard_normal(shape, dtype=np.float32) * np.float32(scale)


def _matrix(random: np.random.Generator, outputs: int, inputs: int, scale: float = 1.0) -> Floats:
    """Keeps the size of its input, times `scale`."""
    return _normal(random, (outputs, inputs), scale / np.sqrt(inputs))


def _near_one(random: np.random.Generator, size: int) -> Floats:
    return np.float32(1) + _normal(random, (size,), 0.1)
