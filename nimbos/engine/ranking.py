"""How a reranker is asked, and where its score stands.

Three kinds, told apart by what the GGUF itself says:
    decoder with a head     pooling type rank and labels: libllama gives the share of "yes" (Qwen3-Reranker)
    decoder without         named a reranker: the logits of the words "yes" and "no" after the prompt
    encoder with a head     pooling type rank, not causal: one number, which the logistic function maps to 0 … 1 (BGE)
Anything else cannot be asked and is refused when it is loaded.
Source: the model cards of Qwen3-Reranker and bge-reranker-v2; llama-graph.cpp (`build_pooling`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from nimbos.engine.model import Model
from nimbos.errors import AnswerFailed, ModelUnusable
from nimbos.types import Text

# The prompt that Qwen3-Reranker was trained with, for files that do not bring their own.
_CHATML_PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a web '
    "search query, retrieve relevant passages that answer the query\n<Query>: {query}\n<Document>: {document}"
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
_PLACES = re.compile(r"(\{query\}|\{document\})")
TEMPLATE_CHARACTERS_MAX = 65_536


class Ranking:
    def __init__(self, model: Model, limit_tokens: int) -> None:
        """`limit_tokens`: the longest prompt. Raises: ModelUnusable."""
        self.limit_tokens = limit_tokens
        self._model = model
        self._segments: list[tuple[str, bool]] = []  # of the template, each with whether it is a mark
        self._yes = 0
        self._words: tuple[int, int] | None = None
        if not model.causal:
            self._check_encoder()
            return
        self._segments = self._read_template()
        if model.pools:
            self._yes = self._label("yes")
        else:
            self._words = self._word("yes"), self._word("no")

    def tokens(self, query: Text, document: Text) -> list[int]:
        """The prompt of one document. Texts never become control tokens."""
        if not self._segments:
            return self._pair(query.text, document.text)
        ids: list[int] = []
        for segment, is_mark in self._segments:
            filled = {"{query}": query.text, "{document}": document.text}
            text = segment if is_mark else "".join(filled.get(part, part) for part in _PLACES.split(segment))
            ids += self._model.tokenize(_bytes(text), is_mark)
        bos = self._model.vocab.bos
        return [bos, *ids] if self._model.adds_bos and bos is not None and ids[:1] != [bos] else ids

    def score(self, sequence: int, row: int) -> float:
        """After `decode`: of the prompt in this sequence, whose last token has the output `row`.

        Raises: AnswerFailed when the model's numbers are none.
        """
        if self._words is not None:
            yes, no = (float(self._model.logits(row + 1)[row][word]) for word in self._words)
            value = yes - no
        else:
            value = float(self._model.embedding(sequence)[self._yes])
        if not math.isfinite(value):
            raise AnswerFailed("The model's scores are not finite numbers.")
        is_share = self._words is None and self._model.causal
        return min(1.0, max(0.0, value)) if is_share else _logistic(value)

    def _pair(self, query: str, document: str) -> list[int]:
        """As the tokenizer of an encoder joins two texts."""
        model, vocab = self._model, self._model.vocab
        end = vocab.eos if vocab.eos is not None else model.separator
        ends = [end] if model.adds_eos and end is not None else []
        begins = [vocab.bos] if model.adds_bos and vocab.bos is not None else []
        between = [model.separator] if model.adds_separator and model.separator is not None else []
        first, second = model.tokenize(_bytes(query), False), model.tokenize(_bytes(document), False)
        return [*begins, *first, *ends, *between, *second, *ends]

    def _check_encoder(self) -> None:
        if not self._model.pools:
            raise self._unusable("it is an encoder without a classification head")
        if self._model.head_outputs != 1:
            raise self._unusable(f"its classification head has {self._model.head_outputs} outputs, and not one score")

    def _read_template(self) -> list[tuple[str, bool]]:
        template = self._model.rerank_template
        marks = [self._model.vocab.pieces[token].decode(errors="replace") for token in self._model.vocab.control]
        if not template and {"<|im_start|>", "<|im_end|>"} <= set(marks):
            template = _CHATML_PROMPT
        if len(template) > TEMPLATE_CHARACTERS_MAX or {"{query}", "{document}"} - set(_PLACES.findall(template)):
            raise self._unusable("it brings no prompt with {query} and {document}, and is of no known family")
        return list(_split(template, [mark for mark in marks if mark]))

    def _label(self, wanted: str) -> int:
        labels = self._model.head_labels
        if wanted not in labels:
            raise self._unusable(f"its classification head tells {', '.join(labels)[:200]}, and not {wanted!r}")
        return labels.index(wanted)

    def _word(self, word: str) -> int:
        ids = self._model.tokenize(word.encode(), False)
        if len(ids) != 1:
            raise self._unusable(f"{word!r} is not one token of its vocabulary")
        return ids[0]

    def _unusable(self, reason: str) -> ModelUnusable:
        return ModelUnusable(str(self._model.path), reason=f"as a reranker, {reason}")


def _split(template: str, marks: list[str]) -> Iterator[tuple[str, bool]]:
    pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
    parts = re.split(f"({pattern})", template) if pattern else [template]
    for number, part in enumerate(parts):
        if part:
            yield part, number % 2 == 1


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")
