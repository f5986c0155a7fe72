"""What this machine is and has left, as the system itself says; None where it does not say."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from nimbos.config import EngineSettings
from nimbos.engine.library import thread_count
from nimbos.hub.memory import machine_memory_bytes

WATCH_S = 0.5

# Features as ggml names them, and as /proc/cpuinfo does (x86 `flags`, Arm `Features`).
_KERNEL_NAMES = {
    "SSE3": "pni",
    "SSSE3": "ssse3",
    "AVX": "avx",
    "AVX_VNNI": "avx_vnni",
    "AVX2": "avx2",
    "F16C": "f16c",
    "FMA": "fma",
    "BMI2": "bmi2",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8",
    "NEON": "asimd",
    "FP16_VA": "asimdhp",
    "DOTPROD": "asimddp",
    "MATMUL_INT8": "i8mm",
    "SVE": "sve",
    "SME": "sme",
}


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """`busy_share`: of all cores, in other processes' (or, stolen, other machines') hands while this one waited."""

    system: str
    processor: str
    cores: int
    usable_cores: int
    memory_bytes: int | None
    memory_free_bytes: int | None
    disk_free_bytes: int
    busy_share: float | None


def look(home: Path) -> Machine:
    """Takes half a second: it watches how busy the cores are."""
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=_cpuinfo("model name") or platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        usable_cores=thread_count(EngineSettings()),
        memory_bytes=machine_memory_bytes(),
        memory_free_bytes=_memory_free_bytes(),
        disk_free_bytes=shutil.disk_usage(home).free,
        busy_share=busy_share(WATCH_S),
    )


def busy_share(seconds: float) -> float | None:
    """Of all cores' time, while this process sleeps."""
    before = _core_times()
    time.sleep(seconds)
    after = _core_times()
    if before is None or after is None or after[1] <= before[1]:
        return None
    return 1 - (after[0] - before[0]) / (after[1] - before[1])


def _core_times() -> tuple[int, int] | None:
    """Idle and all ticks of all cores since the start. Source: proc_stat(5)."""
    with suppress(OSError, ValueError, IndexError):
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)
    return None


def _memory_free_bytes() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def features_used(system_info: str) -> tuple[str, ...]:
    """Out of llama_print_system_info's `CPU : AVX = 1 | AVX2 = 1 | … | REPACK = 1 |`, the processor's features."""
    words = system_info.replace("CPU :", "|").split("|")
    pairs = [word.split("=") for word in words if word.count("=") == 1]
    on = [name.strip() for name, value in pairs if value.strip() not in ("", "0")]
    return tuple(name for name in on if name in _KERNEL_NAMES)


def features_unused(used: tuple[str, ...]) -> tuple[str, ...] | None:
    """What this processor has beyond these, among what ggml knows of; None where the system does not say."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    if not flags:
        return None
    return tuple(name for name, kernel in _KERNEL_NAMES.items() if kernel in flags and name not in used)


def _cpuinfo(key: str) -> str | None:
    """Of the first core."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return None


def python_version() -> str:
    return f"{platform.python_version()} ({sys.executable})"
