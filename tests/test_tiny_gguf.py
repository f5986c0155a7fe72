"""The tiny models are what they claim: the same bytes for the same arguments, small, and sound as files.
That libllama loads and decodes them is shown by the engine's own tests, which run on them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from tests import tiny_gguf


@pytest.mark.parametrize("arch", tiny_gguf.SHAPES)
def test_same_arguments_give_the_same_bytes_and_another_seed_others(arch: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    one = tiny_gguf.write(arch, first)
    again = tiny_gguf.write(arch, second)
    other = tiny_gguf.write(arch, second, seed=2)
    assert one.read_bytes() == again.read_bytes()
    assert one.name == again.name != other.name
    assert one.read_bytes() != other.read_bytes()
    assert 200_000 < one.stat().st_size < 3_000_000


@pytest.mark.parametrize("arch", tiny_gguf.SHAPES)
def test_every_tensor_is_finite_and_greedy_text_cannot_hold_a_mark(arch: str, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(tiny_gguf.write(arch, tmp_path, context=512))
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert all(np.isfinite(values).all() for values in tensors.values())
    assert reader.fields[f"{tiny_gguf.SHAPES[arch].architecture}.context_length"].contents() == 512
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    marks = [tokens.index(mark) for mark in (*tiny_gguf.CONTROL, *tiny_gguf.WORDS)]
    if tiny_gguf.SHAPES[arch].encoder:
        return  # it writes no text
    silent = np.flatnonzero((tensors["output.weight"] == 0).all(axis=1))
    assert silent.tolist() == sorted(marks)


def test_each_merge_joins_two_tokens_that_exist_before_it() -> None:
    tokens, types, merges = tiny_gguf.vocabulary()
    assert len(tokens) == len(set(tokens)) == len(types)
    known = set(tokens[:256])
    for merge in merges:
        left, right = merge.split(" ")
        assert {left, right} <= known, merge
        known.add(left + right)
    assert known == set(tokens) - {*tiny_gguf.CONTROL, *tiny_gguf.WORDS}


def test_a_template_is_ours_or_the_one_given_or_none(tmp_path: Path) -> None:
    def template(given: str | None, arch: str = "qwen2") -> str | None:
        reader = gguf.GGUFReader(tiny_gguf.write(arch, tmp_path, chat_template=given))
        field = reader.fields.get("tokenizer.chat_template")
        return None if field is None else str(field.contents())

    assert template(None) == tiny_gguf.CHATML
    assert template(None, "qwen3") == tiny_gguf.THINKING_CHATML
    assert template("{{ messages[0].content }}") == "{{ messages[0].content }}"
    assert template("") is None
    assert template(None, "qwen3-embedding") is None
