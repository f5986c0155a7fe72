"""Thinking with a real engine: calls are held to their grammar, and an answer goes on where it was stopped."""

from __future__ import annotations

import asyncio
import fcntl
import os
from itertools import pairwise
from pathlib import Path

import msgspec

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.engine.lease import Lease
from nimbos.kernel import Reason, SignalKind, State
from nimbos.kernel.answering import PARTIAL_TOKENS
from nimbos.kernel.arguments import Checker
from nimbos.kernel.events import ModelIntent, ModelPartial
from nimbos.kernel.holding import Holding
from nimbos.kernel.think import Thinker, ThinkRequest
from nimbos.types import Sampling
from tests import tiny_gguf
from tests.kernel.minds import minds

CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Paris"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "why": {"type": "string", "maxLength": 12},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Look it up.", "parameters": CITY}}
LONG = "[model]\ntemperature = 0.0\nmax_tokens = 1500\n[tools]\nbuiltin = []\n"


async def test_the_calls_of_a_model_that_knows_nothing_parse_and_fit(tmp_path: Path) -> None:
    """Random weights, held by the grammar of the tools in force."""
    settings = Settings(home=str(tmp_path))
    database = await Database.open(settings)
    try:
        async with minds(database, settings, {}, models=(tiny_gguf.write("qwen2", tmp_path),), start=False) as place:
            thinker = Thinker(service=place.kernel.service, database=database, segments=place.kernel.segments)

            async def drive(holding: Holding) -> None:
                request = ThinkRequest(
                    messages=({"role": "user", "content": "Is it warmer in Paris or in Oslo?"},),
                    tools=(WEATHER,),
                    tool_choice="required",
                    sampling=Sampling(temperature=1.5),
                    max_tokens=200,
                )
                thought = await thinker.think(holding, request)
                result = [[call.call_id, call.name, call.arguments] for call in thought.calls]
                await holding.exit(Reason.OK, result=await holding.put([thought.ask_id, thought.finish, result]))

            await place.kernel.start(drive)
            program = await place.program()
            for _ in range(5):
                ask_id, finish, calls = await place.result(await place.run(program, model="tiny-qwen2-1"))
                assert finish == "tool_calls" and calls
                for number, (call_id, name, arguments) in enumerate(calls):
                    assert (call_id, name) == (f"{ask_id}.{number}", "weather")
                    Checker().check(msgspec.json.decode(arguments), CITY, tool=name)
    finally:
        await database.close()


class Steps(Lease):
    """Holds the cores, and lets the engine beside it compute step by step."""

    def take(self) -> None:
        self._wait()

    def let_one(self) -> None:
        """Waits until the engine wants a step, and stands right behind it in the order of turns."""
        while not (waiting := [row for row in self._rows() if row.state == 1 and row.slot != self._slot]):
            os.sched_yield()
        self._virtual = waiting[0].virtual + 1e-6
        self._announce()
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._wait()


async def test_an_answer_goes_on_in_the_engine_and_is_paid_once(tmp_path: Path) -> None:
    settings = Settings(home=str(tmp_path))
    database = await Database.open(settings)
    try:
        async with minds(database, settings, {}, models=(tiny_gguf.write("qwen2", tmp_path),)) as place:
            program = await place.program(LONG)
            whole = await place.run(program, model="tiny-qwen2-1")
            said = await place.result(whole)
            with Steps(next(tmp_path.rglob("run/lease"))) as steps:
                steps.take()
                cut = await place.run(program, model="tiny-qwen2-1")
                for _ in range(2 * PARTIAL_TOKENS):
                    await asyncio.to_thread(steps.let_one)
                await place.until_partial(cut)
                await place.send(cut, SignalKind.PAUSE)
                await place.until(cut, State.PAUSED)
            await place.send(cut, SignalKind.RESUME)
            assert await place.result(cut) == said
            bodies = await place.bodies_of(cut)
            first, second = [body for body in bodies if isinstance(body, ModelIntent)]
            assert second.continues == first.ask_id
            ids = [id for body in bodies if isinstance(body, ModelPartial) for id in body.ids]
            assert 0 < len(ids) < 1_500
            undisturbed, billed = await place.billed(whole), await place.billed(cut)
            assert (billed.input, billed.output) == (undisturbed.input, 1_500)
    finally:
        await database.close()


async def test_a_turn_computes_only_what_is_new_in_its_prompt(tmp_path: Path) -> None:
    """The stable part comes first and the rest only grows, so the engine finds what the turn before left there."""
    settings = Settings(home=str(tmp_path))
    database = await Database.open(settings)
    manifest = '[model]\nmax_tokens = 60\n[tools]\nbuiltin = ["pin"]\ncall_first = true\n'
    try:
        async with minds(database, settings, {}, models=(tiny_gguf.write("qwen2", tmp_path),)) as place:
            pid = await place.run(await place.program(manifest), "Remember the milk.", model="tiny-qwen2-1")
            await place.over(pid)
            assert place.shop is not None
            rows = [row for _, row in sorted((await place.shop.rows()).items()) if row["process"] == pid]
            assert len(rows) > 1
            for before, after in pairwise(rows):
                found = after["meters"].get("cached", 0)
                assert found >= before["prompt_tokens"] > 100
                assert after["prompt_tokens"] - found < after["prompt_tokens"] / 2
    finally:
        await database.close()
