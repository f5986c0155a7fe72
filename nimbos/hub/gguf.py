"""Reads a GGUF file's metadata and tensor table, fast, from a file that may be hostile.
Knows the container only; what the numbers mean for a model is `facts.py`.

    magic "GGUF" · version u32 · tensor count u64 · pair count u64
    pairs:    key string · type u32 · value
    tensors:  name string · dimensions u32 · each u64 · type u32 · offset u64 (from the start of the data)
    padding to `general.alignment` · data

Every length is checked against what is left of the file before it is believed; arrays of strings (the vocabulary) are
stepped over without making a Python object for each, which is what makes this 100 times faster than the `gguf` package.
Nothing but `ModelUnusable` comes out of a bad file. Source: ggml/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nimbos.errors import ModelUnusable
from nimbos.hub.ggml import MAX_NAME_BYTES, TENSOR_TYPES

Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...]

_CHUNK_BYTES = 1 << 20
_MAX_PAIRS = 1 << 16
_MAX_TENSORS = 1 << 17
_MAX_KEY_BYTES = 65_535
_MAX_TEXT_BYTES = 16 << 20  # one string that is kept, and all of them together
_MAX_STRINGS = 1 << 24  # elements of string arrays in one file
_KEPT_ELEMENTS = 1024  # arrays up to this length are kept: per-layer numbers
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS = (1 << 63) - 1

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """One file. `metadata` holds scalars, strings and short arrays; `lengths` holds every array's length.
    `type_bytes`: bytes of tensors of each type. `parameters`: elements of all tensors."""

    path: Path
    version: int
    file_bytes: int
    metadata: Mapping[str, Value]
    lengths: Mapping[str, int]
    tensors: int
    parameters: int
    type_bytes: Mapping[str, int]


class _CorruptError(Exception):
    """The reason a file cannot be read; becomes ModelUnusable at the door."""


class _Cursor:
    """A window that moves over the file. `at` counts from the start of the window."""

    __slots__ = ("_file", "_size", "_start", "at", "window")

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._start = 0
        self.window = b""
        self.at = 0

    @property
    def position(self) -> int:
        return self._start + self.at

    @property
    def left(self) -> int:
        return self._size - self.position

    def _claim(self, count: int, what: str) -> None:
        if count > self.left:
            place = f"{what} at byte {self.position}"
            raise _CorruptError(f"the file is truncated: {place} needs {count} bytes, {self.left} are left")

    def need(self, count: int, what: str) -> None:
        """Makes `count` bytes available in the window from `at` on."""
        self._claim(count, what)
        if self.at + count <= len(self.window):
            return
        self._start = self.position
        self.at = 0
        self._file.seek(self._start)
        self.window = self._file.read(max(count, min(_CHUNK_BYTES, self._size - self._start)))
        if len(self.window) < count:
            raise _CorruptError(f"the file ended at byte {self._start + len(self.window)} while it was being read")

    def skip(self, count: int, what: str) -> None:
        self._claim(count, what)
        self.at += count
        if self.at > len(self.window):
            self._start = self.position
            self.window = b""
            self.at = 0

    def number(self, form: struct.Struct, what: str) -> int | float:
        self.need(form.size, what)
        (value,) = form.unpack_from(self.window, self.at)
        self.at += form.size
        assert isinstance(value, int | float)
        return value

    def u32(self, what: str) -> int:
        return int(self.number(_U32, what))

    def u64(self, what: str) -> int:
        return int(self.number(_U64, what))

    def text(self, limit_bytes: int, what: str) -> bytes:
        length = self.u64(f"the length of {what}")
        if length > limit_bytes:
            raise _CorruptError(
                f"{what} at byte {self.position} claims {length} bytes, more than the {limit_bytes} allowed"
            )
        self.need(length, what)
        value = self.window[self.at : self.at + length]
        self.at += length
        return value

    def skip_strings(self, count: int, what: str) -> None:
        """Steps over `count` strings: the one loop here that must be fast (a vocabulary has 300,000)."""
        if count * 8 > self.left:
            raise _CorruptError(f"the file is truncated: {what} claims {count} strings, {self.left} bytes are left")
        unpack = _U64.unpack_from
        while count:
            self.need(8, what)
            window, at, last = self.window, self.at, len(self.window) - 8
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.skip(at - self.at, what)


@dataclass(slots=True, eq=False)
class _Reading:
    """What has been read so far."""

    cursor: _Cursor
    metadata: dict[str, Value]
    lengths: dict[str, int]
    text_bytes: int = 0
    strings: int = 0

    def pair(self) -> None:
        raw = self.cursor.text(_MAX_KEY_BYTES, "a key")
        try:
            key = raw.decode()
        except UnicodeDecodeError:
            raise _CorruptError(f"a key before byte {self.cursor.position} is not UTF-8") from None
        if key in self.metadata or key in self.lengths:
            raise _CorruptError(f"the key {key[:80]!r} occurs twice")
        kind = self.cursor.u32("a value's type")
        if kind == _ARRAY:
            self.array(key)
        elif kind == _STRING:
            self.metadata[key] = self.string(key)
        else:
            self.metadata[key] = self.scalar(kind, key)

    def string(self, key: str) -> str:
        value = self.cursor.text(_MAX_TEXT_BYTES - self.text_bytes, f"the text of {key[:80]!r}")
        self.text_bytes += len(value)
        return value.decode("utf-8", "replace")

    def scalar(self, kind: int, key: str) -> Scalar:
        form = _SCALARS.get(kind)
        if form is None:
            raise _CorruptError(f"the key {key[:80]!r} has the unknown type {kind}")
        value = self.cursor.number(form, f"the value of {key[:80]!r}")
        return bool(value) if kind == _BOOL else value

    def array(self, key: str) -> None:
        what = f"the array {key[:80]!r}"
        kind = self.cursor.u32(what)
        count = self.cursor.u64(what)
        self.lengths[key] = count
        if kind == _STRING:
            self.strings += count
            if self.strings > _MAX_STRINGS:
                raise _CorruptError(f"{what} claims {count} strings, more than the {_MAX_STRINGS} allowed")
            self.cursor.skip_strings(count, what)
            return
        form = _SCALARS.get(kind)
        if form is None:
            raise _CorruptError(f"{what} has elements of the type {kind}, which arrays cannot have")
        if count > _KEPT_ELEMENTS:
            self.cursor.skip(count * form.size, what)
            return
        self.cursor.need(count * form.size, what)
        self.metadata[key] = tuple(self.scalar(kind, key) for _ in range(count))


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    kind: str
    elements: int
    size_bytes: int
    offset: int


def read_file(path: Path) -> GgufFile:
    """Reads one GGUF file without its weights.

    Raises: ModelUnusable naming the file and the reason.
    """
    if not path.is_file():
        raise ModelUnusable(str(path), reason="there is no such file")
    try:
        with path.open("rb", buffering=0) as file:
            return _read(path, file, file.seek(0, 2))
    except _CorruptError as error:
        raise ModelUnusable(str(path), reason=str(error)) from None
    except OSError as error:
        raise ModelUnusable(str(path), reason=f"the file cannot be read: {error.strerror}") from error


def _read(path: Path, file: BinaryIO, size: int) -> GgufFile:
    cursor = _Cursor(file, size)
    version = _header(cursor)
    tensors = cursor.u64("the tensor count")
    pairs = cursor.u64("the count of keys")
    if tensors > _MAX_TENSORS or pairs > _MAX_PAIRS:
        raise _CorruptError(f"the header claims {tensors} tensors and {pairs} keys, which is absurd")
    reading = _Reading(cursor, {}, {})
    for _ in range(pairs):
        reading.pair()
    table = [_tensor(cursor) for _ in range(tensors)]
    _check_data(table, cursor, size, _alignment(reading.metadata))
    type_bytes: dict[str, int] = {}
    for tensor in table:
        type_bytes[tensor.kind] = type_bytes.get(tensor.kind, 0) + tensor.size_bytes
    return GgufFile(
        path=path,
        version=version,
        file_bytes=size,
        metadata=reading.metadata,
        lengths=reading.lengths,
        tensors=tensors,
        parameters=sum(tensor.elements for tensor in table),
        type_bytes=type_bytes,
    )


def _header(cursor: _Cursor) -> int:
    cursor.need(4, "the magic")
    magic = cursor.window[:4]
    if magic != b"GGUF":
        raise _CorruptError(f"it is not a GGUF file: it begins with {magic!r}, not b'GGUF'")
    cursor.at = 4
    version = cursor.u32("the version")
    if version and not version & 0xFFFF:
        raise _CorruptError("it is a big-endian GGUF file; convert it to little-endian (gguf-convert-endian)")
    if version not in (2, 3):
        raise _CorruptError(f"it is GGUF version {version}; versions 2 and 3 can be read")
    return version


def _alignment(metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1 << 20 or value & (value - 1):
        raise _CorruptError(f"general.alignment is {value!r}, not a power of two")
    return value


def _tensor(cursor: _Cursor) -> _Tensor:
    name = cursor.text(MAX_NAME_BYTES, "a tensor's name").decode("utf-8", "replace")
    dimensions = cursor.u32(f"the shape of tensor {name!r}")
    if not 0 < dimensions <= _MAX_DIMENSIONS:
        raise _CorruptError(f"the tensor {name!r} has {dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are possible")
    shape = [cursor.u64(f"the shape of tensor {name!r}") for _ in range(dimensions)]
    elements = math.prod(shape)
    if elements > _MAX_ELEMENTS or any(side > _MAX_ELEMENTS for side in shape):
        raise _CorruptError(f"the shape {shape} of tensor {name!r} overflows")
    number = cursor.u32(f"the type of tensor {name!r}")
    offset = cursor.u64(f"the offset of tensor {name!r}")
    if number not in TENSOR_TYPES:
        raise _CorruptError(f"the tensor {name!r} has the type {number}, which this libllama does not know")
    kind, block, block_bytes = TENSOR_TYPES[number]
    if shape[0] % block:
        raise _CorruptError(f"the tensor {name!r} has rows of {shape[0]}; {kind} comes in blocks of {block}")
    return _Tensor(name, kind, elements, elements // block * block_bytes, offset)


def _check_data(table: list[_Tensor], cursor: _Cursor, size: int, alignment: int) -> None:
    """The data of every tensor lies inside the file, aligned, and under a name of its own."""
    start = -(-cursor.position // alignment) * alignment
    names: set[str] = set()
    for tensor in table:
        if tensor.name in names:
            raise _CorruptError(f"the tensor {tensor.name!r} occurs twice")
        names.add(tensor.name)
        if tensor.offset % alignment:
            raise _CorruptError(f"the tensor {tensor.name!r} is not aligned to {alignment} bytes")
        if start + tensor.offset + tensor.size_bytes > size:
            raise _CorruptError(
                f"the file is truncated: the tensor {tensor.name!r} ends at byte "
                f"{start + tensor.offset + tensor.size_bytes}, the file has {size} bytes"
            )
