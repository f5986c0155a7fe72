"""A long job. Between two looks it is rows in a database: no process, no thread, no memory. Stop the server, pull the
plug, come back tomorrow: it goes on with the look that is due, and no line of its notebook stands there twice.

Input: {"times": 5, "every_s": 2}
"""

from typing import Any

from nimbos.adk import call, sleep, think

DEFAULT = {"times": 5, "every_s": 2}


async def main(input: Any) -> Any:
    wanted = DEFAULT | (input if isinstance(input, dict) else {})
    times, every_s = int(wanted["times"]), float(wanted["every_s"])
    looks = []
    for number in range(1, times + 1):
        look = await call("look", step=f"look {number}")
        await call("note", number=number, free_mib=look["free_mib"])
        looks.append(look["free_mib"])
        if number < times:
            await sleep(every_s, name=f"before look {number + 1}")
    notebook = await call("read_notebook")
    words = await think(
        f"Free space in MiB, over time: {', '.join(map(str, looks))}.\nIs it growing, shrinking or steady?",
        regex="growing|shrinking|steady",
    )
    return {"looks": len(looks), "least_mib": min(looks), "trend": words, "notebook": notebook}
