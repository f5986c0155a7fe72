"""The worker that renders templates nobody vouches for: `python -m nimbos.chat.renderer`.
Reads jobs from its stdin and answers on its stdout; `isolation.py` is the other end.

A frame is a length (4 bytes, big endian) and so many bytes of MessagePack. The first frame out is empty: ready.
The worker limits its own memory, files and processor time, and ends when its stdin does.
"""

from __future__ import annotations

import os
import struct
import sys
from typing import BinaryIO

import msgspec

from nimbos.chat.template import RenderFailure, RenderJob, RenderResult, TemplateRenderer

MAX_FRAME_BYTES = 64 * 1024 * 1024
MEMORY_BYTES = 512 * 1024 * 1024
RENDER_SECONDS = 2
_LENGTH = struct.Struct(">I")


def write_frame(stream: BinaryIO, payload: bytes) -> None:
    stream.write(_LENGTH.pack(len(payload)) + payload)
    stream.flush()


def read_frame(stream: BinaryIO) -> bytes | None:
    """None at the end of the stream, also when it ends inside a frame."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    payload = stream.read(length)
    return payload if len(payload) == length else None


def _confine() -> None:
    if sys.platform == "win32":
        return  # no rlimits there; the server's own clock and size limits remain
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _allow_processor_time() -> None:
    """An endless template ends by itself even when the server that would kill it has died."""
    if sys.platform == "win32":
        return
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + RENDER_SECONDS + 2, most))


def _encode(encoder: msgspec.msgpack.Encoder, result: RenderResult) -> bytes:
    try:
        return encoder.encode(result)
    except MemoryError:
        return encoder.encode(RenderFailure("memory"))
    except UnicodeEncodeError as error:
        return encoder.encode(RenderFailure("runtime", f"The template wrote half a character: {error.reason}"))


def main() -> None:
    jobs, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _confine()
    decoder, encoder = msgspec.msgpack.Decoder(RenderJob), msgspec.msgpack.Encoder()
    renderer = TemplateRenderer()
    write_frame(results, b"")
    while (frame := read_frame(jobs)) is not None:
        _allow_processor_time()
        write_frame(results, _encode(encoder, renderer.render(decoder.decode(frame))))


if __name__ == "__main__":
    main()
