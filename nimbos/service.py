"""The one door to tokens: find the model, admit, generate, settle.

Walk 1 of the design passes here: `api` brings an `Account` and an `Ask`, a source from `sources.py` brings the chunks.
Every ask that starts is settled when its iterator closes, whatever closed it. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, cast

import msgspec
import structlog

from nimbos.chat import Chat
from nimbos.errors import NimbosError, NotReady
from nimbos.types import Account, Admission, Ask, Channel, Chunk, Final, ModelCard, Origin, TokenChunk, Usage
from nimbos.watching import Watcher

if TYPE_CHECKING:
    from nimbos.engine import EngineStats
    from nimbos.sources import EngineSource, Listed, Sources

NOWHERE = Origin()

_log = structlog.get_logger(__name__)


class Service:
    def __init__(self, *, sources: Sources, watchers: tuple[Watcher, ...], trusted_templates: frozenset[str]) -> None:
        """`trusted_templates`: SHA-256 of chat templates that may render in this process."""
        self._sources = sources
        self._watchers = watchers
        self._trusted_templates = trusted_templates
        self._chats: dict[tuple[str, str], Chat] = {}
        self._closing = False

    @property
    def ready(self) -> bool:
        return self._sources.ready and not self._closing

    async def models(self) -> list[Listed]:
        return await self._sources.list()

    async def card(self, model: str) -> ModelCard:
        """The card of a model, which is loaded if it was not.

        Raises: ModelNotFound, ModelUnusable, Overloaded, EngineFailed.
        """
        async with self._sources.hold(model) as held:
            return held.card

    async def chat(self, model: str) -> Chat:
        """Messages ↔ text for this model; kept for as long as the server runs."""
        card = await self.card(model)
        known = (card.id, card.model_hash)
        if known not in self._chats:
            self._chats[known] = Chat(card, trusted_templates=self._trusted_templates)
        return self._chats[known]

    async def generate(
        self, account: Account, ask: Ask, *, origin: Origin = NOWHERE, admission: Admission | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """The answer's chunks. Closing the iterator cancels the ask. `admission` is filled before the first of them.

        Raises: what `card` raises; PromptTooLong, InvalidRequest, Overloaded, EngineFailed.
        """
        if self._closing:
            raise NotReady("This server is shutting down. Try again in a moment.")
        async with self._sources.hold(ask.model) as held:
            prepared = await held.source.prepare(msgspec.structs.replace(ask, account=account.id))
            if admission is not None:
                admission.prompt_tokens = prepared.prompt_tokens
            # Admission: the ledger will reserve here, before the engine sees the ask.
            tally = Tally(prompt_tokens=prepared.prompt_tokens)
            started = time.monotonic()
            outcome = "cancelled"
            for watcher in self._watchers:
                watcher.begin(ask, account, origin)
            try:
                async with aclosing(_generator(held.source.generate(prepared.ask))) as chunks:
                    async for chunk in chunks:
                        if tally.first_token_at is None:
                            tally.first_token_at = time.monotonic()
                            for watcher in self._watchers:
                                watcher.first_token(ask, tally.first_token_at - started)
                        tally.add(chunk)
                        yield chunk
                outcome = "done"
            except NimbosError as error:
                outcome = error.code
                raise
            finally:
                # Settling: the ledger will join here; what was counted is never lost, whatever ended the ask.
                for watcher in self._watchers:
                    watcher.settle(ask, usage=tally.usage(), outcome=outcome, seconds=time.monotonic() - started)
                _log_settled(ask, tally.usage(), outcome, time.monotonic() - started)

    async def count(self, account: Account, ask: Ask) -> int:
        """Tokens of the ask's prompt; nothing is asked, and nothing is charged.

        Raises: what `card` raises; PromptTooLong, InvalidRequest.
        """
        async with self._sources.hold(ask.model) as held:
            prepared = await held.source.prepare(msgspec.structs.replace(ask, account=account.id))
            return prepared.prompt_tokens

    async def stats(self) -> dict[str, EngineStats]:
        """By model id, of every engine that answers; one that is being restarted is left out."""
        engines = self._sources.engines()
        found = await asyncio.gather(*(_stats_or_none(engine) for engine in engines.values()))
        return {name: stats for name, stats in zip(engines, found, strict=True) if stats is not None}

    def engine_pid(self, model: str) -> int | None:
        """Of the process that runs the model now, if one does."""
        engine = self._sources.engines().get(model)
        return engine.pid if engine is not None else None

    async def close(self) -> None:
        self._closing = True
        await asyncio.gather(*(chat.close() for chat in self._chats.values()))
        await self._sources.close()


class Tally:
    """What an ask has used so far: each finished branch's own count, and for the others the tokens that came."""

    def __init__(self, *, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._finished: dict[int, Usage] = {}
        self._seen: dict[int, tuple[int, int]] = {}
        self.first_token_at: float | None = None

    def add(self, chunk: Chunk) -> None:
        if isinstance(chunk, Final):
            self._finished[chunk.branch] = chunk.usage
        elif isinstance(chunk, TokenChunk):
            output, thinking = self._seen.get(chunk.branch, (0, 0))
            more = len(chunk.ids)
            self._seen[chunk.branch] = output + more, thinking + (more if chunk.channel is Channel.THINKING else 0)

    def usage(self) -> Usage:
        total = Usage()
        for usage in self._finished.values():
            total = total + usage
        for branch, (output, thinking) in self._seen.items():
            if branch not in self._finished:
                total = total + Usage(output=output, thinking=thinking)
        if 0 not in self._finished:  # the prompt counts on branch 0
            total = total + Usage(input=self._prompt_tokens)
        return total


async def _stats_or_none(engine: EngineSource) -> EngineStats | None:
    try:
        return await engine.stats()
    except NimbosError:
        return None


def _generator(chunks: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk, None]:
    return cast("AsyncGenerator[Chunk, None]", chunks)  # every source's `generate` is one: closing it cancels the ask


def _log_settled(ask: Ask, usage: Usage, outcome: str, seconds: float) -> None:
    _log.info(
        "ask.settled",
        ask=ask.id,
        account=ask.account,
        model=ask.model,
        ask_class=ask.ask_class.value,
        outcome=outcome,
        seconds=round(seconds, 3),
        **msgspec.structs.asdict(usage),
    )
