"""`/v1/processes`: agents as durable processes, for those outside. What they do is the kernel's (`nimbos/kernel`).

A process belongs to the project of the key that spawned it: others find no such process. Keys of people who only read
the organisation look and send nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimbos.accounts import Role
from nimbos.api import body as bodies
from nimbos.api import process_events as events
from nimbos.api.access import account_of, identity_of
from nimbos.api.exchange import event_stream, json_reply
from nimbos.api.fields import class_of
from nimbos.api.process_signals import BudgetBody, SignalBody, checked_body, checked_id, top_up_of
from nimbos.api.process_telling import ProcessTeller
from nimbos.api.process_wire import CostTold, Forks, ProcessList, ProcessTold, SignalTold, VerifiedTold
from nimbos.api.query import choice_of, limit_of, only
from nimbos.errors import Forbidden
from nimbos.kernel import Head, SignalKind, State
from nimbos.runtime import Runtime
from nimbos.types import Account, AskClass, new_id

LIST_MAX = 1_000
EVENTS_MAX = 500
_OPEN = frozenset(State) - {State.DONE}
STATES = ("", "open", *(state.value for state in State))  # open: whatever is not done

T = TypeVar("T", bound=msgspec.Struct)


class ProcessBody(msgspec.Struct, kw_only=True):
    """`program`: its id, a beginning of it, or a name. `key`: the same one spawns one process alone."""

    program: str
    input: Any = ""
    model: str | None = None
    name: str | None = None
    ask_class: AskClass | None = msgspec.field(name="class", default=None)
    budget: BudgetBody | None = None
    key: str | None = None


class ForkBody(msgspec.Struct, kw_only=True):
    """`at`: the event up to which the past is shared; without it, all there is. `key`: the same one makes no second
    forks of this process."""

    at: int | None = None
    n: int = 1
    key: str | None = None


class ReplayBody(msgspec.Struct, kw_only=True):
    """`model`: who is asked again; without it nobody is, and the log is only folded."""

    model: str | None = None


def routes(runtime: Runtime) -> list[Route]:
    processes = ProcessRoutes(runtime)
    one = "/v1/processes/{pid}"
    return [
        Route("/v1/processes", processes.create, methods=["POST"]),
        Route("/v1/processes", processes.list, methods=["GET"]),
        Route(one, processes.retrieve, methods=["GET"]),
        Route(one, processes.drop, methods=["DELETE"]),
        Route(f"{one}/events", processes.events, methods=["GET"]),
        Route(f"{one}/segments/{{hash}}", processes.segment, methods=["GET"]),
        Route(f"{one}/signals", processes.signal, methods=["POST"]),
        Route(f"{one}/fork", processes.fork, methods=["POST"]),
        Route(f"{one}/adopt", processes.adopt, methods=["POST"]),
        Route(f"{one}/tree", processes.tree, methods=["GET"]),
        Route(f"{one}/cost", processes.cost, methods=["GET"]),
        Route(f"{one}/verify", processes.verify, methods=["GET"]),
        Route(f"{one}/replay", processes.replay, methods=["POST"]),
    ]


class ProcessRoutes:
    def __init__(self, runtime: Runtime) -> None:
        self._kernel = runtime.kernel
        self._settings = runtime.settings.server
        self._teller = ProcessTeller(runtime.kernel)
        self._events = events.EventTeller(runtime.kernel)

    async def create(self, request: Request) -> Response:
        body = await self._body(request, ProcessBody)
        account = _changing(request)
        wanted = body.ask_class or request.headers.get("x-nimbos-class")
        pid = await self._kernel.spawn(
            account,
            body.program,
            body.input,
            name=body.name or "",
            model=body.model or "",
            ask_class=class_of(None, None, wanted, account) if wanted is not None else None,
            budget=body.budget.allowance() if body.budget is not None else None,
            key=body.key or "",
        )
        return json_reply(await self._now(account, pid))

    async def list(self, request: Request) -> Response:
        account = account_of(request)
        query = only(request, "after", "limit", "state", "prefix")
        limit = limit_of(query, default=100, most=LIST_MAX)
        state = choice_of(query, "state", STATES)
        heads = await self._kernel.list(
            account,
            limit=limit + 1,
            after=query.get("after", ""),
            states=_OPEN if state == "open" else (State(state),) if state else (),
            prefix=query.get("prefix", ""),
        )
        return json_reply(await self._page(account, heads, limit))

    async def retrieve(self, request: Request) -> Response:
        return json_reply(await self._now(account_of(request), request.path_params["pid"]))

    async def events(self, request: Request) -> Response:
        account, pid = account_of(request), request.path_params["pid"]
        query = only(request, "after", "limit", "stream", "watch")
        after = events.seq_of(query.get("after"), "after")
        if choice_of(query, "stream", ("true", "false")) == "false":
            limit = limit_of(query, default=100, most=EVENTS_MAX)
            return json_reply(await self._events.page(account, pid, after=after, limit=limit))
        last = events.seq_of(request.headers.get("last-event-id"), "Last-Event-ID")
        watch = choice_of(query, "watch", ("false", "true")) == "true"
        told = self._events.stream(
            account, pid, after=max(after, last), watch=watch, ended=lambda: self._now(account, pid)
        )
        return await event_stream(request, told, headers=dict, settings=self._settings, framing=events.FRAMING)

    async def segment(self, request: Request) -> Response:
        """Of this project's; which process names it does not matter."""
        account, pid = account_of(request), request.path_params["pid"]
        await self._kernel.find(account, pid)
        content = await self._kernel.text(account, request.path_params["hash"])
        return Response(content, media_type="application/octet-stream")

    async def signal(self, request: Request) -> Response:
        body = await self._body(request, SignalBody)
        account, pid = _changing(request), request.path_params["pid"]
        head = await self._kernel.find(account, pid)
        external_id = checked_id(body.id) or new_id("sig")
        source = f"user:{account.key or account.id}"
        if body.id and await self._kernel.was_sent(pid, source=source, external_id=external_id):
            return json_reply(SignalTold(id=external_id, process=await self._now(account, pid)))
        content = checked_body(body, head)
        if body.signal == "top_up":
            await self._kernel.top_up(account, pid, top_up_of(content), source=source, external_id=external_id)
        else:
            await self._kernel.signal(
                account,
                pid,
                SignalKind(body.signal),
                source=source,
                external_id=external_id,
                about=body.about or (head.asked if body.signal == "answer" else ""),
                body=content,
            )
        return json_reply(SignalTold(id=external_id, process=await self._now(account, pid)))

    async def tree(self, request: Request) -> Response:
        """Parents before children."""
        account, pid = account_of(request), request.path_params["pid"]
        query = only(request, "after", "limit")
        limit = limit_of(query, default=LIST_MAX, most=LIST_MAX)
        heads = await self._kernel.tree(account, pid, after=query.get("after", ""), limit=limit + 1)
        return json_reply(await self._page(account, heads, limit))

    async def cost(self, request: Request) -> Response:
        account, pid = account_of(request), request.path_params["pid"]
        return json_reply(CostTold.of(await self._kernel.cost(account, pid)))

    async def fork(self, request: Request) -> Response:
        body = await self._body(request, ForkBody)
        account, pid = _changing(request), request.path_params["pid"]
        made = await self._kernel.fork(account, pid, at=body.at, n=body.n, key=body.key or "")
        return json_reply(Forks(data=[await self._now(account, fork) for fork in made]))

    async def adopt(self, request: Request) -> Response:
        account, pid = _changing(request), request.path_params["pid"]
        await self._kernel.adopt(account, pid)
        return json_reply(await self._now(account, pid))

    async def drop(self, request: Request) -> Response:
        account, pid = _changing(request), request.path_params["pid"]
        await self._kernel.drop(account, pid)
        return json_reply(await self._now(account, pid))

    async def verify(self, request: Request) -> Response:
        account, pid = account_of(request), request.path_params["pid"]
        await self._kernel.find(account, pid)
        found = await self._kernel.log.verify(pid)
        return json_reply(
            VerifiedTold(id=pid, events=found.events, hash=found.hash, broken_at=found.broken_at, why=found.why)
        )

    async def replay(self, request: Request) -> Response:
        body = await self._body(request, ReplayBody)
        account, pid = _changing(request), request.path_params["pid"]
        told = self._events.replay(account, pid, model=body.model or "")
        return await event_stream(request, told, headers=dict, settings=self._settings, framing=events.FRAMING)

    async def _now(self, account: Account, pid: str) -> ProcessTold:
        return await self._teller.one(account, await self._kernel.find(account, pid))

    async def _page(self, account: Account, heads: Sequence[Head], limit: int) -> ProcessList:
        """`heads`: one more than the page has, if there is one."""
        told = await self._teller.every(account, heads[:limit])
        return ProcessList(
            data=told,
            first_id=told[0].id if told else None,
            last_id=told[-1].id if told else None,
            has_more=len(heads) > limit,
        )

    async def _body(self, request: Request, into: type[T]) -> T:
        content = await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )
        return bodies.decode(content, into)


def _changing(request: Request) -> Account:
    """Raises: Forbidden for one that only reads."""
    identity = identity_of(request)
    if identity.role is Role.READER:
        raise Forbidden("The role reader looks at processes, and starts and changes none.")
    return identity.account
