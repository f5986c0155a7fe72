"""Search, quote, answer. Code finds passages; the model chooses the sentence that answers, and the grammar lets it
write nothing but a sentence that stands there; only from that it answers. Whatever it says, one can look it up.
"""

import re
from typing import Any

from nimbos.adk import call, think

SENTENCES = 12


async def main(question: Any) -> Any:
    passages = await call("search", question=str(question)[:300])
    places = {
        sentence: passage["file"]
        for passage in passages
        for sentence in re.split(r"(?<=[.!?]) +", passage["text"])
        if len(sentence) > 20
    }
    sentences = list(places)[:SENTENCES]
    if not sentences:
        return {"answer": "The library does not say.", "quote": None, "file": None}
    quote = await think(
        f"{' '.join(sentences)}\n\nQuestion: {question}\nRepeat the sentence that answers it, word for word.",
        regex="|".join(map(re.escape, sentences)),
        name="quote",
    )
    answer = await think(
        f"{quote}\n\nQuestion: {question}\nAnswer in a few words, from this sentence alone.",
        regex=r"[A-Z0-9][^\n<>{}]{2,100}\.",
        max_tokens=60,
        name="answer",
    )
    return {"answer": answer, "quote": quote, "file": places[quote]}
