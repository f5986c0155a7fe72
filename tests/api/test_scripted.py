"""The scripted model by itself: its file, its choice of reply, its tokens."""

from __future__ import annotations

import json
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nimbos.engine.script import MATCHED_CHARACTERS
from nimbos.engine.scripted import ScriptedSource, count_tokens, split_tokens
from nimbos.errors import InvalidRequest, ModelUnusable, PromptTooLong, UnsupportedField
from nimbos.types import Ask, Channel, Final, FinishReason, Kind, Sampling, Text, Thinking, TokenChunk, Tokens

THINKING = Thinking(open="<think>", close="</think>", budget_tokens=1000, started=True)


def source_of(folder: Path, script: dict[str, Any]) -> ScriptedSource:
    file = folder / "play.json"
    file.write_text(json.dumps(script))
    return ScriptedSource.load(file)


def ask_of(messages: list[dict[str, Any]] | str, **fields: Any) -> Ask:
    text = messages if isinstance(messages, str) else json.dumps(messages)
    return Ask(id="ask_1", account="a", model="play", parts=(Text(text),), **fields)


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


async def answer(source: ScriptedSource, ask: Ask) -> tuple[dict[int, str], dict[int, Final]]:
    texts: dict[int, str] = {}
    finals: dict[int, Final] = {}
    async for chunk in source.generate((await source.prepare(ask)).ask):
        if isinstance(chunk, TokenChunk):
            assert len(chunk.ids) == 1
            texts[chunk.branch] = texts.get(chunk.branch, "") + chunk.text
        elif isinstance(chunk, Final):
            finals[chunk.branch] = chunk
    return texts, finals


@given(st.text())
def test_tokens_join_to_their_text_and_are_as_many_as_counted(text: str) -> None:
    pieces = split_tokens(text)
    assert "".join(pieces) == text
    assert all(pieces)
    assert len(pieces) == (count_tokens(text) or (1 if text else 0))


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ("  ", 0), ("don't stop!", 5), ("a-b c\n\nd", 5), ("日本語 🌍", 2)]
)
def test_a_word_or_a_punctuation_mark_is_a_token(text: str, count: int) -> None:
    assert count_tokens(text) == count


@pytest.mark.parametrize(
    ("script", "named"),
    [
        ('{"replies": [{"match": "a", "txt": "b"}]}', "txt"),
        ('{"reply": []}', "reply"),
        ('{"replies": [{"match": "("}]}', "$.replies[0].match"),
        ('{"replies": [{"text": "b"}]}', "$.replies[0]"),
        ('{"replies": [{"match": "a", "times": 0}]}', "$.replies[0].times"),
        ('{"replies": [{"match": "a", "tokens_per_second": 0}]}', "$.replies[0].tokens_per_second"),
        ('{"replies": [{"match": "a", "tool_calls": [{"name": "x", "args": {}}]}]}', "args"),
        ('{"replies": [{"match": 5}]}', "$.replies[0].match"),
        ('{"default": {"match": "a"}}', "$.default"),
        ('{"replies": [{"match": "' + "a" * 3000 + '"}]}', "$.replies[0].match"),
        ("[]", "object"),
        ("{", "script"),
        ("\ud800", "script"),
    ],
)
def test_a_wrong_file_is_named_with_the_key_at_fault(tmp_path: Path, script: str, named: str) -> None:
    file = tmp_path / "play.json"
    file.write_bytes(script.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelUnusable) as caught:
        ScriptedSource.load(file)
    assert str(file) in caught.value.message
    assert named in caught.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable, match=r"none\.json"):
        ScriptedSource.load(tmp_path / "none.json")


async def test_the_id_is_the_files_stem_and_the_hash_its_contents(tmp_path: Path) -> None:
    one = await source_of(tmp_path, {"default": {"text": "a"}}).describe()
    two = await source_of(tmp_path, {"default": {"text": "b"}}).describe()
    assert one.id == two.id == "play"
    assert one.model_hash != two.model_hash


async def test_the_first_match_on_the_last_user_or_tool_message_wins(tmp_path: Path) -> None:
    script = {
        "replies": [
            {"match": "^tool says", "text": "from the tool"},
            {"match": "cat", "text": "first"},
            {"match": "cat|dog", "text": "second"},
        ],
        "default": {"text": "default"},
    }
    source = source_of(tmp_path, script)
    for messages, text in (
        (said("a cat"), "first"),
        (said("a dog"), "second"),
        ([*said("a cat"), {"role": "assistant", "content": "first"}, *said("bird")], "default"),
        ([*said("a cat"), {"role": "tool", "content": "tool says"}], "from the tool"),
        ([*said("a dog"), {"role": "assistant", "content": "cat"}], "second"),
        ("a whole prompt with a cat in it", "first"),
        ('{"role": "user"}', "default"),
    ):
        assert (await answer(source, ask_of(messages)))[0] == {0: text}


async def test_times_counts_what_stands_in_this_conversation_only(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": {"a": [1]}}
    script = {
        "replies": [
            {"match": "go", "times": 2, "text": "once", "tool_calls": [call]},
            {"match": "go", "times": 1, "text": "then"},
        ],
        "default": {"text": "last"},
    }
    source = source_of(tmp_path, script)
    written = {"function": {"name": "f", "arguments": '{"a": [1]}'}}
    once = {"role": "assistant", "content": " once\n", "tool_calls": [written]}
    unlike = {"role": "assistant", "content": "once"}
    history: list[dict[str, Any]] = []
    for said_before, expected in ((None, "once"), (unlike, "once"), (once, "once"), (once, "then")):
        history += [said_before] if said_before else []
        texts, _ = await answer(source, ask_of([*history, *said("go")]))
        assert texts[0].startswith(expected)
    texts, _ = await answer(source, ask_of([*history, {"role": "assistant", "content": "then"}, *said("go")]))
    assert texts[0] == "last"
    texts, _ = await answer(source, ask_of(said("go")))
    assert texts[0].startswith("once")


async def test_without_a_match_and_a_default_the_ask_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"replies": [{"match": "a", "text": "b"}]})
    with pytest.raises(InvalidRequest, match="no default"):
        await source.prepare(ask_of(said("x")))


async def test_a_pattern_sees_only_the_beginning_of_a_long_message(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"replies": [{"match": "end$", "text": "seen"}], "default": {"text": "unseen"}})
    texts, _ = await answer(source, ask_of(said("a" * MATCHED_CHARACTERS + " end")))
    assert texts == {0: "unseen"}


async def test_thinking_comes_first_and_only_when_it_is_on(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"default": {"thinking": "well, well", "text": "yes"}})
    chunks = [chunk async for chunk in source.generate(ask_of(said("x"), thinking=THINKING))]
    channels = [chunk.channel for chunk in chunks if isinstance(chunk, TokenChunk)]
    assert channels == [Channel.THINKING] * 3 + [Channel.TEXT]
    final = chunks[-1]
    assert isinstance(final, Final)
    assert (final.usage.output, final.usage.thinking) == (4, 3)
    assert (await answer(source, ask_of(said("x"))))[0] == {0: "yes"}


@pytest.mark.parametrize("already", range(6))
async def test_emitted_tokens_are_gone_on_after(tmp_path: Path, already: int) -> None:
    source = source_of(tmp_path, {"default": {"text": "one two three four five"}})
    whole, _ = await answer(source, ask_of(said("x")))
    texts, finals = await answer(source, ask_of(said("x"), emitted={0: tuple(range(already))}))
    assert texts.get(0, "") == "".join(split_tokens(whole[0])[already:])
    assert finals[0].usage.output == 5 - already
    assert finals[0].reason is FinishReason.STOP


async def test_finished_branches_need_nothing_more(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"default": {"text": "one"}})
    texts, finals = await answer(source, ask_of(said("x"), n=3, finished=(1,)))
    assert set(texts) == set(finals) == {0, 2}


async def test_the_limit_counts_what_was_emitted_too(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"default": {"text": "one two three four five"}})
    texts, finals = await answer(source, ask_of(said("x"), limit_tokens=3, emitted={0: (0, 1)}))
    assert texts == {0: " three"}
    assert finals[0].reason is FinishReason.LENGTH


async def test_an_answer_as_long_as_its_limit_has_stopped_by_itself(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"default": {"text": "one two"}})
    _, finals = await answer(source, ask_of(said("x"), limit_tokens=2))
    assert finals[0].reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [
        (("three",), "one, two, ", 5),
        ((", t",), "one", 3),
        (("wo, th", "o"), "", 1),
        (("four!",), "one, two, three", 5),
        (("ee", "e, t"), "on", 3),
    ],
)
async def test_the_stop_string_that_is_complete_first_ends_it(
    tmp_path: Path, stop: tuple[str, ...], text: str, count: int
) -> None:
    source = source_of(tmp_path, {"default": {"text": "one, two, three"}})
    texts, finals = await answer(source, ask_of(said("x"), stop=stop))
    assert texts[0] == text
    assert finals[0].usage.output == count


async def test_a_closed_answer_counts_as_ended(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"default": {"text": "a b c"}})
    async with aclosing(source.generate(ask_of(said("x")))) as chunks:  # type: ignore[type-var]
        async for _ in chunks:
            assert source.active == 1
            break
    assert source.active == 0


async def test_what_it_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"default": {"text": "a"}})
    for ask, param in (
        (ask_of(said("x"), sampling=Sampling(logprobs=0)), "logprobs"),
        (ask_of("x", kind=Kind.EMBED), "input"),
        (Ask(id="ask_1", account="a", model="play", parts=(Tokens((1,)),)), "prompt"),
    ):
        with pytest.raises(UnsupportedField) as caught:
            await source.prepare(ask)
        assert caught.value.param == param


async def test_a_prompt_that_leaves_no_room_is_too_long(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"default": {"text": "a b c"}})
    room = (await source.describe()).context_tokens
    _, finals = await answer(source, ask_of(said("a " * (room - 1))))
    assert (finals[0].reason, finals[0].usage.output) == (FinishReason.LENGTH, 1)
    with pytest.raises(PromptTooLong) as caught:
        await source.prepare(ask_of(said("a " * room)))
    assert (caught.value.have, caught.value.limit) == (room, room - 1)
