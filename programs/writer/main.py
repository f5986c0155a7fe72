"""Best of n: a child for each draft, all at once, sharing what their prompts have in common. Each draft is held to a
type while it is written; a regular expression and its length are checked afterwards, and the best that passes is kept.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from nimbos.adk import Field, StepFailed, child, each, think

DRAFTS = 5
TITLE = re.compile(r"[A-Z][^.!?\n]{8,70}")
WORDS = range(15, 80)


@dataclass
class Draft:
    title: Annotated[str, Field(max_length=80)]
    text: Annotated[str, Field(max_length=600)]
    tags: Annotated[list[Annotated[str, Field(pattern="^[a-z]{3,15}$")]], Field(min_length=2, max_length=3)]


async def main(topic: Any) -> Any:
    tried = await each(write, [{"topic": topic, "number": number} for number in range(DRAFTS)])
    drafts = [draft for draft in tried if draft is not None]
    if not drafts:
        return {"best": None, "faults": ["no draft came to an end"], "drafts": 0}
    best = max(drafts, key=lambda draft: score(draft, str(topic)))
    return {"best": best, "faults": faults(best), "drafts": len(drafts)}


@child
async def write(input: Any) -> Any:
    asked = (
        f"Write a short announcement about: {input['topic']}\nA title, two or three sentences, and two or three tags."
    )
    try:
        return await think(asked, schema=Draft, seed=input["number"])
    except StepFailed:  # it was cut off before its last bracket: one of n
        return None


def faults(draft: dict[str, Any]) -> list[str]:
    """What is wrong with a draft; nothing, if it passes."""
    found = []
    if not TITLE.fullmatch(draft["title"]):
        found.append("the title is too short, too long, or ends like a sentence")
    if len(draft["text"].split()) not in WORDS:
        found.append("the text is too short or too long")
    if not re.search(r"[.!?]$", draft["text"].strip()):
        found.append("the text does not end with a sentence")
    return found


def score(draft: dict[str, Any], topic: str) -> tuple[int, int, int]:
    """Without faults first; then those that speak of the topic; then those that repeat themselves least."""
    words = re.findall(r"\w+", f"{draft['title']} {draft['text']}".lower())
    about = {word for word in re.findall(r"\w+", topic.lower()) if len(word) > 3}
    return -len(faults(draft)), len(about.intersection(words)), len(set(words)) - len(words)
