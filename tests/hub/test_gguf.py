from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nimbos.errors import ModelUnusable
from nimbos.hub import read_gguf
from nimbos.hub.facts import split_names
from tests import tiny_gguf
from tests.hub.gguf_bytes import (
    ARRAY,
    BOOL,
    STRING,
    U32,
    Made,
    default_pairs,
    numbers,
    pair,
    strings,
    tensor,
    text,
    u32,
)


def write(folder: Path, content: bytes, name: str = "model.gguf") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def reason_of(path: Path) -> str:
    with pytest.raises(ModelUnusable) as caught:
        read_gguf(path)
    assert str(path.parent) in caught.value.message
    return caught.value.reason


def test_facts_are_what_the_gguf_package_wrote(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("Written")
    writer.add_license("apache-2.0")
    writer.add_block_count(4)
    writer.add_context_length(2048)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_token_list([f"token {number}" for number in range(5000)])
    writer.add_token_scores([0.0] * 5000)
    writer.add_chat_template("{{ messages[0].content }}")
    writer.add_tensor("a", np.zeros((64, 256), dtype=np.float32))
    writer.add_tensor("b", gguf.quantize(np.ones((32, 256), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = read_gguf(path)
    facts = read.facts
    assert (facts.name, facts.architecture, facts.licence) == ("Written", "qwen2", "apache-2.0")
    assert (facts.layers, facts.heads, facts.kv_heads, facts.head_dim) == (4, 8, 2, 32)
    assert (facts.context_tokens, facts.embedding_size, facts.feed_forward_size) == (2048, 256, 512)
    assert (facts.quantisation, facts.vocabulary) == ("Q8_0", 5000)
    assert facts.parameters == 64 * 256 + 32 * 256
    assert facts.file_bytes == path.stat().st_size
    assert facts.kv_bytes_per_cell == 4 * 2 * 32 * 2 * 2
    assert facts.template_sha256 == hashlib.sha256(b"{{ messages[0].content }}").hexdigest()
    assert facts.has_chat_template
    assert facts.supported
    assert read.metadata["general.name"] == "Written"


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "qwen3moe", "llama", "gemma3"])
def test_our_reader_agrees_with_the_gguf_package(architecture: str, tmp_path: Path) -> None:
    path = tiny_gguf.write(architecture, tmp_path)
    theirs = gguf.GGUFReader(path)
    ours = read_gguf(path)
    assert ours.facts.architecture == architecture
    assert ours.facts.parameters == sum(int(t.n_elements) for t in theirs.tensors)
    assert ours.facts.vocabulary == len(theirs.fields["tokenizer.ggml.tokens"].data)
    for key, value in ours.metadata.items():
        expected = theirs.fields[key].contents()
        assert list(value) == list(expected) if isinstance(value, tuple) else value == pytest.approx(expected)


def test_windows_are_counted_apart(tmp_path: Path) -> None:
    facts = read_gguf(tiny_gguf.write("gemma3", tmp_path)).facts
    assert facts.layers == 7
    assert facts.window_tokens == 16
    assert facts.window_bytes_per_cell == 6 * facts.kv_bytes_per_cell  # layers 0-4 and 6 of 7; layer 5 sees all


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (Made(magic=b"PK\x03\x04"), "not a GGUF file"),
        (Made(magic=b"ggml"), "not a GGUF file"),
        (Made(version=1), "version 1"),
        (Made(version=4), "version 4"),
        (Made(version=0), "version 0"),
        (Made(version=3 << 24), "big-endian"),
        (Made(counts=(1 << 60, 3)), "absurd"),
        (Made(counts=(1, 1 << 63)), "absurd"),
        (Made(counts=(2, 12)), "dimensions"),
        (Made(tensors=[], data=b""), "no tensors"),
        (Made(tensors=[tensor("w", [8, 4], offset=1 << 40)]), "truncated"),
        (Made(tensors=[tensor("w", [8, 4], offset=7)]), "not aligned"),
        (Made(tensors=[tensor("w", [8, 4], kind=4)]), "type 4"),
        (Made(tensors=[tensor("w", [8, 4], kind=99)]), "type 99"),
        (Made(tensors=[tensor("w", [8, 4], kind=12)]), "blocks of 256"),
        (Made(tensors=[tensor("w", [1 << 40, 1 << 40])]), "overflows"),
        (Made(tensors=[tensor("w", [1 << 63, 0])]), "overflows"),
        (Made(tensors=[tensor("w", [1] * 5)]), "5 dimensions"),
        (Made(tensors=[tensor("w", [])]), "0 dimensions"),
        (Made(tensors=[tensor("w", [8, 4]), tensor("w", [8, 4])]), "occurs twice"),
        (Made(tensors=[tensor("x" * 64, [8, 4])]), "claims 64 bytes"),
        (Made(pairs=[*default_pairs(), default_pairs()[0]]), "occurs twice"),
        (Made(pairs=default_pairs()[1:]), "no architecture"),
        (Made(pairs=[pair("general.architecture", U32, u32(1))]), "not text"),
        (Made(pairs=[*default_pairs(), pair("k", 99, b"")]), "unknown type 99"),
        (Made(pairs=[*default_pairs(), pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "arrays cannot have"),
        (Made(pairs=[*default_pairs(), pair("k", ARRAY, struct.pack("<IQ", STRING, 1 << 61))]), "strings"),
        (Made(pairs=[*default_pairs(), pair("k", ARRAY, struct.pack("<IQ", 10, 1 << 61))]), "truncated"),
        (Made(pairs=[*default_pairs(), pair("k", STRING, struct.pack("<Q", (1 << 64) - 1))]), "claims"),
        (Made(pairs=[*default_pairs(), pair(b"\xff\xfe", U32, u32(1))]), "not UTF-8"),
        (Made(pairs=[*default_pairs(), pair("general.alignment", U32, u32(24))]), "power of two"),
        (Made(pairs=[*default_pairs(), pair("general.alignment", U32, u32(0))]), "power of two"),
        (Made(pairs=[*default_pairs(), pair("general.alignment", BOOL, b"\x01")]), "power of two"),
        (Made(pairs=[*default_pairs()[:4], pair("llama.block_count", U32, u32(100_000))]), "100000 layers"),
        (Made(pairs=[*default_pairs()[:4], pair("llama.block_count", STRING, text("two"))]), "not a count"),
        (
            Made(pairs=[*default_pairs()[:9], pair("llama.attention.head_count_kv", ARRAY, numbers([1]))]),
            "1 numbers for 2 layers",
        ),
        (Made(pairs=[*default_pairs()[:10], pair("tokenizer.chat_template", U32, u32(7))]), "template is not text"),
        (Made(pairs=[*default_pairs(), pair("split.count", U32, u32(3))]), "one of 3 parts"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(made: Made, words: str, tmp_path: Path) -> None:
    assert words in reason_of(write(tmp_path, made.bytes()))


def test_a_long_string_array_with_a_lying_string_is_refused(tmp_path: Path) -> None:
    liar = strings(["a"] * 10)[:-9] + struct.pack("<Q", (1 << 64) - 20) + b"a"
    made = Made(pairs=[*default_pairs(), pair("k", ARRAY, liar)])
    assert "truncated" in reason_of(write(tmp_path, made.bytes()))


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    assert "no such file" in reason_of(tmp_path / "none.gguf")
    assert "no such file" in reason_of(tmp_path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = Made().bytes()
    path = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert reason_of(path)
    path.write_bytes(whole)
    assert read_gguf(path).facts.parameters == 32


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=6))
def test_flipped_bytes_give_facts_or_a_reason(flips: list[tuple[int, int]], tmp_path: Path) -> None:
    content = bytearray(Made().bytes())
    for place, bits in flips:
        content[place % len(content)] ^= bits
    path = write(tmp_path, bytes(content))
    try:
        facts = read_gguf(path).facts
    except ModelUnusable as error:
        assert error.reason
    else:
        assert facts.parameters >= 0
        assert all(letter.isprintable() for letter in facts.name + facts.licence + facts.architecture)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_any_bytes_after_the_magic_give_a_reason(content: bytes, tmp_path: Path) -> None:
    assert reason_of(write(tmp_path, b"GGUF" + struct.pack("<I", 3) + content))


def test_words_from_a_file_cannot_control_a_terminal(tmp_path: Path) -> None:
    pairs = default_pairs()
    pairs[1] = pair("general.name", STRING, text("\x1b[31mred\x07\nnext" + "x" * 500))
    name = read_gguf(write(tmp_path, Made(pairs=pairs).bytes())).facts.name
    assert name.isprintable()
    assert len(name) <= 200


def test_a_split_model_is_read_from_all_its_parts(tmp_path: Path) -> None:
    for number in range(3):
        extra = [
            pair("split.no", 2, struct.pack("<H", number)),
            pair("split.count", 2, struct.pack("<H", 3)),
        ]
        made = Made(pairs=[*default_pairs(), *extra], tensors=[tensor(f"w{number}", [8, 4])])
        write(tmp_path, made.bytes(), f"m-{number + 1:05d}-of-00003.gguf")
    read = read_gguf(tmp_path / "m-00001-of-00003.gguf")
    assert read.facts.parameters == 3 * 32
    assert len(read.parts) == 3
    assert read.facts.file_bytes == sum(part.stat().st_size for part in read.parts)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    assert "no such file" in reason_of(tmp_path / "m-00001-of-00003.gguf")
    (tmp_path / "m-00002-of-00003.gguf").write_bytes((tmp_path / "m-00003-of-00003.gguf").read_bytes())
    assert "should be part 1 of 3 and says 2 of 3" in reason_of(tmp_path / "m-00001-of-00003.gguf")


def test_split_names_are_all_the_parts() -> None:
    assert split_names("a-00002-of-00003.gguf") == tuple(f"a-0000{n}-of-00003.gguf" for n in (1, 2, 3))
    assert split_names("a.gguf") == ("a.gguf",)
    for wrong in ("a-00004-of-00003.gguf", "a-00000-of-00003.gguf", "a-00001-of-99999.gguf"):
        with pytest.raises(ValueError, match="part"):
            split_names(wrong)


def test_an_unknown_architecture_is_read_and_named(tmp_path: Path) -> None:
    pairs = [pair("general.architecture", STRING, text("warp9"))]
    facts = read_gguf(write(tmp_path, Made(pairs=pairs).bytes())).facts
    assert facts.architecture == "warp9"
    assert not facts.supported


@pytest.mark.parametrize(("pooling", "kind"), [(0, "generate"), (3, "embed"), (4, "rerank")])
def test_pooling_says_what_a_model_is_for(pooling: int, kind: str, tmp_path: Path) -> None:
    made = Made(pairs=[*default_pairs(), pair("llama.pooling_type", U32, u32(pooling))])
    assert read_gguf(write(tmp_path, made.bytes())).facts.kind == kind
