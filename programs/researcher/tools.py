"""Looks things up in the texts beside this file. Put your own into `library/`: any .md or .txt will do."""

import re
from pathlib import Path

from nimbos.adk import tool

LIBRARY = Path(__file__).parent / "library"
PASSAGES = 3
PAGE_LINES = 60


@tool(effect="pure")
def search(words: str) -> list[dict[str, str]]:
    """Finds the passages that speak most of some words, the best first.

    Args:
        words: What to look for: a few words, without "the" and "of".
    """
    wanted = {stem(word) for word in re.findall(r"\w+", words.lower()) if len(word) > 2}
    found = []
    for file in texts():
        for passage in file.read_text(encoding="utf-8").split("\n\n"):
            there = [stem(word) for word in re.findall(r"\w+", passage.lower())]
            different = len(wanted.intersection(there))
            if different:
                often = sum(word in wanted for word in there) / (len(there) + 20)
                found.append((different + often, {"file": file.name, "passage": " ".join(passage.split())}))
    found.sort(key=lambda one: -one[0])
    return [passage for _, passage in found[:PASSAGES]]


@tool(effect="pure")
def open_text(file: str, page: int = 1) -> str:
    """Shows a text of the library, a page at a time.

    Args:
        file: Its name, as `search` gives it.
        page: From 1.
    """
    known = {text.name: text for text in texts()}
    if file not in known:
        raise LookupError(f"There is no text {file!r}; there are {', '.join(known)}.")
    lines = known[file].read_text(encoding="utf-8").splitlines()
    pages = max(1, -(-len(lines) // PAGE_LINES))
    shown = lines[(page - 1) * PAGE_LINES : page * PAGE_LINES]
    return "\n".join([f"{file}, page {page} of {pages}", *shown])


def texts() -> list[Path]:
    return sorted(path for path in LIBRARY.iterdir() if path.suffix in (".md", ".txt"))


def stem(word: str) -> str:
    """Near enough: keeper and keepers are one word."""
    return re.sub(r"(ing|ed|es|s)$", "", word) if len(word) > 4 else word
