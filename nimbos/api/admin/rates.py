"""A project's rate limits in OpenAI's own words, by model: `*` is all together."""

from __future__ import annotations

from dataclasses import asdict

import msgspec

from nimbos.accounts import Action
from nimbos.accounts.words import Changed
from nimbos.api.admin.allowances import limit_there
from nimbos.api.admin.desk import AdminRoute, Call, Page, Window, get, post
from nimbos.api.admin.owners import find_owner
from nimbos.api.admin.projects import PROJECTS
from nimbos.db import Transaction
from nimbos.ledger import Limit, limits_of, set_limit

UNLIMITED = 10**12  # what a limit shows that is not set; OpenAI's clients know no null there
_PREFIX = "rl-"
_OTHER_LIMITS = {
    "batch_1_day_max_input_tokens": "give the project a budget of tokens a day",
    "max_audio_megabytes_per_1_minute": "no model here takes audio",
    "max_images_per_1_minute": "no model here takes images",
    "max_requests_per_1_day": "limits are per minute; budgets are per day",
}


class RateLimitExtension(msgspec.Struct, kw_only=True):
    requests_burst: int | None
    tokens_burst: int | None
    concurrent: int | None


class RateLimitBody(msgspec.Struct, kw_only=True):
    """`model` `*`: all of them together."""

    id: str
    object: str = "project.rate_limit"
    model: str
    max_requests_per_1_minute: int
    max_tokens_per_1_minute: int
    x_nimbos: RateLimitExtension

    @classmethod
    def of(cls, limit: Limit) -> RateLimitBody:
        return cls(
            id=f"{_PREFIX}{limit.model}",
            model=limit.model,
            max_requests_per_1_minute=_shown(limit.requests_per_min),
            max_tokens_per_1_minute=_shown(limit.tokens_per_min),
            x_nimbos=RateLimitExtension(
                requests_burst=limit.requests_burst, tokens_burst=limit.tokens_burst, concurrent=limit.concurrent
            ),
        )


class RateLimitUpdate(msgspec.Struct, kw_only=True):
    max_requests_per_1_minute: int | None = None
    max_tokens_per_1_minute: int | None = None


async def list_rate_limits(call: Call) -> Page:
    """Those that are set, and `*`."""
    window = Window.of(call.query, default=100)
    call.query.text("before")

    def read() -> Transaction[list[Limit]]:
        owner = yield from find_owner("project", call.path["project_id"])
        found = yield from limits_of("project", owner.id)
        if all(limit.model != "*" for limit in found):
            found.append(Limit(owner_kind="project", owner_id=owner.id))
        return found

    bodies = sorted((RateLimitBody.of(limit) for limit in await call.read(read)), key=lambda body: body.id)
    return window.page([body for body in bodies if body.id > window.after][: window.limit + 1])


async def update_rate_limit(call: Call) -> RateLimitBody:
    wanted = call.body(RateLimitUpdate, refused=_OTHER_LIMITS)
    model = call.path["rate_limit_id"].removeprefix(_PREFIX)

    def change() -> Transaction[Changed[Limit]]:
        owner = yield from find_owner("project", call.path["project_id"])
        before = yield from limit_there("project", owner.id, model)
        now = before or Limit(owner_kind="project", owner_id=owner.id, model=model)
        after = yield from set_limit(
            "project",
            owner.id,
            model,
            owner_name=owner.name,
            requests_per_min=_wanted(wanted.max_requests_per_1_minute, now.requests_per_min),
            tokens_per_min=_wanted(wanted.max_tokens_per_1_minute, now.tokens_per_min),
            requests_burst=now.requests_burst,
            tokens_burst=now.tokens_burst,
            concurrent=now.concurrent,
        )
        return Changed(
            value=after,
            action="rate_limit.updated",
            target=f"{_PREFIX}{model}",
            project=owner.id,
            before=before,
            after=asdict(after),
        )

    return RateLimitBody.of(await call.change(change))


def _shown(limit: int | None) -> int:
    return UNLIMITED if limit is None else limit


def _wanted(given: int | None, before: int | None) -> int | None:
    if given is None:
        return before
    return None if given >= UNLIMITED else given


def routes() -> list[AdminRoute]:
    limits = f"{PROJECTS}/{{project_id}}/rate_limits"
    return [
        get(limits, Action.SEE, list_rate_limits),
        post(f"{limits}/{{rate_limit_id:path}}", Action.LIMITS, update_rate_limit),
    ]
