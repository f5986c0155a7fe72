"""The two hubs that models are published on: where a file is, what its hash is, and which files there are.
Reads listings; `download.py` fetches. Both take their address from the environment."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol
from urllib.parse import urlsplit

import httpx2
import msgspec

from nimbos.errors import ConfigError, DownloadFailed
from nimbos.hub.download import Patience, with_hash
from nimbos.hub.progress import Progress
from nimbos.hub.remote import Remote, RemoteFile, SourceMissing, SourceUnreachable, Token, origin
from nimbos.hub.source import quoted


class HubSite(Protocol):
    async def locate(self, remote: Remote, repository: str, file: str, progress: Progress) -> RemoteFile:
        """Raises: SourceMissing, SourceUnreachable, DownloadFailed."""
        ...

    async def names(self, remote: Remote, repository: str, progress: Progress) -> list[str]:
        """All files of a repository. Raises: as `locate`."""
        ...


class HuggingFace:
    """`HF_ENDPOINT` and `HF_TOKEN` are honoured; the token goes to the endpoint and nowhere else."""

    def __init__(self, environment: Mapping[str, str], patience: Patience) -> None:
        self.endpoint = _endpoint(environment, "HF_ENDPOINT", "https://huggingface.co")
        self._secret = environment.get("HF_TOKEN", "").strip()
        self._patience = patience

    @property
    def token(self) -> Token | None:
        if not self._secret:
            return None
        return Token(origin=origin(self.endpoint), secret=self._secret, variable="HF_TOKEN")

    async def locate(self, remote: Remote, repository: str, file: str, progress: Progress) -> RemoteFile:
        url = f"{self.endpoint}/{repository}/resolve/main/{quoted(file)}"
        return await self._patience.keep_trying(lambda: remote.probe(url), progress)

    async def names(self, remote: Remote, repository: str, progress: Progress) -> list[str]:
        return await asyncio.to_thread(self._names, repository)

    def _names(self, repository: str) -> list[str]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

        api = HfApi(endpoint=self.endpoint, token=self._secret or False)
        try:
            return list(api.list_repo_files(repository))
        except RepositoryNotFoundError as error:
            reason = f"There is no repository {repository!r} at {self.endpoint}, or it needs a token in HF_TOKEN."
            raise SourceMissing(reason) from error
        except HFValidationError as error:
            raise DownloadFailed(f"{repository!r} cannot be a repository at {self.endpoint}: {error}") from error
        except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:  # ValueError: no JSON came
            raise SourceUnreachable(f"{self.endpoint} does not list {repository}: {type(error).__name__}.") from error


class _ModelScopeFile(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    path: str
    type: str = "blob"
    size: int = 0
    sha256: str = ""


class _ModelScopeFiles(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    files: list[_ModelScopeFile] = []


class _ModelScopeListing(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    data: _ModelScopeFiles | None = None


class ModelScope:
    """Its plain HTTP API; `MODELSCOPE_ENDPOINT` is honoured. Hashes come from the listing."""

    def __init__(self, environment: Mapping[str, str], patience: Patience) -> None:
        self.endpoint = _endpoint(environment, "MODELSCOPE_ENDPOINT", "https://www.modelscope.cn")
        self._patience = patience

    async def locate(self, remote: Remote, repository: str, file: str, progress: Progress) -> RemoteFile:
        listing = {entry.path: entry for entry in await self._listing(remote, repository, progress)}
        if file not in listing:
            raise SourceMissing(f"There is no file {file!r} in {repository} at {self.endpoint}.")
        url = f"{self.endpoint}/models/{repository}/resolve/master/{quoted(file)}"
        found = await self._patience.keep_trying(lambda: remote.probe(url), progress)
        entry = listing[file]
        if entry.size and found.size_bytes is not None and found.size_bytes != entry.size:
            raise DownloadFailed(f"{url} has {found.size_bytes} bytes and is listed with {entry.size}.")
        return with_hash(found, entry.sha256.lower() or None)

    async def names(self, remote: Remote, repository: str, progress: Progress) -> list[str]:
        return [entry.path for entry in await self._listing(remote, repository, progress)]

    async def _listing(self, remote: Remote, repository: str, progress: Progress) -> list[_ModelScopeFile]:
        url = f"{self.endpoint}/api/v1/models/{repository}/repo/files?Revision=master&Recursive=true"
        content = await self._patience.keep_trying(lambda: remote.json(url), progress)
        try:
            listing = msgspec.json.decode(content, type=_ModelScopeListing)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DownloadFailed(f"{self.endpoint} answers with something that is no listing: {error}.") from error
        if listing.data is None:
            raise SourceMissing(f"There is no repository {repository!r} at {self.endpoint}.")
        return [entry for entry in listing.data.files if entry.type == "blob"]


def _endpoint(environment: Mapping[str, str], variable: str, default: str) -> str:
    """Raises: ConfigError for what is no web address."""
    named = environment.get(variable, "").strip().rstrip("/")
    try:
        parts = urlsplit(named or default)
    except ValueError as error:
        raise ConfigError(f"{variable} is {named!r}, which cannot be an address: {error}.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{variable} is {named!r}; it must be a web address such as {default}.")
    return named or default
