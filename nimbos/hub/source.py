"""Where a model can come from: `hf:owner/repository/file`, `ms:owner/repository/file`, `pypi:package[==version]/path`,
an `https://` address, or a path on this machine. Parses and checks; fetches nothing.

A name that came from outside becomes a file name only after `safe_file_name`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

from nimbos.errors import InvalidRequest
from nimbos.hub.facts import split_names

_WORD = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
_VERSION = re.compile(r"^[A-Za-z0-9][A-Za-z0-9.+!_-]{0,63}$")
_UNSAFE = re.compile(r"[^A-Za-z0-9._+=@-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file (or, with `file` "", the question which files there are) of a repository on a hub."""

    hub: Literal["hf", "ms"]
    repository: str
    file: str

    def __str__(self) -> str:
        return f"{self.hub}:{self.repository}/{self.file}".rstrip("/")

    @property
    def files(self) -> tuple[str, ...]:
        """All parts of a split model, in order."""
        folder, _, name = self.file.rpartition("/")
        return tuple(f"{folder}/{part}" if folder else part for part in split_names(name))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageFile:
    package: str
    version: str
    path: str

    def __str__(self) -> str:
        return f"pypi:{self.requirement}/{self.path}".rstrip("/")

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}" if self.version else self.package


@dataclass(frozen=True, slots=True, kw_only=True)
class WebFile:
    """`url` may carry a signature in its query; `str()` shows it without, and only that is stored or printed."""

    url: str

    def __str__(self) -> str:
        return without_query(self.url)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFile:
    path: Path

    def __str__(self) -> str:
        return str(self.path)


Source = HubFile | PackageFile | WebFile | LocalFile


def is_source(name: str) -> bool:
    """Whether `name` is written as a source and not as a catalog's name."""
    return name.startswith(("hf:", "ms:", "pypi:", "http://", "https://")) or looks_like_path(name)


def looks_like_path(name: str) -> bool:
    return name.lower().endswith(".gguf") or name.startswith(("/", "./", "../", "~", ".\\"))


def parse_source(text: str) -> Source:
    """Raises: InvalidRequest saying what such a source looks like."""
    scheme, _, rest = text.partition(":")
    if scheme in ("hf", "ms"):
        return _hub_file(text, "hf" if scheme == "hf" else "ms", rest)
    if scheme == "pypi":
        return _package_file(text, rest)
    if scheme in ("http", "https"):
        return _web_file(text)
    return LocalFile(path=local_path(text))


def local_path(text: str) -> Path:
    """Raises: InvalidRequest for the home folder of someone who does not exist."""
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise InvalidRequest(f"{text!r} cannot be: {error}", param="model") from error


def without_query(url: str) -> str:
    return url.partition("#")[0].partition("?")[0]


def safe_file_name(name: str) -> str:
    """A plain name for this machine's disk, of letters, digits and `._+=@-`, that starts with no dot."""
    plain = _UNSAFE.sub("_", name.replace("\\", "/").rpartition("/")[2]).lstrip(".-")
    return plain[-200:] or "model.gguf"


def _hub_file(text: str, hub: Literal["hf", "ms"], rest: str) -> HubFile:
    segments = rest.split("/")
    if len(segments) < 2 or not all(_WORD.match(segment) for segment in segments[:2]):
        raise InvalidRequest(f"{text!r} is not a source of the form {hub}:owner/repository/file.gguf.", param="model")
    file = _inner_path(text, "/".join(segments[2:])) if len(segments) > 2 else ""
    try:
        split_names(file.rpartition("/")[2])
    except ValueError as error:
        raise InvalidRequest(f"{text!r} cannot be: {error}.", param="model") from None
    return HubFile(hub=hub, repository="/".join(segments[:2]), file=file)


def _package_file(text: str, rest: str) -> PackageFile:
    requirement, _, path = rest.partition("/")
    package, _, version = requirement.partition("==")
    if not _WORD.match(package) or (version and not _VERSION.match(version)):
        raise InvalidRequest(
            f"{text!r} is not a source of the form pypi:package==version/path/in/wheel.gguf.", param="model"
        )
    return PackageFile(package=package, version=version, path=_inner_path(text, path) if path else "")


def _web_file(text: str) -> WebFile:
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise InvalidRequest(f"{without_query(text)[:200]!r} cannot be an address: {error}.", param="model") from error
    if not parts.hostname or not unquote(parts.path).rpartition("/")[2]:
        raise InvalidRequest(f"{without_query(text)!r} names no file on a server.", param="model")
    if parts.username or parts.password:
        raise InvalidRequest("An address with a user name or password in it is not taken.", param="model")
    return WebFile(url=text)


def _inner_path(text: str, path: str) -> str:
    """A relative path whose every step goes down."""
    steps = path.split("/")
    if any(step in ("", ".", "..") or "\\" in step or not step.isprintable() for step in steps):
        raise InvalidRequest(f"{without_query(text)!r} has a path that cannot be.", param="model")
    return path


def quoted(path: str) -> str:
    """A repository's inner path as a part of an address."""
    return quote(path, safe="/")
