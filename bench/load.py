"""The client of both sides: `/v1/completions` with token ids, streamed, greedy, of a fixed length.

One client for both, so that its own cost falls on both. It knows a server by its address only; what a side needs
besides (a slot number, a class header) comes in as `extra` fields and `headers`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np

from bench.server import Server


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`leave_after`: the client goes away after so many events."""

    prompt: tuple[int, ...]
    out_tokens: int
    extra: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    leave_after: int | None = None


@dataclass(slots=True, eq=False)
class Answer:
    """What came back so far; times in seconds of the monotonic clock. A cancelled answer keeps what had arrived.

    `arrivals`: one for each event that held text. `prompt_tokens`, `cached_tokens` and `output_tokens` are the
    server's own counts, and known only once it has finished.
    """

    question: Question
    asked_s: float
    arrivals: list[float] = field(default_factory=list)
    finished_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def first_token_s(self) -> float | None:
        return self.arrivals[0] - self.asked_s if self.arrivals else None

    @property
    def latency_s(self) -> float | None:
        return None if self.finished_s is None else self.finished_s - self.asked_s

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def computed_tokens(self) -> int:
        """Of the prompt."""
        return self.prompt_tokens - self.cached_tokens

    def received_tokens(self) -> int:
        """The count of a finished answer; of an unfinished one, its events, each of which is one token as a rule."""
        return self.output_tokens or len(self.arrivals)

    def require(self) -> Answer:
        """Raises: RuntimeError unless it is whole."""
        if self.error or self.finished_s is None or self.output_tokens != self.question.out_tokens:
            got, want = self.output_tokens, self.question.out_tokens
            raise RuntimeError(f"An answer is not whole ({got} of {want} tokens). {self.error}")
        return self


@dataclass(slots=True, eq=False)
class Client:
    server: Server
    http: httpx2.AsyncClient
    answers: list[Answer] = field(default_factory=list)

    async def ask(self, question: Question) -> Answer:
        """Also appended to `answers` at once, so that a cancelled ask is not forgotten."""
        answer = Answer(question=question, asked_s=time.monotonic())
        self.answers.append(answer)
        body = {
            "model": self.server.model,
            "prompt": list(question.prompt),
            "max_tokens": question.out_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **question.extra,
        }
        headers = {**self.server.headers, **question.headers}
        try:
            async with self.http.stream(
                "POST", f"{self.server.url}/v1/completions", json=body, headers=headers
            ) as reply:
                if reply.status_code != 200:
                    answer.error = f"{reply.status_code}: {(await reply.aread())[:300]!r}"
                    return answer
                async for line in reply.aiter_lines():
                    if line.startswith("data: ") and not _take(answer, line[6:]):
                        break
                    if question.leave_after is not None and len(answer.arrivals) >= question.leave_after:
                        break
        except httpx2.HTTPError as error:
            answer.error = repr(error)
        return answer

    async def burst(self, questions: list[Question]) -> list[Answer]:
        """All at once; every answer must be whole."""
        answers = await asyncio.gather(*(self.ask(question) for question in questions))
        return [answer.require() for answer in answers]

    async def warm_up(self, prompt: tuple[int, ...]) -> None:
        """First asks pay for pages and buffers that later ones do not; measured in `first_token.py` only."""
        (await self.ask(Question(prompt=prompt, out_tokens=2))).require()


def _take(answer: Answer, event: str) -> bool:
    """False when this was the last."""
    if event == "[DONE]":
        answer.finished_s = time.monotonic()
        return False
    chunk = json.loads(event)
    if "error" in chunk:
        answer.error = str(chunk["error"])[:300]
    if any(choice.get("text") for choice in chunk.get("choices") or ()):
        answer.arrivals.append(time.monotonic())
    if usage := chunk.get("usage"):
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.output_tokens = usage["completion_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return True


@asynccontextmanager
async def client_of(server: Server, *, limit_s: float) -> AsyncIterator[Client]:
    """`limit_s`: no ask takes longer."""
    limits = httpx2.Limits(max_connections=512, max_keepalive_connections=512)
    timeout = httpx2.Timeout(limit_s, connect=30)
    async with httpx2.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as http:
        yield Client(server=server, http=http)


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """Prompts of random ids in `[low, high)`: in a BPE vocabulary the low ids are its commonest pieces of text."""

    low: int
    high: int

    def prompt(self, tokens: int, *, seed: tuple[int, ...]) -> tuple[int, ...]:
        """The same seed gives the same prompt, on both sides and in each run."""
        random = np.random.default_rng(seed)
        return tuple(int(id) for id in random.integers(self.low, self.high, tokens))


def percentile(values: list[float], percent: float) -> float:
    """Nearest rank: a value that did occur. Not a number where there are none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]
