"""`tool`: what a program's own code does, in its worker. All it says is a value; whether it was done may be unknown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nimbos.kernel.drivers.answers import Answered, Lost
from nimbos.kernel.tools import ToolWorkers, WorkerDied

if TYPE_CHECKING:
    from nimbos.kernel.holding import Holding

VERIFY_DEADLINE_S = 30.0

_SAID = {
    "raised": "The tool failed: {}",
    "deadline": "The tool was stopped at its deadline. {}",
    "too_large": "The tool's result is too large to be kept. {}",
    "not_utf8": "The tool's result is no text: it holds what UTF-8 cannot say. {}",
    "not_json": "The tool's result is no JSON value. {}",
    "died": "The tool's process ended in the middle of the call. {}",
    "not_loaded": "The program's tools cannot be loaded. {}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    tool: str
    arguments: Any
    key: str
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    """The driver knows that it did not happen: it may be done."""


async def run_tool(workers: ToolWorkers, holding: Holding, job: Job) -> Answered | Lost:
    """Raises: StorageUnavailable."""
    result = await workers.of(holding).call(job.tool, job.arguments, key=job.key, deadline_s=job.deadline_s)
    if not result.error:
        return Answered(value=result.value, printed=result.printed)
    said = _SAID.get(result.error, "The tool could not be called: {}").format(result.message).strip()
    if result.perhaps:
        return Lost(error=result.error, why=said, suspects=result.suspects)
    return Answered(value=said, error=result.error, printed=result.printed)


async def verify_tool(workers: ToolWorkers, holding: Holding, job: Job) -> Answered | Nothing | Lost:
    """Raises: StorageUnavailable."""
    try:
        verified = await workers.of(holding).verify(
            job.tool, job.arguments, key=job.key, deadline_s=min(job.deadline_s, VERIFY_DEADLINE_S)
        )
    except WorkerDied as died:
        return Lost(error="died", why=f"The tool that was asked whether it happened {died}.")
    if verified.happened is None:
        return Lost(error="unknown", why=verified.message)
    return Answered(value=verified.result) if verified.happened else Nothing()
