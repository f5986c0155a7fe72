"""`/v1/rerank` on a real engine with a tiny reranker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nimbos.api.rerank import DOCUMENTS_MAX, PATHS, REFUSED
from nimbos.config import EngineSettings
from tests import tiny_gguf
from tests.live import Live, error_of, serving

DOCUMENTS = ["hello to you", "the man is in the world", "that is what we like", "on and on and on"]
MODEL = "tiny-qwen3-reranker-1"


@pytest.fixture(scope="module")
def ranking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    home: Path = tmp_path_factory.mktemp("home")
    engine = EngineSettings(cells=2304, sequences=64, threads=1)
    model = tiny_gguf.write("qwen3-reranker", home)
    with serving(home, {"demo": {"default": {"text": "hello"}}}, engine=engine, models=(model,)) as running:
        yield running


def rank(live: Live, path: str = "/v1/rerank", **fields: Any) -> Any:
    body = {"model": MODEL, "query": "what is in the world", "documents": DOCUMENTS, **fields}
    return live.post(path, body)


@pytest.mark.parametrize("path", PATHS)
def test_documents_come_back_best_first(path: str, ranking: Live) -> None:
    reply = rank(ranking, path)
    assert reply.status_code == 200, reply.text
    told = reply.json()
    scores = [result["relevance_score"] for result in told["results"]]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 4
    assert all(0 <= score <= 1 for score in scores)
    assert sorted(result["index"] for result in told["results"]) == [0, 1, 2, 3]
    assert all("document" not in result for result in told["results"])
    tokens = told["usage"]["total_tokens"]
    assert tokens == told["usage"]["prompt_tokens"] == told["meta"]["billed_units"]["input_tokens"] > 100
    assert told["id"].startswith("ask_")


def test_the_same_scores_whatever_the_documents_form_and_order(ranking: Live) -> None:
    plain = rank(ranking).json()["results"]
    turned = [{"text": text} for text in reversed(DOCUMENTS)]
    other = rank(ranking, documents=turned, query={"text": "what is in the world"}, return_documents=True).json()
    by_text = {result["document"]["text"]: result["relevance_score"] for result in other["results"]}
    for result in plain:
        assert by_text[DOCUMENTS[result["index"]]] == pytest.approx(result["relevance_score"], abs=1e-4)


def test_only_the_best_are_told_when_so_many_are_wanted(ranking: Live) -> None:
    whole = rank(ranking).json()["results"]
    best = rank(ranking, top_n=2).json()["results"]
    assert [result["index"] for result in best] == [result["index"] for result in whole[:2]]
    assert len(rank(ranking, top_n=100).json()["results"]) == 4


def test_a_model_that_is_no_reranker_does_not_pretend(ranking: Live) -> None:
    error = error_of(rank(ranking, model="demo"), 400)
    assert error["param"] == "model"
    assert "no reranker" in error["message"]
    chat = ranking.post("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]})
    assert error_of(chat, 400)["param"] in ("model", "messages")


@pytest.mark.parametrize("field", REFUSED)
def test_fields_that_would_change_the_answer_are_refused_by_name(field: str, ranking: Live) -> None:
    assert error_of(rank(ranking, **{field: 1}), 400)["param"] == field


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"documents": []}, "documents"),
        ({"documents": ["x"] * (DOCUMENTS_MAX + 1)}, "documents"),
        ({"documents": ["x", ""]}, "documents[1]"),
        ({"documents": [{"title": "x"}]}, "documents[0]"),
        ({"documents": [{"text": "x", "image": "y"}]}, "documents[0]"),
        ({"documents": [7]}, "documents[0]"),
        ({"documents": "hello"}, "documents"),
        ({"query": " "}, "query"),
        ({"query": ["x"]}, "query"),
        ({"top_n": 0}, "top_n"),
        ({"top_n": "3"}, "top_n"),
        ({"topn": 3}, "topn"),
        ({"documents": ["word " * 9000]}, "messages"),
    ],
)
def test_what_cannot_be_is_told_with_its_place(fields: dict[str, Any], param: str, ranking: Live) -> None:
    assert error_of(rank(ranking, **fields), 400)["param"] == param
