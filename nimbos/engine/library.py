"""Which libllama is tried, in which order, and with how many threads; the environment it must find.

Order: the folder named by the setting; the build for this very CPU that `nimbos engine install` put under the home
folder; the wheel. `llama.open_library` refuses the ones that do not fit.
"""

from __future__ import annotations

import os
from pathlib import Path

from nimbos.config import EngineSettings, Settings
from nimbos.engine.llama import wheel_library
from nimbos.errors import ConfigError, EngineFailed


def candidates(settings: Settings) -> list[Path]:
    """Folders and files to try. Raises: ConfigError when the named folder does not exist."""
    named = settings.engine.library
    if named:
        folder = Path(named).expanduser()
        if not folder.exists():
            raise ConfigError(f"The setting engine.library names {folder}, which does not exist.")
        return [folder]
    installed = settings.engines_dir
    folders = sorted(installed.iterdir(), reverse=True) if installed.is_dir() else []
    found = [f for f in folders if f.is_dir() and not f.name.startswith(".") and any(f.glob("libllama*"))]
    try:
        return [*found, wheel_library()]
    except EngineFailed:
        if found:
            return found
        raise


def thread_count(settings: EngineSettings) -> int:
    """As many as cores this process may use."""
    if settings.threads:
        return settings.threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def quiet_environment(environment: dict[str, str] | None = None) -> None:
    """Sets what must stand before the process starts.

    How long OpenMP's threads spin (GOMP_SPINCOUNT) is left alone: spinning less costs speed on a quiet machine, and
    on a busy one `threads.py` does better. MALLOC_*: the sampler's large arrays stay with the process instead of going
    back to the kernel after each token, which made sampling up to 2.5 times faster.
    """
    target = environment if environment is not None else os.environ
    target.setdefault("MALLOC_TRIM_THRESHOLD_", "268435456")
    target.setdefault("MALLOC_MMAP_THRESHOLD_", "268435456")
    target["OPENBLAS_NUM_THREADS"] = "1"  # numpy's own threads start when it is imported, outside of the confinement
