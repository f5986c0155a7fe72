"""`GET /v1/organization/live`: what the server does at this moment, for `nimbos top`. Needs the scope admin."""

from __future__ import annotations

import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimbos.api.exchange import json_reply
from nimbos.ledger import Span, usage
from nimbos.runtime import Runtime
from nimbos.types import AskClass, Usage

ASKS_SHOWN = 1_000
_DAY_MS = 86_400_000


class LiveAskBody(msgspec.Struct, kw_only=True):
    """`first_token_ms`: None while it waits or its prompt is read. `input`, `cached`, `output`: tokens so far."""

    id: str
    account: str
    key: str
    model: str
    ask_class: str = msgspec.field(name="class")
    route: str
    process: str
    batch: str
    age_ms: int
    first_token_ms: int | None
    input: int
    cached: int
    output: int


class LiveEngineBody(msgspec.Struct, kw_only=True):
    """Counters are since the engine's start; a client takes two looks and divides."""

    waiting: dict[str, int]
    running: dict[str, int]
    cells_used: int
    cells: int
    steps: int
    step_rows: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    stalls: int
    restarts: int
    resident_bytes: int


class LiveBody(msgspec.Struct, kw_only=True):
    """`at_ms`: the server's clock. `tokens`: of every ask since the server began, by meter, those that run included.
    `asks` are at most ASKS_SHOWN, the oldest first; `running` counts all."""

    server: str
    at_ms: int
    running: int
    asks: list[LiveAskBody]
    engines: dict[str, LiveEngineBody]
    tokens: dict[str, int]
    spent_today_micros: int


def routes(runtime: Runtime) -> list[Route]:
    return [Route("/v1/organization/live", Live(runtime).get, methods=["GET"])]


class Live:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def get(self, _: Request) -> Response:
        return json_reply(await self.body())

    async def body(self) -> LiveBody:
        runtime = self._runtime
        running = runtime.live.list()
        now = time.monotonic()
        asks: list[LiveAskBody] = []
        unsettled = Usage()
        for live in running:
            used = runtime.service.used(live.ask.id)
            unsettled = unsettled + used
            if len(asks) == ASKS_SHOWN:
                continue
            asks.append(
                LiveAskBody(
                    id=live.ask.id,
                    account=live.account.name,
                    key=live.account.key_name or live.account.key,
                    model=live.ask.model,
                    ask_class=live.ask.ask_class.value,
                    route=live.origin.route,
                    process=live.origin.process,
                    batch=live.origin.batch,
                    age_ms=int((now - live.begun_s) * 1e3),
                    first_token_ms=None if live.first_token_s is None else int(live.first_token_s * 1e3),
                    input=used.input,
                    cached=used.cached,
                    output=used.output,
                )
            )
        return LiveBody(
            server=runtime.server_id,
            at_ms=time.time_ns() // 1_000_000,
            running=len(running),
            asks=asks,
            engines=await self._engines(),
            tokens=msgspec.structs.asdict(runtime.live.settled + unsettled),
            spent_today_micros=await self._spent_today_micros(),
        )

    async def _engines(self) -> dict[str, LiveEngineBody]:
        def counts(given: dict[AskClass, int]) -> dict[str, int]:
            return {ask_class.value: given.get(ask_class, 0) for ask_class in AskClass}

        return {
            model: LiveEngineBody(
                waiting=counts(stats.waiting),
                running=counts(stats.live),
                cells_used=stats.cells_used,
                cells=stats.cells_total,
                steps=stats.steps,
                step_rows=stats.step_rows,
                prompt_tokens=stats.prompt_tokens,
                cached_tokens=stats.cached_tokens,
                output_tokens=sum(stats.output_tokens.values()),
                preemptions=stats.preemptions,
                stalls=stats.stalls,
                restarts=stats.restarts,
                resident_bytes=stats.resident_bytes,
            )
            for model, stats in (await self._runtime.service.stats()).items()
        }

    async def _spent_today_micros(self) -> int:
        now_ms = time.time_ns() // 1_000_000
        span = Span(since_ms=now_ms - now_ms % _DAY_MS, until_ms=now_ms + 1)
        return (await usage(self._runtime.database, by="day", span=span)).total.cost_micros
