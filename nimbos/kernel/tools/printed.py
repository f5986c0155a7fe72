"""What a program prints, as far as it is kept with a call: the last part of what came while that was under way. Calls
that run at once share what is printed then: nobody can tell whose it is. Blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

PRINTED_BYTES_MAX: Final = 16 * 1024


def end_of(output: Path) -> int:
    """Where what is printed from now on begins."""
    try:
        return output.stat().st_size
    except OSError:
        return 0


def printed_since(output: Path, start: int) -> str:
    """As text, whatever the bytes are. "" where it cannot be read: it is for people, and no call depends on it."""
    try:
        with output.open("rb") as file:
            size = file.seek(0, 2)
            first = start if start <= size else 0  # it was shortened meanwhile
            file.seek(max(first, size - PRINTED_BYTES_MAX))
            text = file.read(PRINTED_BYTES_MAX).decode("utf-8", "replace")
    except OSError:
        return ""
    left_out = size - first - PRINTED_BYTES_MAX
    return f"[{left_out:,} bytes before]\n{text}" if left_out > 0 else text
