"""A context as memory: it stays within its window for as long as the process lives, and nothing of it is lost."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nimbos.blobs import hash_of, open_blobs
from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import Reason, SignalKind, State
from nimbos.kernel.context import (
    ContextFull,
    load,
    plan_eviction,
    tokens_of,
    transcript,
    turns_of,
    view_text,
    window_of,
)
from nimbos.kernel.events import CtxChanged, ModelIntent, Note, Segment
from nimbos.kernel.segments import Segments, canonical
from tests.kernel.minds import ACCOUNT, Minds, calling, minds, words

TURNS = 100
WINDOW = 32_768
BOOK = " ".join(f"line{number}" for number in range(40_000))
HANDLE = hash_of(ACCOUNT.id.encode() + b"\n" + canonical(BOOK))[:16]
MANIFEST = f'[tools]\nbuiltin = ["read", "pin"]\n[limits]\nturns = {TURNS}\nresult_bytes = 16384\n'
SMALL = MANIFEST.replace("100", "20").replace("16384", "4096") + "[model]\ncontext_tokens = 8192\n"
READING = {"default": calling("read", handle=HANDLE, offset=17)}
SUMMARY = {"match": "^Below is the earlier part", "text": "I read many lines."}


async def bytes_by_turn(place: Minds, pid: str) -> list[int]:
    """Of the log, from one answer of the model to the next."""
    sizes = [0]
    async for event in place.kernel.log.all(pid):
        sizes[-1] += len(event.body)
        if event.kind == "model.done":
            sizes.append(0)
    return sizes[:-1]


@pytest.mark.parametrize("database_settings", ["sqlite"], indirect=True)
async def test_a_hundred_turns_in_a_small_window_stay_flat(database: Database, database_settings: Settings) -> None:
    async with minds(database, database_settings, {"replies": [SUMMARY], **READING}) as place:
        pid = await place.run(await place.program(MANIFEST), BOOK)
        head = await place.over(pid)
        assert head.reason is Reason.FAILED and "limits.turns" in head.error
        view = await place.view(pid)
        assert view.turns == TURNS
        sizes = await bytes_by_turn(place, pid)
        assert max(sizes) < 8_000
        assert sum(sizes[len(sizes) // 2 :]) <= 1.1 * sum(sizes[: len(sizes) // 2])
        assert place.shop is not None
        prompts = [row["prompt_tokens"] for row in (await place.shop.rows()).values()]
        assert max(prompts) < WINDOW and sum(prompts) > 20 * WINDOW
        assert [segment.kind for segment in view.context[:3]] == ["system", "goal", "view"]
        notes = [body for body in await place.bodies_of(pid) if isinstance(body, Note)]
        assert len(notes) == sum(segment.kind == "view" for segment in [*view.context, *view.evicted.values()]) > 1


async def test_a_prompt_only_grows_at_its_end_until_the_window_is_full(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, {"replies": [SUMMARY], **READING}) as place:
        pid = await place.run(await place.program(SMALL), BOOK)
        await place.over(pid)
        context: list[Segment] = []
        seen: list[list[Segment]] = []
        cuts = 0
        for body in await place.bodies_of(pid):
            if isinstance(body, CtxChanged):
                cuts += bool(body.evict)
                context = [] if body.evict else [*context, *body.add]
            elif isinstance(body, ModelIntent) and body.purpose == "turn" and context:
                seen.append(context)
        assert cuts and len(seen) > 10
        grown = [after[: len(before)] == before for before, after in pairwise(seen)]
        assert grown.count(False) <= cuts


async def test_what_was_evicted_can_be_read_again(database: Database, database_settings: Settings) -> None:
    """The view's handle leads to the whole text of what it stands for."""
    async with minds(database, database_settings, {"replies": [SUMMARY], **READING}) as place:
        pid = await place.run(await place.program(SMALL), BOOK)
        await place.over(pid)
        view = await place.view(pid)
        segments = [*view.context, *view.evicted.values()]
        views = [segment for segment in segments if segment.kind == "view"]
        assert views and {id for one in views for id in one.covers} == view.evicted.keys()
        for one in views:
            assert one.whole is not None
            whole = await place.kernel.segments.get(ACCOUNT.id, one.whole)
            assert len(whole.encode()) == one.whole_bytes
            covered = [view.evicted[id] for id in one.covers]
            assert whole.count("tool: line") == sum(segment.kind == "tool" for segment in covered) > 3
            told = await place.kernel.segments.get(ACCOUNT.id, one.hash)
            assert "I read many lines." in told["content"] and one.whole[:16] in told["content"]


async def test_room_is_made_also_when_there_is_no_summary(database: Database, database_settings: Settings) -> None:
    failing = {"replies": [{"match": "^(?!Below)", **READING["default"]}]}
    async with minds(database, database_settings, failing) as place:
        pid = await place.run(await place.program(SMALL), BOOK)
        assert "limits.turns" in (await place.over(pid)).error
        texts = [message["content"] for message in await place.shown(pid)]
        assert any("no longer shown" in text and "no summary" in text for text in texts)


async def test_a_summary_that_is_cut_off_goes_on(database: Database, database_settings: Settings) -> None:
    slow = {"match": "^Below is the earlier part", **words(200, rate=100)}
    async with minds(database, database_settings, {"replies": [slow], **READING}) as place:
        pid = await place.run(await place.program(SMALL.replace("20", "16")), BOOK)
        await place.until_partial(pid)
        await place.send(pid, SignalKind.PAUSE)
        await place.until(pid, State.PAUSED)
        assert not (await place.view(pid)).evicted
        await place.send(pid, SignalKind.RESUME)
        assert "limits.turns" in (await place.over(pid)).error
        summaries = [b for b in await place.bodies_of(pid) if isinstance(b, ModelIntent) and b.purpose == "summary"]
        assert [body.continues for body in summaries[:2]] == ["", summaries[0].ask_id]
        assert any(words(200)["text"] in message["content"] for message in await place.shown(pid))


async def test_a_summary_that_does_not_fit_is_left_out_and_not_made_again_and_again(
    database: Database, database_settings: Settings
) -> None:
    script = {
        "replies": [
            {"match": "^Below is the earlier part", **words(512)},
            {"match": "^a a", **calling("pin", text="b " * 1_700)},
            {"match": "Pinned as", **calling("read", handle="book.md", bytes=480)},
            {"match": "^c1", **calling("read", handle="book.md", offset=480)},
            {"match": "^c2", "text": "Done."},
        ]
    }
    book = b"c1 " * 160 + b"c2 " * 160
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program(SMALL, {"book.md": book}), "a " * 5_150)
        assert await place.result(pid) == "Done."
        purposes = [body.purpose for body in await place.bodies_of(pid) if isinstance(body, ModelIntent)]
        assert purposes == ["turn", "turn", "turn", "summary", "turn"]
        told = (await place.shown(pid))[2]["content"]
        assert "4 earlier messages" in told and "no summary" in told
        view = (await place.view(pid)).context[2]
        assert view.whole is not None and "tool: " in await place.kernel.segments.get(ACCOUNT.id, view.whole)


async def test_what_is_pinned_stays(database: Database, database_settings: Settings) -> None:
    script = {
        "replies": [
            SUMMARY,
            {"match": "^line0 ", "times": 1, **calling("pin", text="I promised to count them.")},
        ],
        **READING,
    }
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program(SMALL), BOOK)
        await place.over(pid)
        view = await place.view(pid)
        assert view.evicted
        assert [segment.kind for segment in view.context if segment.pinned] == ["goal", "note"]
        assert any("I promised to count them." in message["content"] for message in await place.shown(pid))


def segment(id: str, kind: str = "user", *, tokens: int = 10, pinned: bool = False) -> Segment:
    return Segment(id=id, hash=f"hash of {id}", kind=kind, tokens=tokens, pinned=pinned)  # type: ignore[arg-type]


KINDS = st.sampled_from(["user", "assistant", "tool", "view", "note"])
CONTEXTS = st.lists(st.tuples(KINDS, st.integers(1, 400), st.booleans()), max_size=40).map(
    lambda made: [
        segment("system", "system"),
        segment("goal", "goal", pinned=True),
        *(segment(f"{n}", kind, tokens=tokens, pinned=pinned) for n, (kind, tokens, pinned) in enumerate(made)),
    ]
)


def test_a_view_without_words_is_not_replaced_by_another() -> None:
    made = [segment("goal", "goal", tokens=90, pinned=True), segment("view.2", "view", tokens=8), segment("last")]
    made[1] = msgspec.structs.replace(made[1], covers=("view.ask_1",))
    with pytest.raises(ContextFull):
        plan_eviction(made, have_tokens=108, room_tokens=105)
    made[1] = msgspec.structs.replace(made[1], covers=("ask_1", "ask_1.0"))
    eviction = plan_eviction(made, have_tokens=108, room_tokens=105)
    assert eviction is not None and eviction.of_a_view


@given(context=CONTEXTS, room=st.integers(1, 6_000), more=st.floats(0.5, 3.0))
@settings(max_examples=300, deadline=None)
def test_an_eviction_takes_whole_turns_and_nothing_that_must_stay(
    context: list[Segment], room: int, more: float
) -> None:
    have = max(1, int(tokens_of(context) * more))
    try:
        eviction = plan_eviction(context, have_tokens=have, room_tokens=room)
    except ContextFull:
        kept = [turn for turn in turns_of(context)[:-1] if not any(one.pinned for one in turn)]
        free = sum(tokens_of(turn) for turn in kept if turn[0].kind not in ("system", "goal"))
        assert have > room and (not free or have * (1 - free / tokens_of(context)) > room)
        return
    if eviction is None:
        assert have <= room
        return
    gone = set(eviction.ids)
    for turn in turns_of(context):
        inside = {one.id in gone for one in turn}
        assert len(inside) == 1
        assert inside == {False} or not any(one.pinned or one.kind in ("system", "goal") for one in turn)
    assert not gone & {one.id for one in turns_of(context)[-1]}
    assert have * (1 - tokens_of(eviction.covered) / tokens_of(context)) <= room
    assert [one.id for one in context if one.id in gone] == [one.id for one in context if one in eviction.covered]


async def test_results_stand_behind_their_calls_whatever_was_noted_between(tmp_path: Path) -> None:
    opened = await Database.open(Settings(home=str(tmp_path)))
    try:
        segments = Segments(opened, open_blobs(Settings(home=str(tmp_path)), opened))
        said = [
            ("user", {"role": "user", "content": "one"}),
            ("user", {"role": "user", "content": "two"}),
            ("assistant", {"role": "assistant", "content": "", "tool_calls": []}),
            ("note", {"role": "user", "content": "a note"}),
            ("tool", {"role": "tool", "tool_call_id": "c", "content": "result"}),
        ]
        context = [
            Segment(id=f"{n}", hash=await segments.put("a", message), kind=kind, tokens=1)  # type: ignore[arg-type]
            for n, (kind, message) in enumerate(said)
        ]
        messages = await load(segments, "a", context)
        assert [message["role"] for message in messages] == ["user", "assistant", "tool", "user"]
        assert messages[0]["content"] == "one\n\ntwo"
        assert transcript(messages).startswith("user: one\n\ntwo")
    finally:
        await opened.close()


@pytest.mark.parametrize(
    ("model", "wanted", "most", "room"),
    [(32_768, 0, None, 31_744), (32_768, 4_096, None, 3_072), (4_096, 32_768, 100, 3_996), (64, 0, 5_000, 48)],
)
def test_a_window_keeps_room_for_an_answer(model: int, wanted: int, most: int | None, room: int) -> None:
    assert window_of(model, wanted, most).room == room


def test_a_view_says_what_is_missing_and_where_it_is() -> None:
    told = view_text("It rained.", covered=12, handle="abcdef0123456789", whole_bytes=4_000)
    assert "12 earlier messages" in told and "It rained." in told and '"handle": "abcdef0123456789"' in told
    assert "no summary" in view_text("  ", covered=1, handle="abcdef01", whole_bytes=1)
