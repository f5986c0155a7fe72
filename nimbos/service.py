"""The one door to tokens: find the model, admit, generate, settle.

Walk 1 of the design passes here: `api` brings an `Account` and an `Ask`, a source from `sources.py` brings the chunks.
Every ask that is let in is settled when its iterator closes, whatever closed it: `ledger/desk.py`. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, cast

import msgspec
import structlog

from nimbos.accounts import allowed_model
from nimbos.chat import Chat
from nimbos.errors import Forbidden, ModelNotFound, NimbosError, NotReady
from nimbos.ledger import Desk, Journal, Running, with_what_is_paid
from nimbos.types import Account, Admission, Ask, Chunk, Final, Kind, ModelCard, Origin, TokenSource, Usage
from nimbos.watching import Watcher

if TYPE_CHECKING:
    from nimbos.engine import EngineStats
    from nimbos.sources import EngineSource, Listed, Sources

NOWHERE = Origin()

_log = structlog.get_logger(__name__)


class Service:
    def __init__(
        self, *, sources: Sources, desk: Desk, watchers: tuple[Watcher, ...], trusted_templates: frozenset[str]
    ) -> None:
        """`trusted_templates`: SHA-256 of chat templates that may render in this process."""
        self._sources = sources
        self._desk = desk
        self._watchers = watchers
        self._trusted_templates = trusted_templates
        self._chats: dict[tuple[str, str], Chat] = {}
        self._closing = False

    @property
    def ready(self) -> bool:
        return self._sources.ready and not self._closing

    async def models(self) -> list[Listed]:
        return await self._sources.list()

    async def card(self, model: str, account: Account | None = None) -> ModelCard:
        """The card of a model, which is loaded if it was not; but not for an account that may not ask it.

        Raises: ModelNotFound, ModelUnusable, Overloaded, EngineFailed, Forbidden.
        """
        await self._check_model(account, model)
        async with self._sources.hold(model) as held:
            return held.card

    async def model_for(self, account: Account, name: str) -> str:
        """The id of the model that the account means; "" is the first that answers and that it may ask. Nothing is
        loaded. Raises: ModelNotFound, Forbidden."""
        if name:
            await self._check_model(account, name)
            return await self._sources.id_of(name)
        for listed in await self._sources.list():
            answers = listed.model is None or listed.model.facts.kind == Kind.GENERATE.value
            if answers and allowed_model(account, listed.id):
                return listed.id
        raise ModelNotFound("default")

    async def chat(self, model: str) -> Chat:
        """Messages ↔ text for this model; kept for as long as the server runs."""
        card = await self.card(model)
        known = (card.id, card.model_hash)
        if known not in self._chats:
            self._chats[known] = Chat(card, trusted_templates=self._trusted_templates)
        return self._chats[known]

    async def generate(
        self,
        account: Account,
        ask: Ask,
        *,
        origin: Origin = NOWHERE,
        admission: Admission | None = None,
        journal: Journal | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """The answer's chunks. Closing the iterator cancels the ask. `admission` is filled before the first of them.
        `journal` writes in the ledger's own transactions. When the iterator is through, what was told is durable,
        unless the database is away; then it is settled as soon as that is back.

        Raises: what `card` raises; Forbidden, PromptTooLong, InvalidRequest, Overloaded, BudgetExhausted,
        StorageUnavailable, EngineFailed.
        """
        if self._closing:
            raise NotReady("This server is shutting down. Try again in a moment.")
        await self._check_model(account, ask.model)
        paid = journal.paid if journal is not None else Usage()
        async with self._sources.hold(ask.model) as held:
            prepared = await held.source.prepare(
                msgspec.structs.replace(with_what_is_paid(ask, paid), account=account.id, process=origin.process)
            )
            running = await self._desk.admit(account, prepared, origin=origin, card=held.card, journal=journal)
            if admission is not None:
                admission.prompt_tokens = prepared.prompt_tokens
                admission.headers.update(running.reserved.passed.headers())
            watched = _Watched(self._watchers, running.ask, account, origin)
            outcome = "cancelled"
            try:
                async with aclosing(_answering(held.source, running)) as chunks:
                    async for chunk in chunks:
                        watched.spoke()
                        yield _with_what_was_paid(chunk, paid)
                outcome = "done"
            except NimbosError as error:
                outcome = error.code
                raise
            finally:
                usage, settling = running.end(outcome)
                watched.ended(usage, outcome)
                await asyncio.shield(settling)

    async def count(self, account: Account, ask: Ask) -> int:
        """Tokens of the ask's prompt; nothing is asked, and nothing is charged.

        Raises: what `card` raises; Forbidden, PromptTooLong, InvalidRequest.
        """
        await self._check_model(account, ask.model)
        async with self._sources.hold(ask.model) as held:
            prepared = await held.source.prepare(msgspec.structs.replace(ask, account=account.id))
            return prepared.prompt_tokens

    def used(self, ask_id: str) -> Usage:
        """What an ask that is being answered has used so far."""
        return self._desk.used(ask_id)

    async def stats(self) -> dict[str, EngineStats]:
        """By model id, of every engine that answers; one that is being restarted is left out."""
        engines = self._sources.engines()
        found = await asyncio.gather(*(_stats_or_none(engine) for engine in engines.values()))
        return {name: stats for name, stats in zip(engines, found, strict=True) if stats is not None}

    def engine_pid(self, model: str) -> int | None:
        """Of the process that runs the model now, if one does."""
        engine = self._sources.engines().get(model)
        return engine.pid if engine is not None else None

    async def _check_model(self, account: Account | None, name: str) -> None:
        """Before anything is loaded. Raises: Forbidden, ModelNotFound."""
        if account is not None and (account.models is not None or account.denied_models):
            try:
                model = await self._sources.id_of(name)
            except ModelNotFound as error:  # which names all there are
                have = tuple(one.id for one in await self._sources.list() if allowed_model(account, one.id))
                raise ModelNotFound(name, have=have) from error
            if not allowed_model(account, model):
                raise Forbidden(f"This key may not ask the model {model!r}.", param="model")

    async def close(self) -> None:
        """Asks that still run end, and every settlement that can be made durable is."""
        self._closing = True
        await asyncio.gather(*(chat.close() for chat in self._chats.values()))
        await self._sources.close()
        await self._desk.close()


class _Watched:
    """Tells the watchers when an ask begins, first speaks and ends."""

    def __init__(self, watchers: tuple[Watcher, ...], ask: Ask, account: Account, origin: Origin) -> None:
        self._watchers = watchers
        self._ask = ask
        self._started = time.monotonic()
        self._spoken = False
        for watcher in watchers:
            watcher.begin(ask, account, origin)

    def spoke(self) -> None:
        if not self._spoken:
            self._spoken = True
            for watcher in self._watchers:
                watcher.first_token(self._ask, time.monotonic() - self._started)

    def ended(self, usage: Usage, outcome: str) -> None:
        seconds = time.monotonic() - self._started
        for watcher in self._watchers:
            watcher.settle(self._ask, usage=usage, outcome=outcome, seconds=seconds)
        _log_settled(self._ask, usage, outcome, seconds)


async def _answering(source: TokenSource, running: Running) -> AsyncGenerator[Chunk, None]:
    """Each chunk is noted before it is handed on. Every source's `generate` is a generator: closing it cancels the
    ask."""

    def tell_source(allowance_tokens: int | None, last: bool) -> None:
        source.extend(running.ask.id, allowance_tokens=allowance_tokens, last=last)

    running.extend_by(tell_source)
    async with aclosing(cast("AsyncGenerator[Chunk, None]", source.generate(running.ask))) as chunks:
        async for chunk in chunks:
            running.note(chunk)
            yield chunk


def _with_what_was_paid(chunk: Chunk, paid: Usage) -> Chunk:
    """What is told of an answer that was begun anew is what all its asks have paid."""
    if not isinstance(chunk, Final) or chunk.branch != 0:
        return chunk
    return msgspec.structs.replace(chunk, usage=chunk.usage + paid)


async def _stats_or_none(engine: EngineSource) -> EngineStats | None:
    try:
        return await engine.stats()
    except NimbosError:
        return None


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
