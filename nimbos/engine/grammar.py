"""Grammars: which tokens may come next so that an answer keeps a promised form, by llguidance.

Compiling belongs off the step loop (milliseconds, for a hostile schema a second); a mask costs 10-100 µs at a
vocabulary of 152,000. Grammars come from strangers: sources are limited in size, and llguidance in its memory and in
its work per step, so that the worst costs one step some 20 ms and then fails its own ask.

JSON is written as `{"key": value, "other": value}`: one space after `:` and `,` as in most of what models have read,
and no free white space anywhere, in which small models otherwise lose themselves.

Control tokens are hidden from grammars behind a byte that no text contains, so a `"<|im_end|>"` in a grammar
means these characters; a Lark grammar names the token itself as `<|im_end|>`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from numpy.typing import NDArray

from nimbos.engine.vocab import Vocab
from nimbos.errors import AnswerFailed, InvalidRequest
from nimbos.types import Grammar

MAX_SOURCE_BYTES = 128 * 1024
HIDDEN = b"\xff"  # llguidance's mark of a control token; 0xFF is in no UTF-8 text
END = b"\xff<|nimbos_end|>"  # stands after the vocabulary, for a model that has no end-of-generation token

JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,  # a keyword that is not enforced is an error
    "coerce_one_of": False,
}


class GrammarFactory:
    """Compiles grammars for one vocabulary. Safe to call from several threads."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def compile(self, grammar: Grammar) -> Matcher:
        """The first call also reads the whole vocabulary (about 0.8 s for 152,000 tokens).

        Raises: InvalidRequest with the reason, for a grammar that is wrong, uses what is not supported or is too large.
        """
        size = len(grammar.source.encode("utf-8", "surrogatepass"))
        if size > MAX_SOURCE_BYTES:
            raise _refusal(grammar, f"it has {size} bytes and at most {MAX_SOURCE_BYTES} are taken")
        matcher = LLMatcher(self._ready(), _translate(grammar), log_level=0, limits=_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # some limits are only hit by the first step
        if matcher.is_error():
            raise _refusal(grammar, _reason(matcher))
        return Matcher(matcher, self._vocab)

    def _ready(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                source = _TokenSource(self._vocab)
                self._tokenizer = LLTokenizer(source, eos_token=source.eos_token_ids)  # type: ignore[arg-type]
                source.greedy = self._tokenizer.greedy_tokenize
            return self._tokenizer


class Matcher:
    """Where one branch stands in its grammar."""

    __slots__ = ("_bits", "_ends", "_fresh", "_matcher", "_size")

    def __init__(self, matcher: LLMatcher, vocab: Vocab) -> None:
        self._matcher = matcher
        self._size = len(vocab)
        self._ends = _bits_of(vocab)
        self._bits = np.zeros(len(self._ends), dtype=np.int32)  # one bit a token, and the padding's
        self._fresh = False

    def mask_into(self, out: NDArray[np.bool_]) -> None:
        """Writes True for every token that may come next, into `out` of shape (n_vocab,).

        Raises: AnswerFailed when the grammar ran into its limits.
        """
        self._compute()
        bits = np.unpackbits(self._bits.view(np.uint8), count=self._size, bitorder="little")
        np.copyto(out, bits.view(np.bool_))

    def accept(self, token: int) -> bool:
        """False when the token breaks the grammar; the matcher then stays in `error`."""
        self._fresh = False
        return bool(self._matcher.consume_token(token))

    def forced(self) -> tuple[int, ...]:
        """The tokens that must come next, as the tokenizer would write them. Accept each of them."""
        return tuple(self._matcher.compute_ff_tokens())

    @property
    def accepting(self) -> bool:
        """The text so far satisfies the grammar (more may still be allowed)."""
        return bool(self._matcher.is_accepting())

    @property
    def stopped(self) -> bool:
        """The text so far satisfies the grammar and nothing can be added to it.

        Raises: AnswerFailed as `mask_into`.
        """
        if self.error is not None:
            return False
        if self._matcher.is_stopped():
            return True
        if not self._matcher.is_accepting():
            return False
        self._compute()  # llguidance sees the end of a last regular expression only now
        return not bool(np.any(self._bits & ~self._ends))

    @property
    def error(self) -> str | None:
        return _reason(self._matcher) if self._matcher.is_error() else None

    def copy(self) -> Matcher:
        twin = object.__new__(Matcher)
        twin._matcher = self._matcher.deep_copy()
        twin._size, twin._ends = self._size, self._ends
        twin._bits, twin._fresh = self._bits.copy(), self._fresh
        return twin

    def _compute(self) -> None:
        if self._fresh:
            return
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise AnswerFailed(f"The grammar cannot go on: {_reason(self._matcher)}")
        self._fresh = True


class _TokenSource:
    """What LLTokenizer reads a vocabulary from; the names are llguidance's."""

    is_tokenizer_wrapper = True

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self.eos_token_ids = _end_ids(vocab)
        self.eos_token_id = self.eos_token_ids[0]
        self.bos_token_id = vocab.bos
        self.special_token_ids: list[int] = []
        self.tokens = [HIDDEN + piece if token in vocab.control else piece for token, piece in enumerate(vocab.pieces)]
        self.tokens += [END] * (not vocab.eog)
        self.greedy: Callable[[str], list[int]] = _no_tokens

    def __call__(self, text: str) -> list[int]:
        """Tokenizes forced text; a tokenizer that changes it (adds a space) is overruled by the longest pieces."""
        raw = text.encode("utf-8")
        ids = self._vocab.tokenize(raw, False)
        return ids if self._vocab.join(ids) == raw else self.greedy(text)


def _no_tokens(_text: str) -> list[int]:
    return []


def _end_ids(vocab: Vocab) -> list[int]:
    first = [vocab.eos] if vocab.eos is not None and vocab.eos in vocab.eog else []
    return first + sorted(vocab.eog.difference(first)) or [len(vocab)]


def _bits_of(vocab: Vocab) -> NDArray[np.int32]:
    """The end tokens as a mask in llguidance's layout: int32 words, lowest bit first."""
    ends = _end_ids(vocab)
    flags = np.zeros((max(len(vocab), ends[-1] + 1) + 31) // 32 * 32, dtype=np.uint8)
    flags[ends] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


def _limits() -> LLParserLimits:
    """`verbose_errors` would put the grammar and the text into messages."""
    return LLParserLimits(step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=50_000, verbose_errors=False)


def _translate(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_schema":
            return _json_grammar(grammar)
        case "regex":
            return str(LLMatcher.grammar_from_regex(grammar.source))
        case "lark":
            return str(LLMatcher.grammar_from_lark(grammar.source))
        case "gbnf":
            return str(LLMatcher.grammar_from_lark(_lark_from_gbnf(grammar)))


def _json_grammar(grammar: Grammar) -> str:
    try:
        schema = msgspec.json.decode(grammar.source.encode("utf-8"))
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise _refusal(grammar, f"it is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise _refusal(grammar, "it is not an object")
    if "x-guidance" in schema:
        raise _refusal(grammar, "'x-guidance' is not supported")
    try:
        return str(LLMatcher.grammar_from_json_schema(grammar.source, overrides=JSON_OPTIONS))  # type: ignore[arg-type]
    except ValueError as error:
        raise _refusal(grammar, str(error)) from error


def _lark_from_gbnf(grammar: Grammar) -> str:
    try:
        return str(gbnf_to_lark(_ESCAPE.sub(_literal, grammar.source)))
    except (
        Exception
    ) as error:  # the converter raises plain `Exception` for an unknown rule, IndexError for a cut escape
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _refusal(grammar, reason) from error


_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


def _literal(escape: re.Match[str]) -> str:
    r"""`\u0041` and `\U00000041` in a form that Lark knows; every other escape is left alone."""
    digits = escape[1] or escape[2]
    if digits is None:
        return escape[0]
    number = int(digits, 16)
    if number > 0x10FFFF or 0xD800 <= number <= 0xDFFF:
        raise ValueError(f"{escape[0]} is no character")
    return f"\\x{number:02x}" if number < 0x80 else chr(number)


def _reason(matcher: LLMatcher) -> str:
    return str(matcher.get_error()).replace("<non-verbose/>", "").strip()


def _refusal(grammar: Grammar, reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"The {grammar.kind} grammar cannot be used: {reason[:500]}. Change it, or leave it out.",
        param="response_format",
    )
