"""Looks at the disk, and keeps a notebook in the process's own folder, which outlives the worker and the server."""

import os
import shutil
from pathlib import Path

from nimbos.adk import tool

NOTEBOOK = Path("notebook")  # a folder with a line in each file: what is there by its key is not written again


@tool(effect="pure")
def look() -> dict[str, int]:
    """How much of the disk is free now."""
    return {"free_mib": shutil.disk_usage(Path.cwd()).free // 2**20}


@tool(effect="idempotent")
def note(number: int, free_mib: int, *, key: str) -> str:
    """Writes a line into the notebook, once for each key."""
    NOTEBOOK.mkdir(exist_ok=True)
    line = NOTEBOOK / key
    draft = NOTEBOOK / f".{key}"
    if not line.exists():
        with draft.open("w", encoding="utf-8") as file:
            file.write(f"look {number}: {free_mib} MiB")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(line)
    return line.read_text(encoding="utf-8")


@tool(effect="pure")
def read_notebook() -> list[str]:
    """All lines, in the order of the looks."""
    lines = [file.read_text(encoding="utf-8") for file in NOTEBOOK.iterdir() if not file.name.startswith(".")]
    return sorted(lines, key=lambda line: int(line.split(":")[0].removeprefix("look ")))
