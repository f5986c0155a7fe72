"""What is done with fields that nobody knows here, where `server.unknown_fields` overrides what each dialect does.

`UnknownFields` says it for a request and `performing` for a line of a batch; `body.py` and `lenient.py`, which find
such fields, look it up. It concerns every body and no route, so a context variable carries it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nimbos.batches import AnswerJournal, Endpoint, Reply
from nimbos.config import UnknownFieldsPolicy
from nimbos.types import Account, Origin

IGNORED_HEADER = "x-nimbos-ignored"
_NAMES_MAX = 32
_NAME_CHARACTERS = 60
_UNPRINTABLE = re.compile(r"[^A-Za-z0-9_.\[\]-]")
_STRICT_ALWAYS = "/v1/organization"  # whoever mistypes a limit there must hear of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Handling:
    """For one body. `policy`: "" is the dialect's own way. `ignored`: what a strict dialect left out all the same."""

    policy: UnknownFieldsPolicy
    ignored: dict[str, None] = field(default_factory=dict)


_OWN_WAY = Handling(policy="")
_handling: ContextVar[Handling] = ContextVar("unknown_fields", default=_OWN_WAY)


def handling() -> Handling:
    """How the body that is being read is to be handled."""
    return _handling.get()


def header_of(names: Iterable[str]) -> dict[str, str]:
    """Nothing when there are none. What a client wrote cannot end the header or make it long."""
    found = [*names]
    if not found:
        return {}
    shown = [_UNPRINTABLE.sub("?", name[:_NAME_CHARACTERS]) for name in found[:_NAMES_MAX]]
    more = len(found) - len(shown)
    return {IGNORED_HEADER: ", ".join([*shown, f"and {more} more"] if more else shown)}


class UnknownFields:
    """ASGI: sets the policy, and names in the answer what was left out."""

    def __init__(self, app: ASGIApp, *, policy: UnknownFieldsPolicy) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._policy or scope["type"] != "http" or scope["path"].startswith(_STRICT_ALWAYS):
            await self._app(scope, receive, send)
            return
        found = Handling(policy=self._policy)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start" and found.ignored:
                headers = [(name.encode(), value.encode()) for name, value in header_of(found.ignored).items()]
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        token = _handling.set(found)
        try:
            await self._app(scope, receive, named)
        finally:
            _handling.reset(token)


def performing(endpoint: Endpoint, policy: UnknownFieldsPolicy) -> Endpoint:
    """The same for bodies that come without a request."""

    async def perform(account: Account, body: bytes, *, origin: Origin, journal: AnswerJournal | None = None) -> Reply:
        token = _handling.set(Handling(policy=policy))
        try:
            return await endpoint.perform(account, body, origin=origin, journal=journal)
        finally:
            _handling.reset(token)

    return replace(endpoint, perform=perform) if policy else endpoint
