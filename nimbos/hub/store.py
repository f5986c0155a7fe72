"""The models on this machine's disk: one folder and one manifest for each.

    models/<id, made safe>-<hash>/manifest.json     written last: without it there is no model
                                  <file>.gguf …     or none, when the manifest names a file elsewhere
    models/.locks, models/.scratch

What a file says of itself is read once and cached by path, size and time.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from nimbos.errors import ModelUnusable
from nimbos.hub.disk import settle
from nimbos.hub.facts import ModelFacts, read_gguf, split_names, unsupported
from nimbos.hub.lock import FileLock
from nimbos.hub.reading import sha256_of

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


class ManifestFile(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`folder` is "" for files in the manifest's own folder. `catalog`: the catalog's name, where it has one."""

    version: Literal[1] = 1
    id: str
    source: str
    files: list[ManifestFile]
    pulled_at: str
    catalog: str = ""
    folder: str = ""

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def sha256(self) -> str:
        """Of the file; of a split model: of its files' hashes, joined by line feeds."""
        if len(self.files) == 1:
            return self.files[0].sha256
        return hashlib.sha256("\n".join(file.sha256 for file in self.files).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """An installed model. With a `problem` it cannot serve, and `facts` may be empty."""

    id: str
    path: Path
    size_bytes: int
    sha256: str
    source: str
    facts: ModelFacts
    problem: str | None = None


class _Remembered(msgspec.Struct, frozen=True, kw_only=True):
    """What was read from a file when it had this `stamp`: size and time of each part."""

    version: Literal[2] = 2
    stamp: list[tuple[int, int]]
    facts: ModelFacts | None = None
    problem: str | None = None
    sha256: str = ""


class Store:
    def __init__(self, models_dir: Path, cache_dir: Path) -> None:
        self.models_dir = models_dir
        self.scratch_dir = models_dir / ".scratch"
        self._facts_dir = cache_dir / "gguf"

    def folder(self, model_id: str) -> Path:
        readable = _UNSAFE.sub("_", model_id)[:80].strip("._")
        tag = hashlib.sha256(model_id.encode(errors="backslashreplace")).hexdigest()[:8]
        return self.models_dir / f"{readable}-{tag}"

    def lock(self, model_id: str) -> FileLock:
        return FileLock(self.models_dir / ".locks" / f"{self.folder(model_id).name}.lock")

    def manifest(self, model_id: str) -> Manifest | None:
        try:
            return _read_manifest(self.folder(model_id))
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def write(self, manifest: Manifest) -> None:
        folder = self.folder(manifest.id)
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / "manifest.json.new"
        new.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
        settle(new, folder / "manifest.json")

    def remove(self, model_id: str) -> bool:
        """Forgets a model and deletes its folder, never a file elsewhere. False when there was nothing."""
        folder = self.folder(model_id)
        if not folder.exists():
            return False
        (folder / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(folder)
        return True

    def models(self) -> list[LocalModel]:
        """All of them; a folder without a manifest is a download that has not ended."""
        found = []
        for folder in sorted(self.models_dir.glob("*-????????")):
            try:
                found.append(self.local(_read_manifest(folder)))
            except FileNotFoundError:
                continue
            except msgspec.DecodeError as error:
                found.append(_broken(folder, f"its manifest is damaged ({error}); pull it again, or delete {folder}"))
        return sorted(found, key=lambda model: model.id)

    def local(self, manifest: Manifest) -> LocalModel:
        folder = Path(manifest.folder) if manifest.folder else self.folder(manifest.id)
        path = folder / manifest.files[0].name
        facts, problem = self._examine(path)
        return LocalModel(
            id=manifest.id,
            path=path,
            size_bytes=manifest.size_bytes,
            sha256=manifest.sha256,
            source=manifest.source,
            facts=facts,
            problem=_difference(folder, manifest) or problem,
        )

    def by_source(self, source: str) -> Manifest | None:
        for folder in self.models_dir.glob("*-????????"):
            try:
                manifest = _read_manifest(folder)
            except (FileNotFoundError, msgspec.DecodeError):
                continue
            if manifest.source == source:
                return manifest
        return None

    def at_path(self, path: Path) -> LocalModel:
        """A file that nobody pulled. Its hash is computed once."""
        stamp = _stamp_of(path)  # from before anything of it is read
        facts, problem = self._examine(path)
        if problem is not None:
            return _unhashed(path, facts, problem)
        remembered = self._remembered(path)
        sha256 = remembered.sha256 if remembered else ""
        if not sha256:
            parts = [path.with_name(name) for name in split_names(path.name)]
            files = [
                ManifestFile(name=part.name, size_bytes=part.stat().st_size, sha256=sha256_of(part)) for part in parts
            ]
            sha256 = Manifest(id="", source="", files=files, pulled_at="").sha256
            self._remember(path, stamp, facts, None, sha256)
        return LocalModel(
            id=path.stem, path=path, size_bytes=facts.file_bytes, sha256=sha256, source=str(path), facts=facts
        )

    def _examine(self, path: Path) -> tuple[ModelFacts, str | None]:
        """What the file says, and why it cannot serve."""
        stamp, remembered = _stamp_of(path), self._remembered(path)
        if remembered is None:
            try:
                facts, problem = read_gguf(path).facts, None
            except ModelUnusable as error:
                facts, problem = ModelFacts(), error.reason
            self._remember(path, stamp, facts, problem, "")
        else:
            facts, problem = remembered.facts or ModelFacts(), remembered.problem
        if problem is None and not facts.supported:
            problem = unsupported(facts.architecture)
        return facts, problem

    def _memory(self, path: Path) -> Path:
        return self._facts_dir / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"

    def _remembered(self, path: Path) -> _Remembered | None:
        try:
            remembered = msgspec.json.decode(self._memory(path).read_bytes(), type=_Remembered)
            return remembered if remembered.stamp == _stamp(path) else None
        except (OSError, ValueError):
            return None

    def _remember(
        self, path: Path, stamp: list[tuple[int, int]] | None, facts: ModelFacts, problem: str | None, sha256: str
    ) -> None:
        """`stamp`: from before it was read; what changed meanwhile is not remembered. A cache: where it cannot be
        written, files are read again."""
        try:
            if stamp is None or stamp != _stamp(path):
                return
            self._facts_dir.mkdir(parents=True, exist_ok=True)
            new = self._memory(path).with_suffix(f".{id(stamp)}.new")
            new.write_bytes(msgspec.json.encode(_Remembered(stamp=stamp, facts=facts, problem=problem, sha256=sha256)))
            new.replace(self._memory(path))
        except (OSError, ValueError):
            return


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_manifest(folder: Path) -> Manifest:
    """Raises: FileNotFoundError; msgspec.DecodeError, also for names that lead out of the folder."""
    try:
        content = (folder / "manifest.json").read_bytes()
    except NotADirectoryError as error:
        raise FileNotFoundError(folder) from error
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error
    if not manifest.files or any(Path(file.name).name != file.name for file in manifest.files):
        raise msgspec.DecodeError("it names no proper files")
    return manifest


def _stamp(path: Path) -> list[tuple[int, int]]:
    """Raises: OSError, ValueError."""
    states = [path.with_name(name).stat() for name in split_names(path.name)]
    return [(state.st_size, state.st_mtime_ns) for state in states]


def _stamp_of(path: Path) -> list[tuple[int, int]] | None:
    try:
        return _stamp(path)
    except (OSError, ValueError):
        return None


def _difference(folder: Path, manifest: Manifest) -> str | None:
    for file in manifest.files:
        path = folder / file.name
        if not path.is_file():
            return f"the file {path} is gone; pull it again"
        if path.stat().st_size != file.size_bytes:
            return f"{path} has {path.stat().st_size} bytes and had {file.size_bytes} when it was pulled; pull it again"
    return None


def _broken(folder: Path, problem: str) -> LocalModel:
    return LocalModel(
        id=folder.name, path=folder, size_bytes=0, sha256="", source="", facts=ModelFacts(), problem=problem
    )


def _unhashed(path: Path, facts: ModelFacts, problem: str) -> LocalModel:
    return LocalModel(
        id=path.stem,
        path=path,
        size_bytes=facts.file_bytes,
        sha256="",
        source=str(path),
        facts=facts,
        problem=problem,
    )
