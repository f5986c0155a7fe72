"""How a request's sampling fields become what the engine samples with."""

from __future__ import annotations

import pytest

from nimbos.api.fields import SILENT_MIN_P, SILENT_TEMPERATURE, SamplingFields, sampling_of


def test_a_request_that_says_nothing_of_sampling_is_kept_from_nonsense() -> None:
    chosen = sampling_of(SamplingFields(), logprobs=None)
    assert (chosen.temperature, chosen.min_p) == (SILENT_TEMPERATURE, SILENT_MIN_P)


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "min_p", "typical_p"])
def test_a_request_that_names_one_way_of_sampling_gets_just_that(field: str) -> None:
    chosen = sampling_of(SamplingFields(**{field: 1}), logprobs=None)
    assert chosen.temperature == 1.0
    assert chosen.min_p == (1.0 if field == "min_p" else 0.0)
