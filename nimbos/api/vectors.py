"""Texts to vectors in no dialect's words: one ask for all texts, its vectors in their order."""

from __future__ import annotations

import math
import struct
from contextlib import aclosing
from dataclasses import dataclass

from nimbos.errors import InvalidRequest, UnsupportedField
from nimbos.service import Service
from nimbos.types import (
    Account,
    Admission,
    Ask,
    AskClass,
    Final,
    Kind,
    ModelCard,
    Origin,
    Text,
    Usage,
    VectorChunk,
    new_id,
)

TEXTS_MAX = 2_048
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """`vectors[i]`: float32, little endian, of text `i`."""

    vectors: list[bytes]
    usage: Usage

    def floats(self) -> list[list[float]]:
        return [floats(vector) for vector in self.vectors]


def embedding_ask(card: ModelCard, account: Account, texts: list[str], *, param: str, ask_class: AskClass) -> Ask:
    """Raises: InvalidRequest for texts that cannot be, or a model that makes no vectors."""
    if not texts or len(texts) > TEXTS_MAX:
        raise InvalidRequest(f"`{param}` has {len(texts)} entries; there may be 1 to {TEXTS_MAX}.", param=param)
    for number, text in enumerate(texts):
        if not text:
            raise InvalidRequest(f"`{param}[{number}]` is an empty string.", param=f"{param}[{number}]")
    if card.kind is not Kind.EMBED:
        raise InvalidRequest(
            f"The model {card.id!r} makes no embeddings; `nimbos models` shows which do.", param="model"
        )
    return Ask(
        id=new_id("ask"),
        account=account.id,
        model=card.id,
        kind=Kind.EMBED,
        parts=tuple(Text(text, special=False) for text in texts),
        ask_class=ask_class,
    )


def check_dimensions(card: ModelCard, dimensions: int | None, *, param: str) -> None:
    """Raises: UnsupportedField for more than the model has."""
    if dimensions is not None and not 1 <= dimensions <= card.embedding_size:
        raise UnsupportedField(param, why=f"{dimensions}; this model has {card.embedding_size}, and fewer can be taken")


async def embed(
    service: Service, account: Account, ask: Ask, *, dimensions: int | None, origin: Origin, admission: Admission
) -> Vectors:
    """Raises: what `Service.generate` raises."""
    found: dict[int, bytes] = {}
    usage = Usage()
    async with aclosing(service.generate(account, ask, origin=origin, admission=admission)) as chunks:
        async for chunk in chunks:
            if isinstance(chunk, VectorChunk):
                found[chunk.index] = shortened(chunk.values, dimensions)
            elif isinstance(chunk, Final):
                usage = usage + chunk.usage
    return Vectors(vectors=[found[number] for number in range(len(ask.parts))], usage=usage)


def shortened(values: bytes, dimensions: int | None) -> bytes:
    """The first `dimensions` values, at length 1 again, as OpenAI does it."""
    if dimensions is None:
        return values
    vector = floats(values[: dimensions * _FLOAT_BYTES])
    length = math.hypot(*vector) or 1.0
    return struct.pack(f"<{len(vector)}f", *(value / length for value in vector))


def floats(values: bytes) -> list[float]:
    """Of a vector in bytes. By hand: numpy would take a tenth of a server's start."""
    return list(struct.unpack(f"<{len(values) // _FLOAT_BYTES}f", values))
