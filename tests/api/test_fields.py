"""How a request's sampling fields become what the engine samples with."""

from __future__ import annotations

import pytest

from nimbos.api.fields import SILENT_MIN_P, SILENT_TEMPERATURE, SamplingFields, grammar_of, sampling_of
from nimbos.engine.grammar import GrammarFactory
from tests.engine.small_vocab import small_vocab


def test_a_request_that_says_nothing_of_sampling_is_kept_from_nonsense() -> None:
    chosen = sampling_of(SamplingFields(), logprobs=None)
    assert (chosen.temperature, chosen.min_p) == (SILENT_TEMPERATURE, SILENT_MIN_P)


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "min_p", "typical_p"])
def test_a_request_that_names_one_way_of_sampling_gets_just_that(field: str) -> None:
    chosen = sampling_of(SamplingFields(**{field: 1}), logprobs=None)
    assert chosen.temperature == 1.0
    assert chosen.min_p == (1.0 if field == "min_p" else 0.0)


CHOICES = ["<b>", "5 €", "👍", "a-b", "a/b #1 & ~@!%:;,='\"`_", r"\\ . + * ? ( ) | [ ] { } ^ $", "é\n"]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_guided_choice_is_taken_literally(choice: str) -> None:
    grammar = grammar_of(SamplingFields(guided_choice=["other", choice]))
    assert grammar is not None
    factory = GrammarFactory(small_vocab())
    for text, fits in ((choice, True), ("other", True), (f"\\{choice}", False), ("x", False)):
        matcher = factory.compile(grammar)
        assert (all(matcher.accept(byte) for byte in text.encode()) and matcher.accepting) == fits
