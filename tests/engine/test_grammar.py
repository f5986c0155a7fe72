"""Grammars on a small vocabulary: what is allowed, what is forced, what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable

import numpy as np
import pytest

from nimbos.engine.grammar import MAX_SOURCE_BYTES, GrammarFactory, Matcher
from nimbos.engine.vocab import Vocab
from nimbos.errors import AnswerFailed, InvalidRequest, NimbosError
from nimbos.types import Grammar
from tests.engine.small_vocab import CONTROL, small_vocab

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return small_vocab()


@pytest.fixture(scope="module")
def factory(vocab: Vocab) -> GrammarFactory:
    return GrammarFactory(vocab)


def schema(value: object) -> Grammar:
    return Grammar(kind="json_schema", source=json.dumps(value))


def allowed(matcher: Matcher, vocab: Vocab) -> set[int]:
    mask = np.zeros(len(vocab), dtype=np.bool_)
    matcher.mask_into(mask)
    return set(np.flatnonzero(mask).tolist())


def accept_text(matcher: Matcher, text: bytes) -> bool:
    return all(matcher.accept(byte) for byte in text)


def matches(factory: GrammarFactory, grammar: Grammar, text: str) -> bool:
    matcher = factory.compile(grammar)
    return accept_text(matcher, text.encode()) and matcher.accepting


def walk(matcher: Matcher, vocab: Vocab, choices: Iterable[int]) -> bytes:
    """Takes forced tokens, and an allowed one by number where there is a choice, until the grammar stops."""
    out = b""
    for choice in choices:
        if matcher.stopped:
            return out
        forced = matcher.forced()
        open_to = sorted(allowed(matcher, vocab) - vocab.eog)
        for token in forced or (open_to[choice % len(open_to)],):
            assert matcher.accept(token), (out, token)
            out += vocab.pieces[token]
    return out


@pytest.mark.parametrize("seed", range(8))
def test_any_walk_through_the_mask_writes_json_of_the_schema(factory: GrammarFactory, vocab: Vocab, seed: int) -> None:
    choices = np.random.default_rng(seed).integers(0, 1000, 60).tolist()
    text = walk(factory.compile(schema(PERSON)), vocab, [*choices, *[ord("}")] * 300])
    start, _, rest = text.decode(errors="replace").partition('{"name": "')
    assert start == "" and rest
    if text.endswith(b"}"):
        value = json.loads(text)
        assert set(value) == {"name", "age"} and isinstance(value["age"], int)


def test_json_has_one_space_after_separators_and_none_elsewhere(factory: GrammarFactory) -> None:
    grammar = schema(PERSON)
    assert matches(factory, grammar, '{"name": "Ada", "age": 36}')
    for text in ('{"name":"Ada","age":36}', '{ "name": "Ada", "age": 36}', '{"name": "Ada",  "age": 36}'):
        assert not matches(factory, grammar, text)


def test_forced_tokens_are_the_only_way_and_count_as_the_tokenizer_writes_them(
    factory: GrammarFactory, vocab: Vocab
) -> None:
    matcher = factory.compile(schema(PERSON))
    forced = matcher.forced()
    assert len(forced) < len(vocab.join(forced)) and b'{"name": "'.startswith(vocab.join(forced))
    assert forced == tuple(vocab.tokenize(vocab.join(forced), False))
    assert all(matcher.accept(token) for token in forced)


def test_end_tokens_are_allowed_exactly_when_the_text_is_complete(factory: GrammarFactory, vocab: Vocab) -> None:
    matcher = factory.compile(Grammar(kind="regex", source="ab+"))
    assert not matcher.accepting and not allowed(matcher, vocab) & vocab.eog
    assert accept_text(matcher, b"ab")
    assert matcher.accepting and not matcher.stopped
    assert allowed(matcher, vocab) == {ord("b"), *vocab.eog}


@pytest.mark.parametrize("kind_and_source", [("regex", "ab"), ("lark", 'start: "ab"'), ("gbnf", 'root ::= "a" "b"')])
def test_a_text_that_nothing_can_be_added_to_is_stopped(
    factory: GrammarFactory, kind_and_source: tuple[str, str]
) -> None:
    matcher = factory.compile(Grammar(kind=kind_and_source[0], source=kind_and_source[1]))  # type: ignore[arg-type]
    assert matcher.accept(ord("a")) and not matcher.stopped
    assert matcher.accept(ord("b")) and matcher.stopped and matcher.error is None


def test_a_wrong_token_is_an_error_that_stays(factory: GrammarFactory) -> None:
    matcher = factory.compile(Grammar(kind="regex", source="ab"))
    assert not matcher.accept(ord("x"))
    assert matcher.error and not matcher.stopped
    with pytest.raises(AnswerFailed):
        matcher.mask_into(np.zeros(300, np.bool_))


def test_copies_go_apart(factory: GrammarFactory, vocab: Vocab) -> None:
    matcher = factory.compile(Grammar(kind="regex", source="a(b|c)d"))
    assert matcher.accept(ord("a"))
    before = allowed(matcher, vocab)
    twin = matcher.copy()
    assert twin.accept(ord("b"))
    assert allowed(matcher, vocab) == before == {ord("b"), ord("c")}
    assert allowed(twin, vocab) == {ord("d")}


def test_control_tokens_are_no_text_but_lark_can_name_them(factory: GrammarFactory, vocab: Vocab) -> None:
    start = vocab.pieces.index(CONTROL[0])
    as_text = factory.compile(Grammar(kind="regex", source=r"<\|im_start\|>"))
    assert start not in allowed(as_text, vocab) and accept_text(as_text, CONTROL[0])
    free = factory.compile(Grammar(kind="regex", source=r"(.|\n)*"))
    assert not allowed(free, vocab) & (vocab.control - vocab.eog)
    named = factory.compile(Grammar(kind="lark", source='start: <|im_start|> "a"'))
    assert allowed(named, vocab) == {start}


def test_added_tokens_are_text(factory: GrammarFactory, vocab: Vocab) -> None:
    call = vocab.pieces.index(b"<tool_call>")
    matcher = factory.compile(Grammar(kind="lark", source='start: "<tool_call>" /[0-9]/'))
    assert call in allowed(matcher, vocab) and matcher.forced() == (call,)


@pytest.mark.parametrize("size", range(300, 334))
def test_masks_fit_vocabularies_of_any_size(size: int) -> None:
    filler = tuple(b"" for _ in range(size - len(small_vocab())))
    vocab = small_vocab()
    vocab = Vocab(
        pieces=vocab.pieces + filler,
        control=vocab.control,
        eog=vocab.eog,
        eos=vocab.eos,
        bos=None,
        tokenize=vocab.tokenize,
    )
    matcher = GrammarFactory(vocab).compile(Grammar(kind="regex", source="a?"))
    assert allowed(matcher, vocab) == {ord("a"), *vocab.eog}


def test_a_model_without_an_end_token_stops_too() -> None:
    vocab = small_vocab(ends=False)
    matcher = GrammarFactory(vocab).compile(Grammar(kind="regex", source="ab"))
    assert accept_text(matcher, b"ab") and matcher.stopped
    assert allowed(matcher, vocab) == set()


def test_a_tokenizer_that_changes_forced_text_is_overruled() -> None:
    honest = small_vocab()
    vocab = Vocab(
        pieces=honest.pieces,
        control=honest.control,
        eog=honest.eog,
        eos=honest.eos,
        bos=None,
        tokenize=lambda text, special: honest.tokenize(b" " + text, special),
    )
    forced = GrammarFactory(vocab).compile(Grammar(kind="regex", source="hello(!|[?])")).forced()
    assert forced and b"hello".startswith(vocab.join(forced))


GBNF = [
    (r'root ::= "yes" | "no"', ["yes", "no"], ["maybe", ""]),
    (r'root ::= "\u0041" [\u0430-\u0433]{2,3} "\U0001F600"?', ["Aаб", "Aабг😀"], ["Aa", "Aа"]),
    ('root ::= item ("," item)*\nitem ::= [0-9]+ # digits', ["1", "12,3"], ["1,", ","]),
    (r'root ::= "\"" [^"\\\x0A]* "\"" "\\"', ['"ab/c"\\'], ['"a\n"\\']),
]


@pytest.mark.parametrize(("source", "good", "bad"), GBNF)
def test_gbnf(factory: GrammarFactory, source: str, good: list[str], bad: list[str]) -> None:
    grammar = Grammar(kind="gbnf", source=source)
    assert [text for text in good if matches(factory, grammar, text)] == good
    assert [text for text in bad if matches(factory, grammar, text)] == []


REFUSED = [
    ("json_schema", "nonsense", "not JSON"),
    ("json_schema", "[]", "not an object"),
    ("json_schema", "true", "not an object"),
    ("json_schema", '{"type": "text"}', "Invalid type"),
    ("json_schema", '{"not": {"type": "string"}}', '"not"'),
    ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
    ("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "look-around"),
    ("json_schema", '{"type": "string", "format": "sonnet"}', "sonnet"),
    ("json_schema", '{"$ref": "http://example.com/x"}', "example.com"),
    ("json_schema", '{"anyOf": []}', "Unsatisfiable"),
    ("json_schema", '{"x-guidance": {"lenient": true}, "not": {}}', "x-guidance"),
    ("json_schema", '{"a":' * 2000 + "1" + "}" * 2000, ""),
    ("json_schema", '{"const": "\ud800"}', "not JSON"),
    ("regex", "(a", "unclosed"),
    ("regex", r"(a)\1", "backreferences"),
    ("lark", 'start: "a" missing', "missing"),
    ("lark", "start: " + "(" * 3000 + '"a"' + ")" * 3000, "nested"),
    ("gbnf", 'root ::= "a" missing', "missing"),
    ("gbnf", 'start ::= "a"', "root"),
    ("gbnf", 'root ::= "a\\', ""),
    ("gbnf", "root ::= " + "(" * 5000, "nested"),
    ("gbnf", r'root ::= "\ud800"', "character"),
    ("regex", "a" * (MAX_SOURCE_BYTES + 1), "bytes"),
]


@pytest.mark.parametrize(("kind", "source", "reason"), REFUSED)
def test_a_grammar_that_cannot_be_kept_is_refused_with_the_reason(
    factory: GrammarFactory, kind: str, source: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=r"grammar cannot be used") as caught:
        factory.compile(Grammar(kind=kind, source=source))  # type: ignore[arg-type]
    assert reason in caught.value.message and caught.value.param == "response_format"
    assert len(caught.value.message) < 700


HOSTILE = ["(a?){300}a{300}", "(((a{1,100}){1,100}){1,100}){1,100}", r"(\p{L}{1,500}\w{1,500}){1,500}", ".*a.{5000}"]


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_expression_fails_by_itself(factory: GrammarFactory, vocab: Vocab, source: str) -> None:
    """It is refused, or fails its own answer, or goes on; it never hangs, and the factory still works."""
    try:
        matcher = factory.compile(Grammar(kind="regex", source=source))
        for _ in range(200):
            if not allowed(matcher, vocab) or not matcher.accept(ord("a")):
                break
    except NimbosError as error:
        assert isinstance(error, AnswerFailed | InvalidRequest)
    assert matches(factory, Grammar(kind="regex", source="ab"), "ab")


def test_nothing_of_a_text_that_fails_is_printed(factory: GrammarFactory, capfd: pytest.CaptureFixture[str]) -> None:
    matcher = factory.compile(Grammar(kind="regex", source="secret+[a-z]{3}"))
    assert not accept_text(matcher, b"secretZ")
    assert capfd.readouterr() == ("", "")


def test_compiling_from_many_threads(vocab: Vocab) -> None:
    factory = GrammarFactory(vocab)
    barrier = threading.Barrier(8)
    results: list[bool] = []

    def compile_one(number: int) -> None:
        barrier.wait()
        results.append(matches(factory, Grammar(kind="regex", source=f"x{number}y"), f"x{number}y"))

    threads = [threading.Thread(target=compile_one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
