"""`Program(...)` in code and a folder that says the same are one program."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nimbos.adk import BadTool, Program, Tool, read_program, tool
from nimbos.errors import BrokenProgram
from nimbos.kernel.program import program_of

HERE = Path(__file__)


@tool(effect="pure")
def length(text: str) -> int:
    """How many characters a text has."""
    return len(text)


async def main(input: object) -> object:
    return input


@dataclass
class Verdict:
    winner: str
    points: int


FOLDER = {
    "nimbos.toml": b"""# a comment
name = "measure"
version = "1.0"
description = "Measures texts."

[model]
temperature = 0

[tools]
confirm = ["length"]

[budget]
tokens = 20_000
""",
    "instructions.md": b"Measure what you are given.\n\nSay the number alone.\n",
    "tools.py": HERE.read_bytes(),
}


def test_code_and_folder_have_one_hash() -> None:
    program = Program(
        "measure",
        version="1.0",
        description="Measures texts.",
        instructions="""
            Measure what you are given.

            Say the number alone.
        """,
        tools=[length],
        model={"temperature": 0},
        confirm=["length"],
        budget={"tokens": 20_000},
    )
    assert program.hash == program_of(FOLDER)[0].hash


def test_a_saved_program_is_the_same_program(tmp_path: Path) -> None:
    part = Program("pro", instructions="Speak for it.")
    program = Program("talk", entry=main, agents={"pro": part}, files={"data/a.csv": b"1,2\n"}, schema=Verdict)
    program.save(tmp_path / "talk")
    found, _ = program_of(read_program(tmp_path / "talk"))
    assert found.hash == program.hash
    assert (found.entry, found.parts) == ("main.py:main", {"pro": part.hash})
    assert found.answer is not None
    assert '"winner"' in found.answer.source
    with pytest.raises(FileExistsError):
        program.save(tmp_path / "talk")


def test_tools_and_entry_of_one_file_are_one_file() -> None:
    program, _ = program_of(Program("both", tools=[length], entry=main).files())
    assert program.entry == "tools.py:main"
    assert [file.path for file in program.files] == ["nimbos.toml", "tools.py"]


def test_a_file_can_be_named_instead_of_its_functions() -> None:
    files = [Program("x", instructions="y", tools=given).files() for given in ([length], HERE, str(HERE))]
    assert files[0] == files[1] == files[2]


def test_what_is_wrong_is_told_as_of_a_folder() -> None:
    with pytest.raises(BrokenProgram, match="did you mean `tokens`"):
        Program("x", instructions="y", budget={"token": 1}).files()
    with pytest.raises(BrokenProgram, match="`name`"):
        Program("Not So", instructions="y").files()
    with pytest.raises(BrokenProgram, match="neither instructions"):
        _ = Program("x").hash
    with pytest.raises(BrokenProgram, match="both"):
        Program("x", instructions="y", regex="a", schema=Verdict).files()


def test_functions_of_no_file_or_of_several_are_refused() -> None:
    space: dict[str, Any] = {}
    exec("def shout(text: str) -> str:\n    'Louder.'\n    return text.upper()", space)
    shout: Tool[..., Any] = tool(effect="pure")(space["shout"])
    with pytest.raises(BadTool, match="no file"):
        Program("x", instructions="y", tools=[shout]).files()


def test_making_one_is_cheap_in_a_worker() -> None:
    """A file that makes its own `Program` is imported in its worker: that must not bring the server's parts there."""
    code = (
        "import sys; from nimbos.adk import Program; Program('x'); print(any('sqlalchemy' in m for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
