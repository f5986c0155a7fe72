"""Log-in to the console: a name and a password become a cookie. OIDC joins here as another way to `open_session`."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimbos.accounts import Accounts, Action
from nimbos.accounts.login import SESSION_S
from nimbos.accounts.roles import may
from nimbos.api import body as bodies
from nimbos.api.access import LOGIN, cookie_name, session_token
from nimbos.api.admin.desk import BODY_STALL_S, AdminRoute, Call, answer, get, post
from nimbos.errors import Conflict

ME = "/v1/console/me"
LOGOUT = "/v1/console/logout"
_LOGIN_BYTES_MAX = 16 * 1024


class LoginBody(msgspec.Struct, kw_only=True):
    """`name`: the e-mail address, or the name where only one user has it."""

    name: str
    password: str


class MeBody(msgspec.Struct, kw_only=True):
    object: str = "console.me"
    id: str
    email: str
    role: str
    actor: str
    may: list[str]


class LoggedOut(msgspec.Struct, kw_only=True):
    object: str = "console.logout"


async def me(call: Call) -> MeBody:
    identity = call.identity
    return MeBody(
        id=identity.actor.user or identity.actor.service_account,
        email=identity.actor.email,
        role=identity.role.value if identity.role is not None else "",
        actor=identity.actor.kind,
        may=[action.name.lower() for action in Action if may(identity.role, action)],
    )


def login_routes(accounts: Accounts) -> list[Route]:
    """These read and set the cookie themselves."""

    async def log_in(request: Request) -> Response:
        content = await bodies.read(request, limit_bytes=_LOGIN_BYTES_MAX, stall_s=BODY_STALL_S)
        wanted = bodies.decode(content, LoginBody)
        address = request.client.host if request.client is not None else ""
        session = await accounts.log_in(wanted.name, wanted.password, address=address)
        user = session.user
        reply = answer({"object": "console.login", "id": user.id, "email": user.email, "role": user.role.value})
        _set_cookie(reply, request, session.token, max_age=SESSION_S)
        return reply

    return [Route(LOGIN, log_in, methods=["POST"])]


async def log_out(call: Call) -> Response:
    call.check_no_body()
    token = session_token(call.request.scope)
    if token is None or call.actor.kind != "session":
        raise Conflict("This request does not come from a log-in; a key is revoked instead.")
    await call.accounts.log_out(token, call.actor)
    reply = answer(LoggedOut())
    _set_cookie(reply, call.request, "", max_age=0)
    return reply


def _set_cookie(reply: Response, request: Request, token: str, *, max_age: int) -> None:
    reply.set_cookie(
        cookie_name(request.scope),
        token,
        max_age=max_age,
        path="/",
        secure=request.scope["scheme"] == "https",
        httponly=True,
        samesite="strict",
    )


def routes() -> list[AdminRoute]:
    return [get(ME, Action.SELF, me), post(LOGOUT, Action.SELF, log_out)]
