"""The server's side of the processes that run programs' Python. `worker.py` is the door; `live.py` has one process and
what it may say, `process.py` starts it, `specs.py` judges its tools, `workspaces.py` has the folders they work in."""

from nimbos.kernel.tools.live import FunctionRun, WorkerDied
from nimbos.kernel.tools.results import NotJson, ToolResult, Verified, read_value
from nimbos.kernel.tools.specs import ToolSpec
from nimbos.kernel.tools.worker import ToolWorker
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
