"""Ollama's routes about models: which there are, what one is, which are loaded, and fetching and removing them.

Fetching and removing need the scope `admin`, of an owner or an admin, and are in the audit log. What Ollama makes of a
Modelfile has no counterpart here and is refused.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response

from nimbos.accounts import Accounts, Actor, Identity, allowed_model
from nimbos.accounts.roles import runs_everything
from nimbos.accounts.words import Changed
from nimbos.api import body as bodies
from nimbos.api import ollama_wire as told
from nimbos.api.access import account_of, identity_of
from nimbos.api.exchange import event_stream, json_reply
from nimbos.api.lenient import Ignored, read_known
from nimbos.api.ollama_pulling import Pulling
from nimbos.api.ollama_request import plain_name
from nimbos.api.sse import or_gone
from nimbos.config import Settings
from nimbos.db import Transaction
from nimbos.errors import Conflict, Forbidden, InvalidRequest, ModelNotFound, ModelUnusable, NimbosError
from nimbos.hub import Hub, LocalModel, Progress, read_gguf
from nimbos.keys import ADMIN
from nimbos.service import Service
from nimbos.sources import Listed
from nimbos.types import Account

_PULLED = ("hf:", "ms:", "pypi:")
_NOTED_CHARACTERS = 300
_UNITS = ((10**9, "B"), (10**6, "M"), (10**3, "K"))
_log = structlog.get_logger(__name__)

_FIM_KEYS = ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id")


class Named(msgspec.Struct, kw_only=True):
    """`name` is an older word for `model`."""

    model: str | None = None
    name: str | None = None
    stream: bool | None = None

    @property
    def wanted(self) -> str:
        """Raises: InvalidRequest."""
        found = self.model or self.name
        if not found:
            raise InvalidRequest("`model` is missing.", param="model")
        return plain_name(found)


class Models:
    def __init__(self, service: Service, hub: Hub, accounts: Accounts, settings: Settings) -> None:
        self._service = service
        self._hub = hub
        self._accounts = accounts
        self._settings = settings

    async def version(self, _: Request) -> Response:
        return json_reply(told.Version(told.VERSION))

    async def tags(self, request: Request) -> Response:
        return json_reply(told.ModelEntries([_entry(listed) for listed in await self._visible(request)]))

    async def running(self, request: Request) -> Response:
        """Those whose engines answer now. None is said to expire: a model goes when its memory is needed."""
        loaded = await self._service.stats()
        entries = [_entry(listed) for listed in await self._visible(request) if listed.id in loaded]
        for entry in entries:
            entry.size = loaded[entry.name].resident_bytes or entry.size
            entry.size_vram = 0
            entry.context_length = loaded[entry.name].cells_total
        return json_reply(told.ModelEntries(entries))

    async def show(self, request: Request) -> Response:
        ignored = Ignored()
        listed = await self._find((await self._named(request, ignored)).wanted, await self._visible(request))
        check_model(account_of(request), listed.id)
        if listed.model is None:
            template = (await self._service.card(listed.id)).chat_template
            metadata: dict[str, Any] = {"general.architecture": "scripted"}
        else:
            template, metadata = await asyncio.to_thread(_read, listed.model)
        return json_reply(_shown(listed, template, metadata), headers=ignored.header())

    async def pull(self, request: Request) -> Response:
        ignored = Ignored()
        named = await self._named(request, ignored)
        _require_admin(identity_of(request), "Fetching a model")
        name = named.wanted
        if self._hub.catalog.get(name) is None and not name.startswith(_PULLED):
            raise ModelNotFound(name, have=tuple(model.name for model in self._hub.catalog.models))
        actor = _actor_of(request)
        if named.stream is False:
            await or_gone(request, self._pulled(actor, name))
            return json_reply(told.Status(status="success"), headers=ignored.header())
        return await event_stream(
            request,
            Pulling(lambda progress: self._pulled(actor, name, progress)).lines(),
            headers=ignored.header,
            settings=self._settings.server,
            framing=told.FRAMING,
        )

    async def delete(self, request: Request) -> Response:
        ignored = Ignored()
        named = await self._named(request, ignored)
        _require_admin(identity_of(request), "Removing a model")
        listed = await self._find(named.wanted, await self._visible(request))
        if listed.model is None or self._service.engine_pid(listed.id) is not None:
            why = "is loaded" if listed.model is not None else "is a script of its operator's"
            raise Conflict(f"The model {listed.id!r} {why} and cannot be removed now.")
        before = await asyncio.to_thread(self._installed, listed.id)
        await asyncio.to_thread(self._hub.remove, listed.id)
        await self._note(_actor_of(request), "model.removed", listed.id, before=before)
        return Response(headers=ignored.header())

    async def refuse(self, request: Request) -> Response:
        raise InvalidRequest(
            f"{request.url.path[:100]} is not supported: models are made of GGUF files here, by /api/pull or "
            "`nimbos pull`."
        )

    async def _pulled(self, actor: Actor, name: str, progress: Progress | None = None) -> None:
        """Raises: what `Hub.pull` raises; StorageUnavailable."""
        before = await asyncio.to_thread(self._installed, name)
        model = await self._hub.pull(name, progress=progress)
        after = _noted(model)
        if after != before:
            await self._note(actor, "model.pulled", model.id, before=before, after=after)

    def _installed(self, name: str) -> dict[str, Any] | None:
        try:
            return _noted(self._hub.find(name, allow_path=False))
        except ModelNotFound:
            return None
        except ModelUnusable as error:
            return {"problem": error.message[:_NOTED_CHARACTERS]}

    async def _note(self, actor: Actor, action: str, model: str, *, before: Any, after: Any = None) -> None:
        """In the audit log, when it is done: files cannot be in a transaction. Also where the client is gone."""

        def change() -> Transaction[Changed[None]]:
            yield from ()
            return Changed(value=None, action=action, target=model, before=before, after=after)

        try:
            await asyncio.shield(self._accounts.change(actor, change))
        except NimbosError as error:
            _log.error("models.change_not_audited", action=action, model=model, actor=actor.id, code=error.code)
            raise

    async def _visible(self, request: Request) -> list[Listed]:
        """Those that this key may ask."""
        account = account_of(request)
        return [listed for listed in await self._service.models() if allowed_model(account, listed.id)]

    async def _named(self, request: Request, ignored: Ignored) -> Named:
        server = self._settings.server
        content = await bodies.read(request, limit_bytes=server.max_body_bytes, stall_s=server.stall_write_s)
        return read_known(bodies.table_of(content), Named, ignored)

    async def _find(self, name: str, visible: list[Listed]) -> Listed:
        """By id, alias, catalog name or source. Who finds none is told of those that are `visible`.

        Raises: ModelNotFound, ModelUnusable.
        """
        name = self._settings.server.aliases.get(name, name)
        models = await self._service.models()
        for listed in models:
            if listed.id == name:
                return listed
        try:
            found = await asyncio.to_thread(self._hub.find, name, allow_path=False)
        except ModelNotFound as error:
            raise ModelNotFound(name, have=tuple(listed.id for listed in visible)) from error
        return next(
            (listed for listed in models if listed.id == found.id),
            Listed(id=found.id, created=0, owner="nimbos", model=found),
        )


def _noted(model: LocalModel) -> dict[str, Any]:
    return {"source": model.source, "sha256": model.sha256, "size_bytes": model.size_bytes}


def _actor_of(request: Request) -> Actor:
    address = request.client.host if request.client is not None else ""
    return replace(identity_of(request).actor, address=address)


def check_model(account: Account, model: str) -> None:
    """Raises: Forbidden."""
    if not allowed_model(account, model):
        raise Forbidden(f"This key may not ask the model {model!r}.", param="model")


def _require_admin(identity: Identity, what: str) -> None:
    """Of an owner or an admin: who only reads, or became a member, has its key's scope and not the right."""
    if not runs_everything(identity.role):
        raise Forbidden(
            f"{what} needs a key with the scope {ADMIN!r}, of an owner or an admin. On this machine, `nimbos pull` and "
            "`nimbos rm` do it."
        )


def _entry(listed: Listed) -> told.ModelEntry:
    model = listed.model
    return told.ModelEntry(
        name=listed.id,
        model=listed.id,
        modified_at=told.written_time(listed.created),
        size=model.size_bytes if model is not None else 0,
        digest=model.sha256 if model is not None else "",
        details=_details(model),
    )


def _details(model: LocalModel | None) -> told.Details:
    if model is None:
        return told.Details(format="", family="", families=[], parameter_size="", quantization_level="")
    facts = model.facts
    return told.Details(
        format="gguf",
        family=facts.architecture,
        families=[facts.architecture],
        parameter_size=_parameters(facts.parameters),
        quantization_level=facts.quantisation,
    )


def _parameters(count: int) -> str:
    """494032768 → 494.0M, as Ollama writes it."""
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _read(model: LocalModel) -> tuple[str, dict[str, Any]]:
    """The chat template and the facts that clients look for, from the file; of a file that cannot be read, nothing."""
    try:
        metadata = dict(read_gguf(model.path).metadata)
    except NimbosError:
        return "", {}
    template = metadata.get("tokenizer.chat_template", "")
    kept = {
        key: value for key, value in metadata.items() if isinstance(value, int | float) or key.startswith("general.")
    }
    return template if isinstance(template, str) else "", kept


def _shown(listed: Listed, template: str, metadata: dict[str, Any]) -> told.Shown:
    facts = listed.model.facts if listed.model is not None else None
    architecture = str(metadata.get("general.architecture", facts.architecture if facts is not None else ""))
    information: dict[str, Any] = dict(metadata)
    if facts is not None:
        information |= {
            "general.architecture": architecture,
            "general.parameter_count": facts.parameters,
            f"{architecture}.context_length": facts.context_tokens,
            f"{architecture}.embedding_length": facts.embedding_size,
        }
    return told.Shown(
        license=facts.licence if facts is not None else "",
        modelfile=f"# Made of a GGUF file, not of a Modelfile.\nFROM {listed.id}\n",
        parameters="",
        template=template,
        details=_details(listed.model),
        model_info=information,
        capabilities=_capabilities(facts.kind if facts is not None else "generate", template, metadata),
        modified_at=told.written_time(listed.created),
    )


def _capabilities(kind: str, template: str, metadata: dict[str, Any]) -> list[str]:
    """By what the template speaks of, as it is the template that makes a model call and think."""
    if kind != "generate":
        return ["embedding" if kind == "embed" else kind]
    found = ["completion"]
    if "tools" in template or "tool_call" in template:
        found.append("tools")
    if "<think>" in template or "enable_thinking" in template:
        found.append("thinking")
    if any(key in metadata for key in _FIM_KEYS):
        found.append("insert")
    return found
