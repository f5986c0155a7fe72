"""Constrained extraction: for each field the model can only write what has the field's form, and a value counts only if
it stands in the message. What is missing is asked for (`nimbos answer`), never made up.
"""

import re
from dataclasses import dataclass
from typing import Any

from nimbos.adk import ask, think

NOT_THERE = "not said"


@dataclass(frozen=True)
class Field:
    name: str
    question: str
    pattern: str


FIELDS = (
    Field("name", "What is the name of the person who writes?", r"[A-Z][\w'-]+( [A-Z][\w'-]+){1,3}"),
    Field("email", "Which e-mail address is given?", r"[\w.+-]{1,40}@[\w-]{1,30}(\.[\w-]{2,12}){1,3}"),
    Field(
        "date",
        "Which date is meant? Write it as it stands there.",
        r"[0-9]{1,4}[-./ ]([0-9]{1,2}|[A-Z][a-z]{2,8})([-./ ][0-9]{1,4})?",
    ),
    Field("persons", "For how many persons? The number alone.", r"[0-9]{1,2}"),
)


async def main(message: Any) -> Any:
    form: dict[str, str] = {}
    for field in FIELDS:
        form[field.name] = await found(field, str(message)) or await asked(field)
    return form


async def found(field: Field, message: str) -> str | None:
    said = await think(
        f"Message:\n{message}\n\n{field.question} If the message does not say it, write: {NOT_THERE}",
        regex=f"{NOT_THERE}|{field.pattern}",
        name=field.name,
    )
    return said if said != NOT_THERE and re.search(rf"(?<!\w){re.escape(said)}(?!\w)", message) else None


async def asked(field: Field) -> str:
    again = ""
    while True:
        answer = str(await ask(f"{again}{field.question}", name=f"ask for {field.name}")).strip()
        if re.fullmatch(field.pattern, answer):
            return answer
        again = f"{answer[:60]!r} does not look like it. "
