"""The catalog: names that stand for a file somewhere. Its data is `catalog.toml`, shipped in the package.
Knows no network; `source.py` says what a source is, `hub.py` pulls it."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import msgspec

from nimbos.hub.facts import KV_VALUE_BYTES
from nimbos.hub.source import HubFile, Source, parse_source

DEFAULT_MODEL = "smollm2:135m"

# Bits of a weight, by quantisation, over whole files of common models: for estimates before anything is downloaded.
_WEIGHT_BITS = {
    "Q4_1": 5.9,
    "Q4_K_M": 4.95,
    "Q5_K_M": 5.75,
    "Q6_K": 6.65,
    "Q8_0": 8.55,
    "MXFP4": 4.6,
    "F16": 16.1,
}


class Pinned(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the bytes must be. `package_…`: of the package that the file comes in."""

    bytes: int
    sha256: str
    package_bytes: int = 0
    package_sha256: str = ""


class CatalogModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    files: dict[str, str]
    default: str
    licence: str
    context_tokens: int
    parameters: int
    layers: int
    kv_heads: int
    head_dim: int
    kv_layers: int | None = None
    repository: str = ""
    modelscope: bool = False
    kind: Literal["generate", "embed", "rerank"] = "generate"
    pinned: dict[str, Pinned] = msgspec.field(default_factory=dict)

    def file_bytes(self, quantisation: str) -> int:
        """Of the weights: exact where it is pinned, else an estimate."""
        pinned = self.pinned.get(quantisation)
        return pinned.bytes if pinned else int(self.parameters * _WEIGHT_BITS[quantisation] / 8)

    @property
    def kv_bytes_per_token(self) -> int:
        layers = self.layers if self.kv_layers is None else self.kv_layers
        return 2 * KV_VALUE_BYTES * layers * self.kv_heads * self.head_dim

    def memory_bytes(self, quantisation: str, *, context_tokens: int = 4096) -> int:
        """An estimate of what serving one conversation of that length needs."""
        return self.file_bytes(quantisation) + self.kv_bytes_per_token * context_tokens + (256 << 20)


class _CatalogFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    trusted_templates: list[str]
    models: list[CatalogModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """One file of the catalog. `id` is how it is called once installed; `sources` are tried in order."""

    id: str
    model: CatalogModel
    quantisation: str
    sources: tuple[Source, ...]

    @property
    def pinned(self) -> Pinned | None:
        return self.model.pinned.get(self.quantisation)


class Catalog:
    """Names are not case-sensitive: `qwen3`, `qwen3:4b`, `qwen3:4b-q8_0`."""

    def __init__(self, models: list[CatalogModel], trusted_templates: frozenset[str]) -> None:
        self.trusted_templates = trusted_templates
        self.models = tuple(models)
        self._entries: dict[str, CatalogEntry] = {}
        for model in models:
            family = model.name.partition(":")[0]
            for entry in _entries(model):
                self._entries[f"{model.name}-{entry.quantisation}".lower()] = entry
                if entry.quantisation == model.default:
                    self._entries[model.name] = entry
                    self._entries.setdefault(family, entry)

    def get(self, name: str) -> CatalogEntry | None:
        return self._entries.get(name.lower())

    def nearest(self, name: str) -> tuple[str, ...]:
        return tuple(difflib.get_close_matches(name.lower(), list(self._entries), n=3, cutoff=0.5))


def _entries(model: CatalogModel) -> Iterator[CatalogEntry]:
    for quantisation, file in model.files.items():
        source = parse_source(file if ":" in file else f"hf:{model.repository}/{file}")
        sources = [source]
        if model.modelscope and isinstance(source, HubFile) and source.repository == model.repository:
            sources.append(HubFile(hub="ms", repository=source.repository, file=source.file))
        default = quantisation == model.default
        yield CatalogEntry(
            id=model.name if default else f"{model.name}-{quantisation}".lower(),
            model=model,
            quantisation=quantisation,
            sources=tuple(sources),
        )


def load_catalog() -> Catalog:
    """Reads the shipped catalog; what is wrong in it is our own bug."""
    text = resources.files("nimbos.hub").joinpath("catalog.toml").read_text(encoding="utf-8")
    file = msgspec.convert(tomllib.loads(text), _CatalogFile)
    return Catalog(file.models, frozenset(file.trusted_templates))
