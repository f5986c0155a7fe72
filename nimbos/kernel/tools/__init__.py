"""The server's side of the processes that run programs' Python. `worker.py` is the door; `process.py` starts them,
`specs.py` judges what they say of themselves, `workspaces.py` has the folders they work in."""

from nimbos.kernel.tools.results import NotJson, ToolResult, Verified, read_value
from nimbos.kernel.tools.specs import ToolSpec
from nimbos.kernel.tools.worker import FunctionRun, ToolWorker, WorkerDied
from nimbos.kernel.tools.workers import ToolWorkers
from nimbos.kernel.tools.workspaces import Workspaces

__all__ = [
    "FunctionRun",
    "NotJson",
    "ToolResult",
    "ToolSpec",
    "ToolWorker",
    "ToolWorkers",
    "Verified",
    "WorkerDied",
    "Workspaces",
    "read_value",
]
