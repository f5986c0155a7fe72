"""Constrained extraction: for each field, code finds what in the message has the field's form, and where there is a
choice the model makes it: the grammar lets it write one of those and nothing else. What is not there is asked for
(`nimbos answer`), never made up.
"""

import re
from dataclasses import dataclass
from typing import Any

from nimbos.adk import ask, think


@dataclass(frozen=True)
class Field:
    name: str
    question: str
    pattern: str


FIELDS = (
    Field("name", "What is the full name of the person who writes?", r"[A-Z][\w'-]+(?: [A-Z][\w'-]+){1,3}"),
    Field("email", "What is their e-mail address?", r"[\w.+-]{1,40}@[\w-]{1,30}(?:\.[\w-]{2,12}){1,3}"),
    Field("date", "On which date do they come?", r"\d{1,2}\.\d{1,2}\.\d{4}|\d{4}-\d{2}-\d{2}|\d{1,2} [A-Z][a-z]{2,8}"),
    Field("persons", "How many persons come?", r"(?<![\w.-])\d{1,2}(?![\w-]|\.\d)"),
)


async def main(message: Any) -> Any:
    form: dict[str, str] = {}
    for field in FIELDS:
        form[field.name] = await found(field, str(message)) or await asked(field)
    return form


async def found(field: Field, message: str) -> str | None:
    candidates = list(dict.fromkeys(re.findall(field.pattern, message)))
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    return await think(
        f"Message: {message}\n\n{field.question} Answer with one of: {', '.join(candidates)}.",
        regex="|".join(map(re.escape, candidates)),
        name=field.name,
    )


async def asked(field: Field) -> str:
    again = ""
    while True:
        answer = str(await ask(f"{again}{field.question}", name=f"ask for {field.name}")).strip()
        if re.fullmatch(field.pattern, answer):
            return answer
        again = f"{answer[:60]!r} does not look like it. "
