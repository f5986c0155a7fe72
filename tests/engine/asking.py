"""Asking a real engine with a tiny model, for tests: what to ask, and what was told."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import msgspec

from nimbos.config import EngineSettings, Settings
from nimbos.engine import Engine
from nimbos.meterfile import MeterFile
from nimbos.types import Ask, Chunk, Final, Sampling, Text, TokenChunk, TokenSource, Usage, new_id
from tests import tiny_gguf

GREEDY = Sampling(temperature=0.0)
PROMPT = "the man in the world said hello to you and that is what we like to hear from there "


def settings_in(home: Path, **engine: object) -> Settings:
    defaults = {"cells": 2048, "sequences": 64, "threads": 1, "max_step_tokens": 128}
    return Settings(home=str(home), engine=msgspec.convert({**defaults, **engine}, EngineSettings))


def ask(text: str = PROMPT, **fields: object) -> Ask:
    fields.setdefault("sampling", GREEDY)
    fields.setdefault("limit_tokens", 24)
    fields.setdefault("account", "anna")
    return Ask(id=new_id("ask"), model="tiny", parts=(Text(text),), **fields)  # type: ignore[arg-type]


class Told:
    """What a client of one ask was told."""

    def __init__(self) -> None:
        self.text: dict[int, str] = {}
        self.ids: dict[int, list[int]] = {}
        self.finals: list[Final] = []

    def take(self, chunk: Chunk) -> None:
        if isinstance(chunk, TokenChunk):
            self.text[chunk.branch] = self.text.get(chunk.branch, "") + chunk.text
            self.ids.setdefault(chunk.branch, []).extend(chunk.ids)
        elif isinstance(chunk, Final):
            self.finals.append(chunk)

    @property
    def final(self) -> Final:
        (only,) = self.finals
        return only

    @property
    def usage(self) -> Usage:
        total = Usage()
        for final in self.finals:
            total = total + final.usage
        return total

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids.values()))


async def answer(source: TokenSource, wanted: Ask) -> Told:
    told = Told()
    prepared = await source.prepare(wanted)
    async with aclosing(source.generate(prepared.ask)) as chunks:
        async for chunk in chunks:
            told.take(chunk)
    return told


async def started(arch: str, folder: Path, *, meters: MeterFile | None = None, **engine: object) -> Engine:
    path = tiny_gguf.write(arch, folder)
    running = Engine(model_path=path, model_id="tiny", settings=settings_in(folder, **engine), meters=meters)
    await running.start()
    return running
