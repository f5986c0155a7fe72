"""Looks things up in the texts beside this file. Put your own into `library/`: any .md or .txt will do."""

import re
from pathlib import Path
from typing import Annotated, Literal

from nimbos.adk import Field, tool

LIBRARY = Path(__file__).parent / "library"
TEXTS = {path.name: path for path in sorted(LIBRARY.iterdir()) if path.suffix in (".md", ".txt")}
PASSAGES = 2
PAGE_LINES = 60

Name = Literal[tuple(TEXTS)]  # type: ignore[valid-type]
Words = Annotated[list[Annotated[str, Field(max_length=20)]], Field(min_length=1, max_length=5)]


@tool(effect="pure")
def search(words: Words) -> list[dict[str, str]]:
    """Finds the passages that say most about some words.

    Args:
        words: The words that matter, one by one; without "the" and "of".
    """
    passages = [
        (name, passage, set(map(stem, re.findall(r"\w+", passage.lower()))))
        for name, path in TEXTS.items()
        for passage in path.read_text(encoding="utf-8").split("\n\n")
        if not passage.startswith("#")
    ]
    wanted = {stem(word) for given in words for word in re.findall(r"\w+", given.lower())}
    spread = {word: sum(word in there for _, _, there in passages) for word in wanted}

    def weight(there: set[str]) -> float:
        return sum(1 / spread[word] for word in wanted & there)  # a rare word says more

    best = sorted(passages, key=lambda one: -weight(one[2]))[:PASSAGES]
    return [{"file": name, "passage": " ".join(text.split())} for name, text, there in best if weight(there) > 0]


@tool(effect="pure")
def open_text(file: Name, page: int = 1) -> str:
    """Shows a text of the library, a page at a time.

    Args:
        file: Its name.
        page: From 1.
    """
    lines = TEXTS[file].read_text(encoding="utf-8").splitlines()
    pages = max(1, -(-len(lines) // PAGE_LINES))
    if not 1 <= page <= pages:
        raise LookupError(f"{file} has {pages} pages.")
    return "\n".join([f"{file}, page {page} of {pages}", *lines[(page - 1) * PAGE_LINES : page * PAGE_LINES]])


def stem(word: str) -> str:
    """Near enough: keeper and keepers are one word."""
    return re.sub(r"(ing|ed|es|s)$", "", word) if len(word) > 4 else word
