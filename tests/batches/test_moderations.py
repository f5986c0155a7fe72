"""A chat model as a guard: its verdict in OpenAI's shape, and a clear answer where no model is set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from nimbos.api.moderations import CATEGORIES
from nimbos.config import ServerSettings
from tests.live import Live, error_of, serving

GUARD: dict[str, Any] = {
    "replies": [
        {"match": "knife", "text": json.dumps({"categories": ["violence", "hate/threatening"]})},
        {"match": "mute", "text": "I would rather not say."},
    ],
    "default": {"text": json.dumps({"categories": []})},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = ServerSettings(moderation_model="guard")
    with serving(tmp_path_factory.mktemp("home"), {"guard": GUARD}, server=settings) as running:
        yield running


def test_each_text_gets_a_verdict_of_its_own(served: Live) -> None:
    told = served.client.moderations.create(input=["good morning", "a knife"], model="omni-moderation-latest")
    assert told.model == "guard"
    calm, sharp = told.results
    assert not calm.flagged
    assert sharp.flagged
    assert (sharp.categories.violence, sharp.categories.hate_threatening, sharp.categories.sexual) == (
        True,
        True,
        False,
    )
    assert (sharp.category_scores.violence, sharp.category_scores.sexual) == (1.0, 0.0)
    assert set(sharp.model_dump(by_alias=True)["categories"]) == set(CATEGORIES)
    (ask, *_) = served.sources["guard"].asks
    assert ask.grammar is not None and "violence" in ask.grammar.source


def test_a_model_that_gives_no_verdict_is_an_error_and_no_acquittal(served: Live) -> None:
    with pytest.raises(openai.InternalServerError):
        served.client.moderations.create(input="mute")


def test_what_is_no_text_is_refused(served: Live) -> None:
    picture = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    assert error_of(served.post("/v1/moderations", {"input": [picture]}), 400)["param"] == "input[0]"
    assert error_of(served.post("/v1/moderations", {"input": []}), 400)["param"] == "input"
    assert error_of(served.post("/v1/moderations", {"input": "a", "model": "other"}), 404)["code"] == "model_not_found"
    assert served.post("/v1/moderations", {"input": [{"type": "text", "text": "hi"}]}).status_code == 200


def test_without_a_model_the_answer_says_how_to_set_one(live: Live) -> None:
    error = error_of(live.post("/v1/moderations", {"input": "hi"}), 404)
    assert error["code"] == "no_moderation_model"
    assert "moderation_model" in error["message"]
