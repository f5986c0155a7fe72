"""Looks things up in the texts beside this file. Put your own into `library/`: any .md or .txt will do."""

import re
from pathlib import Path

from nimbos.adk import tool

LIBRARY = Path(__file__).parent / "library"
PASSAGES = 3


@tool(effect="pure")
def search(question: str) -> list[dict[str, str]]:
    """Finds the passages that have most of a question's words, rare words before common ones.

    Args:
        question: Or a few words of it.
    """
    passages = [
        (path.name, " ".join(passage.split()), words_of(f"{path.stem} {passage}"))
        for path in sorted(LIBRARY.iterdir())
        if path.suffix in (".md", ".txt")
        for passage in path.read_text(encoding="utf-8").split("\n\n")
        if not passage.startswith("#")
    ]
    wanted = words_of(question)
    rare = {word: 1 / (1 + sum(word in there for _, _, there in passages)) for word in wanted}
    weighed = [(sum(rare[word] for word in wanted & there), name, text) for name, text, there in passages]
    enough = max((weight for weight, _, _ in weighed), default=0) / 2
    best = sorted((one for one in weighed if one[0] > enough), reverse=True)[:PASSAGES]
    return [{"file": name, "text": text} for _, name, text in best]


def words_of(text: str) -> set[str]:
    return {stem(word) for word in re.findall(r"\w+", text.lower()) if len(word) > 3}


def stem(word: str) -> str:
    """Near enough: keeper and keepers are one word."""
    return re.sub(r"(ing|ed|es|s)$", "", word) if len(word) > 4 else word
