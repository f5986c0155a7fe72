"""From token ids to text: against a whole-string reference, cut and drained anywhere, and replayed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nimbos.engine.answer import Answer
from nimbos.engine.grammar import GrammarFactory, Matcher
from nimbos.engine.text import Phase, StopMatcher
from nimbos.engine.vocab import Vocab
from nimbos.errors import AnswerFailed
from nimbos.types import (
    Ask,
    Channel,
    ChosenLogprob,
    FinishReason,
    Grammar,
    Sampling,
    Thinking,
    TokenChunk,
    TokenLogprob,
)
from tests.engine.small_vocab import small_vocab

VOCAB = small_vocab()
FACTORY = GrammarFactory(VOCAB)
IM_START, IM_END, OPEN, CLOSE = (
    VOCAB.pieces.index(p) for p in (b"<|im_start|>", b"<|im_end|>", b"<think>", b"</think>")
)
MARKS = [("<think>", "</think>"), ("<|im_start|>think", "\n<|im_start|>\n"), ("◁think▷", "◁/think▷"), ("aab", "aaab")]
BITS = [
    *(b"<", b"</", b"think", b">", b">\n\n", b"\n", b"\n\n", b"END", b"EN", b"ND", b"E", b"a", b"b", b"aa", b"ab"),
    *("é", "😀", "◁", "◁/think▷", "◁think▷"),
    *(b"\xf0\x9f", b"\x98\x80", b"\xc3", b"\xa9", b"\xff", b"\xe2\x97"),
]


def spell(text: bytes | str) -> tuple[int, ...]:
    return tuple(VOCAB.tokenize(text.encode() if isinstance(text, str) else text, True))


ids_strategy = st.lists(
    st.one_of(
        st.sampled_from([spell(bit) for bit in BITS]),
        st.sampled_from([(OPEN,), (CLOSE,), (IM_START,)]),
        st.integers(0, 255).map(lambda byte: (byte,)),
    ),
    max_size=40,
).map(lambda parts: [token for part in parts for token in part])
stops_strategy = st.lists(
    st.sampled_from(["END", "NDEND", "ab", "aab", "aa", "\n\n", "é", "\ufffd", "think", "aaaaab", "<"]), max_size=3
)
thinking_strategy = st.none() | st.builds(
    lambda marks, started: Thinking(open=marks[0], close=marks[1], budget_tokens=10_000, started=started),
    st.sampled_from(MARKS),
    st.booleans(),
)


def ask(**fields: object) -> Ask:
    return Ask(**{"id": "ask_1", "account": "acct_1", "model": "small", **fields})  # type: ignore[arg-type]


def answer(ask_: Ask, *, matcher: Matcher | None = None, max_tokens: int = 100_000) -> Answer:
    return Answer(VOCAB, ask_, 0, matcher, (), max_tokens)


def grammar(kind: str, source: str) -> Matcher:
    return FACTORY.compile(Grammar(kind=kind, source=source))  # type: ignore[arg-type]


def text_of(chunks: list[TokenChunk], channel: Channel = Channel.TEXT) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.channel is channel)


def ids_of(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.ids]


def take(target: Answer, ids: list[int] | tuple[int, ...]) -> list[TokenChunk]:
    for token in ids:
        target.accept(token)
    return target.drain()


def first_stop(text: str, stops: tuple[str, ...]) -> str | None:
    """The text before the stop string that ends first (of those that end together, the longest)."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else None


def reference(ids: list[int], ask_: Ask) -> tuple[str, str, bool]:
    """(text, thinking, stopped) of all tokens at once."""
    raw = b"".join(VOCAB.pieces[token] for token in ids)
    shown = b"".join(bytes([token not in VOCAB.control]) * len(VOCAB.pieces[token]) for token in ids)
    sections: list[tuple[int, int]] = [(0, len(raw))]
    strip = [False]
    if ask_.thinking is not None:
        start, rest = 0, 0
        if not ask_.thinking.started:
            start = raw.find(ask_.thinking.open.encode())
            rest = start + len(ask_.thinking.open.encode())
        if start >= 0:
            end = raw.find(ask_.thinking.close.encode(), rest)
            after = end + len(ask_.thinking.close.encode())
            sections = [(0, start), (rest, end if end >= 0 else len(raw)), (after if end >= 0 else len(raw), len(raw))]
            strip = [False, True, True]
    texts = []
    for (begin, end), newlines in zip(sections, strip, strict=True):
        visible = bytes(raw[at] for at in range(begin, end) if shown[at])
        texts.append((visible.lstrip(b"\n") if newlines else visible).decode("utf-8", "replace"))
    before, thinking, after_text = texts[0], texts[1] if len(texts) > 1 else "", texts[2] if len(texts) > 2 else ""
    cut = first_stop(before, ask_.stop)
    if cut is not None:
        return cut, "", True
    cut = first_stop(after_text, ask_.stop)
    return before + (after_text if cut is None else cut), thinking, cut is not None


@given(ids_strategy, stops_strategy, thinking_strategy, st.integers(0, 2**32))
@settings(deadline=None, max_examples=200)
def test_text_is_that_of_the_whole_string_wherever_it_is_drained(
    ids: list[int], stops: list[str], thinking: Thinking | None, seed: int
) -> None:
    wanted = ask(stop=tuple(stops), thinking=thinking)
    generator = np.random.default_rng(seed)
    target, chunks, fed = answer(wanted, max_tokens=max(len(ids), 1)), [], []
    for token in ids:
        target.accept(token)
        fed.append(token)
        if generator.random() < 0.4:
            chunks += target.drain()
        if target.finish is not None:
            break
    chunks += target.drain()
    text, thought, stopped = reference(fed, wanted)
    if target.finish is None:  # nothing fed at all
        assert not ids
    assert (text_of(chunks), text_of(chunks, Channel.THINKING)) == (text, thought)
    assert ids_of(chunks) == fed
    assert (target.finish is FinishReason.STOP) == stopped == (target.stopped_by is not None)
    if stopped and len(fed) > 1 and thinking is None:  # at the first token at which it can be known
        assert first_stop(reference(fed[:-1], ask())[0].rstrip("\ufffd"), wanted.stop) is None


@given(ids_strategy, stops_strategy, thinking_strategy, st.data())
@settings(deadline=None, max_examples=150)
def test_replay_repeats_and_loses_nothing(
    ids: list[int], stops: list[str], thinking: Thinking | None, data: st.DataObject
) -> None:
    wanted = ask(stop=tuple(stops), thinking=thinking)
    one = answer(wanted, max_tokens=max(len(ids), 1))
    died_at = data.draw(st.integers(0, len(ids)))
    first: list[TokenChunk] = []
    for token in ids[:died_at]:
        if one.finish is None:
            one.accept(token)
            first += one.drain()
    emitted = ids_of(first)
    two = answer(wanted, max_tokens=max(len(ids), 1))
    two.replay(emitted)
    for target in (one, two):
        for token in ids[len(emitted) :]:
            if target.finish is None:
                target.accept(token)
    rest, again = one.drain(), two.drain()
    for channel in Channel:
        assert text_of(rest, channel) == text_of(again, channel)
    assert ids_of(again) == ids_of(rest)
    for name in ("finish", "stopped_by", "output_tokens", "thinking_tokens", "phase"):
        assert getattr(two, name) == getattr(one, name)


@given(
    st.lists(st.text("ab", min_size=1, max_size=9), max_size=4),
    st.text("ab", max_size=60),
    st.lists(st.integers(0, 60)),
)
@settings(deadline=None, max_examples=300)
def test_stop_strings_that_overlap_themselves(stops: list[str], text: str, cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    released = "".join(matcher.feed(text[start:end]) for start, end in itertools.pairwise(borders))
    expected = first_stop(text, tuple(stops))
    if expected is None:
        assert matcher.hit is None and text.startswith(released)
        held = text[len(released) :]
        assert held == max(
            (end for end in ends_of(text) if any(stop.startswith(end) for stop in [*stops, ""])), key=len
        )
    else:
        assert released == expected and matcher.hit in stops and text.startswith(released + (matcher.hit or "?"))


def ends_of(text: str) -> list[str]:
    return [text[at:] for at in range(len(text) + 1)]


def test_characters_stay_whole_and_stop_strings_are_held_back() -> None:
    target = answer(ask(stop=("STOP",)))
    assert text_of(take(target, spell("é")[:1])) == ""
    assert text_of(take(target, spell("é")[1:])) == "é"
    assert text_of(take(target, spell("xST"))) == "x"
    assert text_of(take(target, spell("A"))) == "STA"
    chunks = take(target, spell("STO"))
    assert text_of(chunks) == "" and ids_of(chunks) == list(spell("STO"))
    assert text_of(take(target, spell("P"))) == ""
    assert (target.finish, target.stopped_by) == (FinishReason.STOP, "STOP")
    with pytest.raises(AnswerFailed):
        target.accept(ord("x"))


def test_an_end_token_ends_counts_and_has_no_text() -> None:
    target = answer(ask(stop=("STOP",)))
    chunks = take(target, (*spell("hi ST"), IM_START, IM_END))
    assert text_of(chunks) == "hi ST" and ids_of(chunks)[-1] == IM_END
    assert (target.finish, target.stopped_by, target.output_tokens) == (FinishReason.STOP, None, 7)


def test_a_token_that_stops_counts_and_has_no_text() -> None:
    target = answer(ask(stop=("STOP",), stop_ids=(ord("!"), ord("?")), min_tokens=2, ignore_eos=True))
    chunks = take(target, spell("!hi ST?"))  # below the minimum it is text
    assert text_of(chunks) == "!hi ST"
    assert ids_of(chunks) == list(spell("!hi ST?"))
    assert (target.finish, target.stopped_by, target.output_tokens) == (FinishReason.STOP, None, 7)


def test_an_end_that_is_asked_for_ends_also_where_ends_are_ignored() -> None:
    target = answer(ask(stop_ids=(IM_END,), min_tokens=2, ignore_eos=True))
    assert IM_END in target.banned()
    take(target, spell("hi"))
    assert set(target.banned()) == VOCAB.eog - {IM_END}
    take(target, (IM_END,))
    assert target.finish is FinishReason.STOP


def test_a_token_that_stops_does_not_stop_thinking() -> None:
    target = answer(ask(thinking=thinking(), stop_ids=(ord("!"),)))
    take(target, spell("hm! "))
    assert target.finish is None
    take(target, spell("</think>a!"))
    assert target.finish is FinishReason.STOP


def test_the_limit_releases_what_was_held_back() -> None:
    target = answer(ask(stop=("STOP",)), max_tokens=4)
    chunks = take(target, (*spell("ST"), *spell("😀")[:2]))
    assert text_of(chunks) == "ST\ufffd" and target.finish is FinishReason.LENGTH
    assert answer(ask(), max_tokens=0).finish is FinishReason.LENGTH


def test_ends_are_banned_below_min_tokens_and_under_ignore_eos() -> None:
    target = answer(ask(min_tokens=2, stop=("b",)))
    assert set(target.banned()) == VOCAB.eog
    chunks = take(target, spell("b"))  # below the minimum a stop string is text
    assert set(target.banned()) == VOCAB.eog
    chunks += take(target, spell("x"))
    assert target.banned() == () and target.finish is None and text_of(chunks) == "bx"
    target.accept(ord("b"))
    assert target.finish is FinishReason.STOP
    endless = answer(ask(ignore_eos=True), max_tokens=3)
    assert text_of(take(endless, (ord("a"), IM_END, ord("b")))) == "ab"
    assert set(endless.banned()) == VOCAB.eog and endless.finish is FinishReason.LENGTH


def thinking(**fields: object) -> Thinking:
    return Thinking(**{"open": "<think>", "close": "</think>", "budget_tokens": 100, "started": True, **fields})  # type: ignore[arg-type]


def test_an_end_that_brings_a_stop_string_to_light_is_not_the_budgets() -> None:
    """What may begin a mark is held back, and may be a stop string."""
    target = answer(ask(stop=("<th",), thinking=thinking(started=False)))
    target.allow(len(spell("<th")), last=True)
    take(target, spell("<th"))
    assert (target.finish, target.stopped_by, target.budget_ended) == (FinishReason.STOP, "<th", False)


def test_a_closing_mark_that_is_being_written_is_beyond_no_budget() -> None:
    """It is several tokens here, which look like thinking until the last of them has come."""
    target = answer(ask(thinking=thinking(close="(end)", budget_tokens=2, farewell="(end)")), max_tokens=5)
    take(target, spell("hm"))
    for token in spell("(en"):
        assert target.forced()[0] == token
        target.accept(token)
        assert target.thinking_tokens == 2
    assert (target.finish, target.thinking_tokens, target.output_tokens) == (FinishReason.LENGTH, 2, 5)


def drive(target: Answer, sampled: list[int]) -> list[TokenChunk]:
    """The worker's loop; `sampled` says what the model would choose."""
    chunks: list[TokenChunk] = []
    for token in sampled:
        while target.finish is None and (forced := target.forced()):
            for planned in forced:
                if target.finish is None:
                    target.accept(planned)
        if target.finish is None:
            assert token not in target.banned()
            target.accept(target.instead_of(token))
        chunks += target.drain()
    return chunks


def thought_tokens(ids: list[int], close: str, *, started: bool) -> int:
    """Tokens of the block that begin before its close mark; an end token that was read over is one of them."""
    pieces = [b"" if token in VOCAB.eog else VOCAB.pieces[token] for token in ids]
    closed_at = b"".join(pieces).index(close.encode())
    starts = [len(b"".join(pieces[:at])) for at in range(len(ids))]
    inside = [at < closed_at or (at == closed_at and not piece) for at, piece in zip(starts, pieces, strict=True)]
    return sum(inside[0 if started else 1 :])


@given(
    st.integers(0, 25),
    st.sampled_from(["", "</think>", "\nEnough, the answer:\n</think>\n\n", "no mark at all"]),
    st.sampled_from(["</think>", "</thoughts>"]),
    st.lists(st.sampled_from([*spell("</thoughts"), *spell("\nab<"), IM_END, CLOSE]), min_size=40, max_size=40),
    st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_thinking_never_overruns_its_budget_and_always_ends(
    budget: int, farewell: str, close: str, sampled: list[int], started: bool
) -> None:
    farewell = farewell.replace("</think>", close)
    wanted = ask(thinking=thinking(close=close, farewell=farewell, budget_tokens=budget, started=started))
    target = answer(wanted, max_tokens=200)
    if not started:
        target.accept(OPEN)
    sampled = [token for token in sampled if token != CLOSE or close != "</think>"]
    chunks = drive(target, [*sampled, IM_END])
    assert target.phase is Phase.AFTER and target.finish is FinishReason.STOP
    assert target.thinking_tokens == thought_tokens(ids_of(chunks), close, started=started) <= budget
    assert close not in text_of(chunks) + text_of(chunks, Channel.THINKING)
    ids = ids_of(chunks)
    again = answer(wanted, max_tokens=200)
    again.replay(ids[: len(ids) // 2])
    rest = take(again, ids[len(ids) // 2 :])
    assert text_of(chunks).endswith(text_of(rest)) and again.thinking_tokens == target.thinking_tokens


def test_the_farewell_is_reserved_from_the_budget() -> None:
    farewell = "ENDEND</think>\n\n"
    target = answer(ask(thinking=thinking(budget_tokens=5, farewell=farewell)))
    assert take(target, spell("abc"))[0].channel is Channel.THINKING
    assert target.forced() == (*spell("ENDEND"), CLOSE, *spell("\n\n"))
    chunks = take(target, target.forced())
    assert text_of(chunks, Channel.THINKING) == "ENDEND" and text_of(chunks) == ""
    assert target.thinking_tokens == 5 and target.output_tokens == 7
    assert text_of(take(target, spell("hi"))) == "hi"
    tight = answer(ask(thinking=thinking(budget_tokens=1, farewell=farewell)))
    tight.accept(ord("a"))
    assert tight.forced()[0] == CLOSE
    closed = answer(ask(thinking=thinking(budget_tokens=0, farewell=farewell)))
    assert closed.forced() == (CLOSE, *spell("\n\n"))
    assert answer(ask(thinking=thinking(budget_tokens=0)), max_tokens=1).forced() == (CLOSE,)


def test_an_end_inside_thinking_becomes_the_close_mark() -> None:
    target = answer(ask(thinking=thinking()))
    target.accept(ord("a"))
    assert target.instead_of(ord("b")) == ord("b")
    assert target.instead_of(IM_END) == CLOSE
    target.accept(CLOSE)
    assert target.phase is Phase.AFTER and target.finish is None and target.thinking_tokens == 1
    accepted = answer(ask(thinking=thinking()))
    accepted.accept(IM_END)
    assert accepted.finish is None and accepted.forced() == (CLOSE,)


def test_marks_of_a_second_block_are_banned() -> None:
    target = answer(ask(thinking=thinking(started=False)))
    assert target.banned() == ()
    target.accept(OPEN)
    assert target.banned() == (OPEN,)
    target.accept(CLOSE)
    assert set(target.banned()) == {OPEN, CLOSE}


def test_grammar_begins_after_thinking_and_forces_its_text() -> None:
    names = '{"name": {"enum": ["Ada", "Bob"]}}'
    source = f'{{"type": "object", "properties": {names}, "required": ["name"], "additionalProperties": false}}'
    wanted = ask(thinking=thinking(farewell="so</think>\n\n"))
    target = answer(wanted, matcher=grammar("json_schema", source))
    assert target.constraint() is None and target.forced() == ()
    chunks = take(target, (*spell("hm"), CLOSE))
    assert target.forced() == spell("\n\n")  # goes on as after a farewell, outside of the grammar
    chunks += take(target, target.forced())
    chunks += take(target, target.forced())
    mask = target.constraint()
    while mask is not None and target.finish is None:
        forced = target.forced() or (int(np.flatnonzero(mask)[0]),)
        chunks += take(target, forced)
        mask = target.constraint() if target.finish is None else None
    assert text_of(chunks) == '{"name": "Ada"}' and text_of(chunks, Channel.THINKING) == "hm"
    assert target.finish is FinishReason.STOP and target.thinking_tokens == 2


def test_text_in_the_closing_token_is_not_part_of_a_constrained_answer() -> None:
    vocab = small_vocab(added=(b"</think>Sure: ",))
    matcher = GrammarFactory(vocab).compile(Grammar(kind="regex", source="ab"))
    target = Answer(vocab, ask(thinking=thinking()), 0, matcher, (), 100)
    target.accept(vocab.pieces.index(b"</think>Sure: "))
    assert text_of(take(target, spell("ab"))) == "ab" and target.finish is FinishReason.STOP


def test_grammar_survives_replay() -> None:
    target = answer(ask(), matcher=grammar("regex", "a(b|c)d(e|f)"))
    target.replay(spell("ab"))
    assert target.forced() == (ord("d"),)
    assert text_of(take(target, spell("df"))) == "df" and target.finish is FinishReason.STOP
    with pytest.raises(AnswerFailed, match="grammar"):
        answer(ask(), matcher=grammar("regex", "ab")).accept(ord("x"))


def test_a_finished_grammar_ends_even_an_answer_that_should_go_on() -> None:
    target = answer(ask(min_tokens=9), matcher=grammar("regex", "ab*"))
    assert target.banned() == ()
    target.accept(ord("a"))
    mask = target.constraint()
    assert mask is not None and np.flatnonzero(mask).tolist() == [ord("b")]
    short = answer(ask(ignore_eos=True), matcher=grammar("regex", "ab"))
    assert text_of(take(short, spell("ab"))) == "ab" and short.finish is FinishReason.STOP
    assert answer(ask(), matcher=grammar("regex", "")).finish is FinishReason.STOP


def test_forced_tokens_stay_within_the_limit() -> None:
    target = answer(ask(), matcher=grammar("regex", "abcdefgh"), max_tokens=3)
    assert target.forced() == spell("abc")
    take(target, target.forced())
    assert target.finish is FinishReason.LENGTH and target.forced() == ()


def test_logprobs_stand_beside_their_ids() -> None:
    wanted = ask(sampling=Sampling(logprobs=1), thinking=thinking(budget_tokens=1))
    target = answer(wanted)
    sampled = ChosenLogprob(chosen=TokenLogprob(id=ord("a"), piece=b"a", logprob=-1.5))
    target.accept(ord("a"), sampled)
    target.accept(CLOSE)
    target.accept(ord("b"))
    for chunk in target.drain():
        assert chunk.logprobs is not None
        assert tuple(entry.chosen.id for entry in chunk.logprobs) == chunk.ids
    assert answer(ask()).drain() == []


def test_penalties_see_the_prompt_and_the_answer() -> None:
    wanted = ask(sampling=Sampling(frequency_penalty=1.0, penalty_window=3))
    target = Answer(VOCAB, wanted, 0, None, (7, 8, 9), 100)
    target.accept(65)
    assert target.recent.arrays()[0].tolist() == [8, 9, 65]
    assert answer(ask()).recent.arrays()[0].tolist() == []


@pytest.mark.parametrize("token", [-1, len(VOCAB)])
def test_an_id_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(AnswerFailed):
        answer(ask()).replay((token,))


def test_a_forced_token_cannot_be_left_out() -> None:
    target = answer(ask(thinking=thinking(budget_tokens=0)))
    with pytest.raises(AnswerFailed, match="forced"):
        target.accept(ord("a"))


def test_a_vocabulary_without_ends_has_nothing_to_ban() -> None:
    vocab: Vocab = small_vocab(ends=False)
    assert Answer(vocab, ask(ignore_eos=True), 0, None, (), 5).banned() == ()


def test_a_stop_string_does_not_reach_over_thinking_and_all_comes_in_order() -> None:
    target = answer(ask(stop=("aba",), thinking=Thinking(open="<think>", close="</think>", budget_tokens=100)))
    chunks = take(target, [*spell("a"), OPEN, *spell("x"), CLOSE, *spell("bac")])
    assert [(chunk.channel, chunk.text) for chunk in chunks if chunk.text] == [
        (Channel.TEXT, "a"), (Channel.THINKING, "x"), (Channel.TEXT, "bac"),
    ]  # fmt: skip
    assert target.finish is None


@pytest.mark.parametrize(("stop", "text"), [("aab", "aaab"), ("abab", "ababbabab"), ("abac", "ababac")])
def test_a_stop_string_may_begin_within_its_own_beginning(stop: str, text: str) -> None:
    whole, single = StopMatcher([stop]), StopMatcher([stop])
    assert whole.feed(text + "z") == "".join(single.feed(character) for character in text) == text.partition(stop)[0]
    assert whole.hit == single.hit == stop


def test_what_was_given_out_begins_no_stop_string() -> None:
    matcher = StopMatcher(["aab"])
    assert [matcher.feed("a"), matcher.flush(), matcher.feed("ab")] == ["", "a", "ab"]
    assert matcher.hit is None


@pytest.mark.parametrize("end", [IM_END, ord("z")])
def test_an_end_counts_behind_the_least_number_of_tokens(end: int) -> None:
    target = answer(ask(min_tokens=3, stop_ids=(ord("z"),)))
    take(target, [end] * 3)
    assert target.finish is None
    take(target, [end])
    assert target.finish is FinishReason.STOP


def test_what_follows_the_closing_mark_of_a_farewell_comes_once() -> None:
    thinking = Thinking(open="<think>", close="</think>", budget_tokens=0, started=True, farewell="</think>\n\n")
    target = answer(ask(thinking=thinking), matcher=grammar("regex", "[0-9]{2}"))
    farewell = target.forced()
    assert VOCAB.join(farewell) == b"</think>\n\n"
    assert text_of(take(target, farewell)) == ""
    assert target.forced() == ()
    assert target.phase is Phase.AFTER


@pytest.mark.parametrize("written", [[], [ord("x")]])
def test_a_mark_that_this_vocabulary_cannot_write_ends_thinking_all_the_same(written: list[int]) -> None:
    vocab = replace(VOCAB, tokenize=lambda raw, special: list(written))
    thinking = Thinking(open="<think>", close="</think>", budget_tokens=2, started=True)
    target = Answer(vocab, ask(thinking=thinking), 0, None, (), 100)
    told = take(target, spell("ab"))
    told += take(target, target.forced())
    assert target.phase is Phase.AFTER
    told += take(target, spell("c"))
    assert text_of(told) == "c"
    assert text_of(told, Channel.THINKING) == "ab" + "x" * len(written)
