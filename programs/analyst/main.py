"""A question about a table becomes a query that the grammar holds to what the table has, and to those of its words that
the question mentions; the numbers come from code, and the answer can name no others. A tiny model may misunderstand the
question, and cannot make up a number. Put your own table into `data.csv`: its first line names the columns.
"""

import re
from typing import Any

from nimbos.adk import call, think

KINDS = ("total", "average", "largest", "smallest", "count")
EXAMPLES = (
    ("How many rows are there?", "count"),
    ("What is the average weight by farm?", "average"),
    ("What is the heaviest single basket?", "largest"),
    ("How many apples were picked in the east?", "total"),
    ("What is the average price?", "average"),
    ("Which farm has the largest harvest?", "total"),
)


async def main(question: Any) -> Any:
    table = await call("describe")
    kind = await think(like_examples(str(question)), regex="|".join(KINDS), name="kind")
    rest = await think(
        f"Question about a table: {question}\nWhich column has the numbers, and by which column are they grouped?",
        schema=query_schema(str(question), table),
        name="columns",
    )
    rows = await call("compute", kind=kind, **rest)
    answer = "Nothing in the table fits the question."
    if rows:
        facts = ", ".join(f"{row['group']} {row['value']}" for row in rows[:12])
        answer = await think(
            f"{question}\nThe {kind} {rest['column']}: {facts}.\nAnswer in one sentence.",
            regex=sentence_with(rows),
            name="answer",
        )
    return {"query": {"kind": kind, **rest}, "rows": rows, "answer": answer}


def like_examples(question: str) -> list[dict[str, str]]:
    """A few questions with their answers, so that a small model sees what is wanted."""
    turns = [
        {"role": role, "content": words}
        for asked, kind in EXAMPLES
        for role, words in (("user", f"{asked} Which number?"), ("assistant", kind))
    ]
    return [*turns, {"role": "user", "content": f"{question} Which number?"}]


def query_schema(question: str, table: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema of a query. What the question mentions narrows it: only those columns, only rows with those words."""
    said = question.lower()
    words = {name: [word for word in values if word.lower() in said] for name, values in table["words"].items()}
    only = {name: {"enum": found} for name, found in words.items() if found}
    groups = [name for name in table["words"] if name.lower() in said and name not in only]
    properties = {
        "column": {"enum": [name for name in table["numbers"] if name.lower() in said] or table["numbers"]},
        "group_by": {"enum": groups or ["nothing"]},
        "only": {"type": "object", "properties": only, "required": list(only), "additionalProperties": False},
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def sentence_with(rows: list[dict[str, Any]]) -> str:
    """A sentence whose number was computed."""
    numbers = "|".join(dict.fromkeys(re.escape(str(row["value"])) for row in rows[:12]))
    words = "[A-Za-z ,'-]{1,60}"
    return f"[A-Z]{words} ({numbers})( {words})?\\."
