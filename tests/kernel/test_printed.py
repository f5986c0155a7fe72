"""What tools print is kept with their calls, for people."""

from __future__ import annotations

from pathlib import Path

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel.events import CallDone
from nimbos.kernel.tools.printed import PRINTED_BYTES_MAX, end_of, printed_since
from tests.kernel.minds import calling, minds

TOOLS = b"""
import os, sys
from nimbos.adk import tool

print("loaded")

@tool(effect="pure")
def loud(how: str = "") -> str:
    \"\"\"Prints.\"\"\"
    print("to the one")
    print("to the other", file=sys.stderr)
    if how == "raises":
        raise ValueError("no")
    if how == "much":
        print("x" * 100_000, end="")
    if how == "bytes":
        os.write(1, b"\\xff\\x00")
    return "printed"

@tool(effect="pure")
def still() -> str:
    \"\"\"Prints nothing.\"\"\"
    return "nothing"
"""
SAID = "to the one\nto the other\n"


async def test_what_a_tool_prints_is_kept_with_its_call(database: Database, database_settings: Settings) -> None:
    script = {
        "replies": [
            {"match": "^go$", **calling("loud")},
            {"match": "^printed$", "times": 1, **calling("still")},
            {"match": "^nothing$", **calling("loud", how="raises")},
            {"match": "failed: ValueError", **calling("loud", how="bytes")},
        ],
        "default": {"text": "Done."},
    }
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program(files={"tools.py": TOOLS}))
        assert await place.result(pid) == "Done."
        done = [body for body in await place.bodies_of(pid) if isinstance(body, CallDone)]
        get = place.kernel.segments.get
        kept = [None if one.printed is None else await get("proj_one", one.printed) for one in done]
        assert kept == [SAID, None, SAID, f"{SAID}\ufffd\0"]
        assert all("to the one" not in message["content"] for message in await place.shown(pid)), "no model is shown it"


def test_the_last_of_much_is_kept_and_says_how_much_was_left_out(tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert (end_of(output), printed_since(output, 0)) == (0, "")
    output.write_bytes(b"before")
    start = end_of(output)
    assert printed_since(output, start) == ""
    output.write_bytes(b"before" + b"a" * 100 + b"b" * PRINTED_BYTES_MAX)
    assert printed_since(output, start) == "[100 bytes before]\n" + "b" * PRINTED_BYTES_MAX
    output.write_bytes(b"short")
    assert printed_since(output, start) == "short", "the file was begun anew"
