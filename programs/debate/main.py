"""Each speaker is an agent of its own, in a process of its own: a folder in `agents/`, spawned by its name."""

from typing import Any

from nimbos.adk import spawn

ROUNDS = 2
SIDES = ("for", "against")


async def main(claim: Any) -> Any:
    said: list[str] = []
    for number in range(1, ROUNDS + 1):
        for side in SIDES:
            speaker = await spawn(side, "\n".join([f"The claim: {claim}", *said]), label=f"{side}, round {number}")
            said.append(f"Speaker {side} the claim: {await speaker.result()}")
    judge = await spawn("judge", "\n".join([f"The claim: {claim}", *said]), label="judge")
    winner, _, reason = str(await judge.result()).partition(": ")
    return {"claim": claim, "said": said, "winner": winner, "reason": reason}
