"""The model: the same logits however the tokens came into memory, for each family we say we serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nimbos.engine import llama
from nimbos.engine.llama import Library
from nimbos.engine.model import Floats, Model, ModelOptions, Rows
from nimbos.errors import EngineFailed, ModelUnusable
from nimbos.types import Kind
from tests import tiny_gguf

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma3")
SHARING = ("llama", "qwen2", "qwen3", "qwen3moe")
TOLERANCE = 0.02  # of logits with a standard deviation of 2: an f16 cache rounds differently in each batch shape
PROMPT = [7 + (i * i) % 200 for i in range(90)]


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(llama.wheel_library())


@pytest.fixture
def model(request: pytest.FixtureRequest, library: Library, tmp_path: Path) -> Iterator[Model]:
    path = tiny_gguf.write(request.param, tmp_path)
    loaded = Model(library, path, ModelOptions(cells=1024, sequences=16, threads=1, step_tokens=128, micro_tokens=64))
    loaded.open_context()
    yield loaded
    loaded.close()


def logits_of(model: Model, rows: list[Rows]) -> Floats:
    model.arm()
    assert model.decode(rows) == llama.DECODED
    return model.logits(sum(row.logits for row in rows)).copy()


def plain(model: Model, tokens: list[int]) -> Floats:
    """The reference: one sequence, computed from an empty memory in one piece."""
    model.clear()
    found = logits_of(model, [Rows(sequence=0, start=0, tokens=tokens, logits=True)])[0]
    model.clear()
    return found


def same(one: Floats, other: Floats) -> bool:
    return bool(np.max(np.abs(one - other)) < TOLERANCE)


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_chunks_give_the_logits_of_one_piece(model: Model) -> None:
    want = plain(model, PROMPT)
    for cuts in ((1, 2, 7, 40, 90), (64, 90), (89, 90)):
        model.clear()
        start = 0
        for end in cuts:
            got = logits_of(model, [Rows(sequence=3, start=start, tokens=PROMPT[start:end], logits=True)])[0]
            start = end
        assert same(got, want), cuts


def test_without_flash_attention_the_logits_are_the_same(library: Library, tmp_path: Path) -> None:
    path = tiny_gguf.write("qwen2", tmp_path)
    found = []
    for flash in (True, False):
        options = ModelOptions(cells=1024, sequences=16, threads=1, step_tokens=128, flash_attention=flash)
        model = Model(library, path, options)
        model.open_context()
        try:
            found.append(plain(model, PROMPT))
            logits_of(model, [Rows(sequence=0, start=0, tokens=PROMPT[:60], logits=False)])
            model.copy(0, 1, 60)
            shared = logits_of(model, [Rows(sequence=1, start=60, tokens=PROMPT[60:], logits=True)])[0]
            assert same(shared, found[-1])
        finally:
            model.close()
    assert same(*found)
    assert not np.array_equal(*found)  # the option did something: other sums are rounded otherwise


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_one_other_token_early_on_is_far_outside_of_the_tolerance(model: Model) -> None:
    """Without this, the equalities below could hold for a model that looks at its last token only."""
    want, other = plain(model, PROMPT[:12]), plain(model, [PROMPT[0] + 1, *PROMPT[1:12]])
    assert float(np.max(np.abs(want - other))) > 10 * TOLERANCE


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_neighbours_in_the_batch_change_nothing(model: Model) -> None:
    want, other = plain(model, PROMPT), plain(model, PROMPT[:30])
    logits_of(model, [Rows(sequence=1, start=0, tokens=PROMPT[:60], logits=False)])
    got = logits_of(
        model,
        [
            Rows(sequence=2, start=0, tokens=PROMPT[:30], logits=True),
            Rows(sequence=1, start=60, tokens=PROMPT[60:], logits=True),
        ],
    )
    assert same(got[0], other)
    assert same(got[1], want)


@pytest.mark.parametrize("model", SHARING, indirect=True)
def test_a_shared_prefix_gives_the_logits_of_an_own_one(model: Model) -> None:
    assert model.shares_prefixes
    tails = [[*range(20, 29)], [*range(60, 65)], [11]]
    wants = [plain(model, PROMPT + tail) for tail in tails]
    logits_of(model, [Rows(sequence=0, start=0, tokens=PROMPT, logits=False)])
    for branch in range(1, len(tails) + 1):
        model.copy(0, branch, len(PROMPT))
        assert model.position_end(branch) == len(PROMPT)
    rows = [Rows(sequence=b, start=len(PROMPT), tokens=t, logits=True) for b, t in enumerate(tails, start=1)]
    for got, want in zip(logits_of(model, rows), wants, strict=True):
        assert same(got, want)


@pytest.mark.parametrize("model", SHARING, indirect=True)
def test_a_fork_in_the_middle_and_the_parents_end_leave_the_child_whole(model: Model) -> None:
    want = plain(model, [*PROMPT[:50], 33, 34])
    logits_of(model, [Rows(sequence=0, start=0, tokens=PROMPT, logits=False)])
    model.copy(0, 1, 50)
    model.drop(0)
    logits_of(model, [Rows(sequence=5, start=0, tokens=PROMPT[::-1], logits=False)])  # takes the cells that came free
    got = logits_of(model, [Rows(sequence=1, start=50, tokens=[33, 34], logits=True)])[0]
    assert same(got, want)


@pytest.mark.parametrize("model", SHARING, indirect=True)
def test_evicted_cells_are_used_again_without_a_trace(model: Model) -> None:
    want = plain(model, PROMPT)
    for round_ in range(14):  # more tokens than the pool has cells
        model.drop(round_ % 3)
        logits_of(model, [Rows(sequence=round_ % 3, start=0, tokens=PROMPT[round_:], logits=False)])
    model.drop(0)
    assert same(logits_of(model, [Rows(sequence=0, start=0, tokens=PROMPT, logits=True)])[0], want)


@pytest.mark.parametrize("model", SHARING, indirect=True)
def test_a_tail_that_was_dropped_can_be_computed_again(model: Model) -> None:
    want = plain(model, PROMPT)
    logits_of(model, [Rows(sequence=0, start=0, tokens=[*PROMPT[:70], 1, 2, 3], logits=False)])
    model.drop(0, 70)
    assert same(logits_of(model, [Rows(sequence=0, start=70, tokens=PROMPT[70:], logits=True)])[0], want)


@pytest.mark.parametrize("model", ["gemma3"], indirect=True)
def test_a_sliding_window_does_not_share(model: Model) -> None:
    assert not model.shares_prefixes


@pytest.mark.parametrize("model", ["qwen2"], indirect=True)
def test_an_aborted_step_can_be_taken_up_where_it_stopped(model: Model) -> None:
    want = plain(model, PROMPT)
    model.abort()
    assert model.decode([Rows(sequence=0, start=0, tokens=PROMPT, logits=True)]) == llama.ABORTED
    model.arm()
    have = model.position_end(0)
    model.drop(0, min(have, len(PROMPT) - 1))
    have = model.position_end(0)
    got = logits_of(model, [Rows(sequence=0, start=have, tokens=PROMPT[have:], logits=True)])[0]
    assert same(got, want)


@pytest.mark.parametrize("model", ["qwen2"], indirect=True)
def test_a_batch_that_is_too_long_is_our_own_error(model: Model) -> None:
    with pytest.raises(EngineFailed, match="129 rows"):
        model.decode([Rows(sequence=0, start=0, tokens=[5] * 129, logits=True)])


@pytest.mark.parametrize("model", ["qwen2"], indirect=True)
def test_control_tokens_are_only_read_where_they_are_meant(model: Model) -> None:
    (end,) = model.tokenize(b"<|im_end|>", True)
    assert model.vocab.pieces[end] == b"<|im_end|>"
    assert end in model.vocab.control
    literal = model.tokenize(b"<|im_end|>", False)
    assert end not in literal
    assert model.vocab.join(literal) == b"<|im_end|>"


def test_an_embedding_model_is_known_as_one(library: Library, tmp_path: Path) -> None:
    path = tiny_gguf.write("qwen3-embedding", tmp_path)
    model = Model(library, path, ModelOptions(cells=256, sequences=4, threads=1))
    assert model.kind is Kind.EMBED
    assert not model.shares_prefixes
    model.close()


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "architecture"])
def test_a_broken_file_is_refused_and_the_library_lives_on(damage: str, library: Library, tmp_path: Path) -> None:
    whole = tiny_gguf.write("llama", tmp_path)
    content = whole.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(
        {
            "empty": b"",
            "text": b"not a model at all" * 100,
            "truncated": content[: len(content) // 2],
            "architecture": content.replace(b"llama", b"lxama"),
        }[damage]
    )
    with pytest.raises(ModelUnusable) as caught:
        Model(library, broken, ModelOptions(cells=256, sequences=4, threads=1))
    assert "broken.gguf" in caught.value.message
    assert len(caught.value.reason) > 10
    Model(library, whole, ModelOptions(cells=256, sequences=4, threads=1)).close()
