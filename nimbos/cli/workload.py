"""The asks of `nimbos bench`, through a real engine process: first token, prefill, decode, fan-out.

Prompts are shuffled tokens of one text, so no two share a prefix unless they are meant to. Answers are greedy and go on
past the end of text, so that every ask is as long as it says.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from statistics import median
from typing import cast

import msgspec

from nimbos.engine import Engine, EngineStats
from nimbos.types import Ask, AskClass, Chunk, Final, Sampling, Text, TokenChunk, Tokens, new_id

_TEXT = (
    "A clock on the wall of the old station had stopped at ten past four, and nobody in the small town could say when. "
    "Children made up reasons: a storm, a theft, a bet. The baker, who passed it twice a day, set his own watch by it. "
)
FIRST_TOKEN_PROMPT = 32
FAN_OUT_OWN, FAN_OUT_ANSWER = 16, 16
AGAIN_UNDER_S = 30.0  # a pair of fan-outs that took less is run once more, in the reverse order


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much `nimbos bench` does."""

    prefill: tuple[int, ...] = (128, 512)
    decode_rows: tuple[int, ...] = (1, 4, 8, 16)
    answer_tokens: int = 64
    repeats: int = 3
    branches: int = 16
    shared_tokens: int = 512
    twice: bool = True


QUICK = Size(decode_rows=(1, 8), answer_tokens=16, repeats=1, branches=4, shared_tokens=128, twice=False)


class Prefill(msgspec.Struct, frozen=True, kw_only=True):
    tokens: int
    tokens_per_second: float


class Decode(msgspec.Struct, frozen=True, kw_only=True):
    """Of `rows` answers at once, together."""

    rows: int
    tokens_per_second: float


class FanOut(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds until all of `branches` asks that begin with the same `shared_tokens` are answered: in one account, and
    in an account each, where nothing may be shared."""

    branches: int
    shared_tokens: int
    shared_s: float
    apart_s: float

    @property
    def gain(self) -> float:
        return self.apart_s / self.shared_s


@dataclass(slots=True)
class _Watched:
    """When what came. `tokens`: (moment, how many); `begun`: when each branch's first ones came."""

    asked: float = field(default_factory=time.perf_counter)
    tokens: list[tuple[float, int]] = field(default_factory=list)
    begun: dict[int, float] = field(default_factory=dict)
    ended: list[float] = field(default_factory=list)


class Workload:
    """`size.branches` and the like are used as they are; what does not fit the model's context is left out."""

    def __init__(self, engine: Engine, size: Size, *, seed: int = 1) -> None:
        assert engine.ready is not None
        self._engine, self._size = engine, size
        self._random = random.Random(seed)
        self._room = engine.ready.limit_tokens
        self._words: list[int] = []

    async def start(self) -> None:
        """Tokenizes the text and answers one ask, so that nothing measured is the first of its kind."""
        prepared = await self._engine.prepare(self._ask((Text(_TEXT),), limit=1))
        self._words = [token for part in prepared.ask.parts if isinstance(part, Tokens) for token in part.ids]
        await self._watch(self._ask((self._prompt(FIRST_TOKEN_PROMPT),), limit=2))

    async def first_token_s(self) -> float:
        """From the ask to its first token, with a short prompt."""
        return median([await self._first(FIRST_TOKEN_PROMPT) for _ in range(self._size.repeats)])

    async def prefill(self) -> tuple[Prefill, ...]:
        found = []
        for tokens in self._size.prefill:
            if tokens < self._room:
                taken = median([await self._first(tokens) for _ in range(self._size.repeats)])
                found.append(Prefill(tokens=tokens, tokens_per_second=tokens / taken))
        return tuple(found)

    async def decode(self) -> tuple[Decode, ...]:
        found = []
        for rows in self._size.decode_rows:
            speeds = [await self._decode(rows) for _ in range(self._size.repeats)]
            known = [speed for speed in speeds if speed is not None]
            if known:
                found.append(Decode(rows=rows, tokens_per_second=median(known)))
        return tuple(found)

    async def fan_out(self) -> FanOut | None:
        """None when the model's context has no room for it."""
        size = self._size
        if size.shared_tokens + FAN_OUT_OWN + FAN_OUT_ANSWER > self._room:
            return None
        shared, apart = [await self._fan(shared=True)], [await self._fan(shared=False)]
        if size.twice and shared[0] + apart[0] < AGAIN_UNDER_S:
            apart.append(await self._fan(shared=False))
            shared.append(await self._fan(shared=True))
        return FanOut(
            branches=size.branches,
            shared_tokens=size.shared_tokens,
            shared_s=median(shared),
            apart_s=median(apart),
        )

    async def stats(self) -> EngineStats:
        return await self._engine.stats()

    async def _first(self, tokens: int) -> float:
        watched = await self._watch(self._ask((self._prompt(tokens),), limit=1))
        return watched.ended[0] - watched.asked

    async def _decode(self, rows: int) -> float | None:
        """Tokens/s while all rows run; None when they never ran at the same time."""
        limit = self._size.answer_tokens
        ask = self._ask((self._prompt(FIRST_TOKEN_PROMPT),), limit=limit, ask_class=AskClass.BATCH, n=rows)
        watched = await self._watch(ask)
        if len(watched.begun) < rows:
            return None
        begin, end = max(watched.begun.values()), min(watched.ended)
        count = sum(count for moment, count in watched.tokens if begin < moment <= end)
        return count / (end - begin) if count and end > begin else None

    async def _fan(self, *, shared: bool) -> float:
        prefix = self._prompt(self._size.shared_tokens)
        account = new_id("account")
        asks = [
            self._ask(
                (prefix, self._prompt(FAN_OUT_OWN)),
                limit=FAN_OUT_ANSWER,
                ask_class=AskClass.BATCH,
                account=account if shared else f"{account}-{branch}",
            )
            for branch in range(self._size.branches)
        ]
        begun = time.perf_counter()
        await asyncio.gather(*(self._watch(ask) for ask in asks))
        return time.perf_counter() - begun

    def _prompt(self, tokens: int) -> Tokens:
        return Tokens(tuple(self._random.choices(self._words, k=tokens)))

    def _ask(
        self,
        parts: tuple[Text | Tokens, ...],
        *,
        limit: int,
        ask_class: AskClass = AskClass.INTERACTIVE,
        n: int = 1,
        account: str | None = None,
    ) -> Ask:
        return Ask(
            id=new_id("ask"),
            account=account or new_id("account"),
            model=self._engine.model_id,
            parts=parts,
            n=n,
            ask_class=ask_class,
            limit_tokens=limit,
            sampling=Sampling(temperature=0.0),
            ignore_eos=True,
        )

    async def _watch(self, ask: Ask) -> _Watched:
        watched = _Watched()
        async with aclosing(cast(AsyncGenerator[Chunk, None], self._engine.generate(ask))) as chunks:
            async for chunk in chunks:
                now = time.perf_counter()
                if isinstance(chunk, TokenChunk) and chunk.ids:
                    watched.begun.setdefault(chunk.branch, now)
                    watched.tokens.append((now, len(chunk.ids)))
                elif isinstance(chunk, Final):
                    watched.ended.append(now)
        return watched
