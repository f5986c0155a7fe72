"""Prompts: text to token ids, in the engine process's own thread, never inside a step.

Results are kept by hash of the text, because agents send the same long beginnings again and again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from nimbos.engine.grammar import GrammarFactory
from nimbos.engine.model import Model
from nimbos.engine.protocol import Prepare, PreparedReply
from nimbos.engine.ranking import Ranking
from nimbos.errors import InvalidRequest, PromptTooLong
from nimbos.types import Ask, Kind, Part, Text

REMEMBERED_TOKENS = 2_000_000
GRAMMARS_CHECKED = 256
_MAKES = {Kind.GENERATE: "text", Kind.EMBED: "embeddings", Kind.RERANK: "scores of documents"}


class Prompts:
    def __init__(self, model: Model, limit_tokens: int, ranking: Ranking | None = None) -> None:
        """`limit_tokens`: the longest sequence, prompt and answer together. `ranking`: of a reranker."""
        self._model = model
        self._ranking = ranking
        self._limit = limit_tokens
        self._known: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()
        self._held = 0
        self._sound_grammars: OrderedDict[bytes, None] = OrderedDict()

    def prepare(self, request: Prepare, grammars: GrammarFactory) -> PreparedReply:
        """Tokenizes, and tries the grammar, so that what is wrong with either is said before anything is paid for.

        Raises: PromptTooLong, InvalidRequest.
        """
        ask = request.ask
        if ask.kind is not self._model.kind:
            able, wanted = _MAKES[self._model.kind], _MAKES[ask.kind]
            raise InvalidRequest(f"The model {ask.model!r} makes {able}, and this asks for {wanted}.", param="model")
        if ask.kind is Kind.RERANK:
            inputs = self._documents(ask)
        elif ask.kind is Kind.EMBED:
            inputs = tuple(self._whole((part,), ask.account) for part in ask.parts)
        else:
            inputs = (self._whole(ask.parts, ask.account),)
        for ids in inputs:
            self._check(ids, ask)
        if ask.grammar is not None:
            self._check_grammar(ask, grammars)
        return PreparedReply(number=request.number, inputs=inputs)

    def _check(self, ids: tuple[int, ...], ask: Ask) -> None:
        limit = self._limit - 1 if ask.kind is Kind.GENERATE else self._limit
        if len(ids) > limit:
            raise PromptTooLong(have=len(ids), limit=limit)
        if not ids:
            raise InvalidRequest("The prompt is empty, and this model has no token to begin with.", param="messages")
        if min(ids) < 0 or max(ids) >= self._model.n_vocab:
            raise InvalidRequest(f"A token id is outside of 0 … {self._model.n_vocab - 1}.", param="prompt")

    def _documents(self, ask: Ask) -> tuple[tuple[int, ...], ...]:
        """A prompt for each document, all with the query."""
        assert self._ranking is not None
        texts = [part for part in ask.parts if isinstance(part, Text)]
        if len(texts) != len(ask.parts) or len(texts) < 2:
            raise InvalidRequest("A query and at least one document are needed, as text.", param="documents")
        query, *documents = texts
        return tuple(tuple(self._ranking.tokens(query, document)) for document in documents)

    def _check_grammar(self, ask: Ask, grammars: GrammarFactory) -> None:
        assert ask.grammar is not None
        key = hashlib.sha256(f"{ask.grammar.kind}\0{ask.grammar.source}".encode("utf-8", "surrogatepass")).digest()
        if key not in self._sound_grammars:
            grammars.compile(ask.grammar)
            self._sound_grammars[key] = None
            if len(self._sound_grammars) > GRAMMARS_CHECKED:
                self._sound_grammars.popitem(last=False)

    def _whole(self, parts: tuple[Part, ...], account: str) -> tuple[int, ...]:
        """All parts' ids, after the model's begin-of-sequence token if it wants one and the text has none."""
        ids = [token for part in parts for token in self._ids(part, account)]
        bos, eos = self._model.vocab.bos, self._model.vocab.eos
        if bos is not None and self._model.adds_bos and ids[:1] != [bos]:
            ids.insert(0, bos)
        if self._model.kind is Kind.EMBED and eos is not None and self._model.adds_eos and ids[-1:] != [eos]:
            ids.append(eos)
        return tuple(ids)

    def _ids(self, part: Part, account: str) -> tuple[int, ...]:
        if not isinstance(part, Text):
            return part.ids
        text = part.text.encode("utf-8", "replace")
        key = hashlib.sha256(f"{account}\0{part.special}\0".encode() + text).digest()  # never shared: timing would tell
        known = self._known.get(key)
        if known is None:
            known = tuple(self._model.tokenize(text, part.special))
            self._known[key] = known
            self._held += len(known)
            while self._held > REMEMBERED_TOKENS and len(self._known) > 1:
                self._held -= len(self._known.popitem(last=False)[1])
        else:
            self._known.move_to_end(key)
        return known
