"""A question about a table becomes a query that the grammar holds to what the table has; the numbers come from code, so
a tiny model cannot get them wrong. Put your own table into `data.csv`: its first line names the columns.
"""

from typing import Any

from nimbos.adk import call, think


async def main(question: Any) -> Any:
    table = await call("describe")
    query = await think(
        f"A table has the columns {', '.join(table['columns'])}.\n"
        f"Question: {question}\n"
        "Which computation answers it? Say the column with the numbers, what to do with them (sum, mean, largest, "
        "smallest or count), the column to group by if the question compares groups, and words that rows must have.",
        schema=query_schema(table),
        name="query",
    )
    rows = await call("compute", **query)
    facts = "\n".join(f"{row['group']}: {row['value']}" for row in rows)
    answer = await think(
        f"Question: {question}\n\n{query['what']} of {query['column']}, computed from the table:\n{facts}\n\n"
        "Answer the question in one sentence with these numbers.",
        name="answer",
    )
    return {"question": question, "query": query, "rows": rows, "answer": answer}


def query_schema(table: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema of a query: only columns and words that the table has can be written at all."""
    words = {name: {"enum": ["any", *values]} for name, values in table["words"].items()}
    properties = {
        "column": {"enum": table["numbers"]},
        "what": {"enum": ["sum", "mean", "largest", "smallest", "count"]},
        "group_by": {"enum": ["nothing", *table["words"]]},
        "only": {"type": "object", "properties": words, "required": list(words), "additionalProperties": False},
    }
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
