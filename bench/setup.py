"""What every script is told, and the line that says where it ran."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.load import Words


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """`library`: folder of the libllama that both sides load. `peer_flags`: tried instead of a sweep, if any.
    `work`: for logs and homes; kept, so that a failed run can be read. `flash_attention`: of both sides.
    `limit_s`: no single run takes longer."""

    model: Path
    peer_dir: Path | None
    library: Path | None
    threads: int
    quick: bool
    repeats: int
    out: Path | None
    words: Words
    peer_flags: tuple[tuple[str, ...], ...]
    limits: bool
    limit_s: float
    work: Path
    one_pass: bool = False
    flash_attention: bool = True

    def scaled(self, full: int) -> int:
        """A quarter of it in a quick run."""
        return max(1, full // 4) if self.quick else full


def parser(question: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=question, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--model", type=Path, required=True, help="a GGUF file")
    made.add_argument("--peer-dir", type=Path, help="folder with llama-server and its libraries; see build_peer.sh")
    made.add_argument("--library", type=Path, help="folder of the libllama for Nimbos; default: that of the peer")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--quick", action="store_true", help="a quarter of the size: shows that it works, not a result")
    made.add_argument("--repeats", type=int, default=1, help="how often the interleaved order is run")
    made.add_argument("--one-pass", action="store_true", help="each arm once: a drift of the machine is not balanced")
    made.add_argument("--out", type=Path, help="JSON file for all numbers")
    made.add_argument("--word-ids", default="300:20000", help="range of token ids that prompts are made of")
    made.add_argument(
        "--peer-flags",
        action="append",
        default=[],
        metavar="FLAGS",
        help='instead of a sweep, e.g. "-np 1"; repeatable',
    )
    made.add_argument("--no-limits", action="store_true", help="skip calibration and what is computed from it")
    made.add_argument("--no-flash-attention", action="store_true", help="on both sides")
    made.add_argument("--limit-s", type=float, default=1800, help="no single run takes longer")
    return made


def from_arguments(given: argparse.Namespace) -> Setup:
    low, _, high = given.word_ids.partition(":")
    library = given.library or given.peer_dir
    return Setup(
        model=given.model.resolve(strict=True),
        peer_dir=given.peer_dir.resolve(strict=True) if given.peer_dir else None,
        library=library.resolve(strict=True) if library else None,
        threads=given.threads,
        quick=given.quick,
        repeats=given.repeats,
        one_pass=given.one_pass,
        out=given.out,
        words=Words(low=int(low), high=int(high)),
        peer_flags=tuple(tuple(flags.split()) for flags in given.peer_flags),
        limits=not given.no_limits,
        flash_attention=not given.no_flash_attention,
        limit_s=given.limit_s,
        work=Path(tempfile.mkdtemp(prefix="nimbos-bench-")),
    )


def where(setup: Setup) -> list[str]:
    """Machine, library, model, date: without them a number means nothing."""
    return [
        f"machine: {_processor()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}, "
        f"load before the run {os.getloadavg()[0]:.1f}",
        f"library: {_library(setup.library)}, {setup.threads} threads",
        f"model: {setup.model.name}, {setup.model.stat().st_size / 1e6:.0f} MB, sha256 {_digest(setup.model)}",
        f"date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC{', quick (a quarter of the size)' if setup.quick else ''}"
        f"{', each arm once' if setup.one_pass else ''}{'' if setup.flash_attention else ', no flash attention'}",
    ]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def _library(folder: Path | None) -> str:
    if folder is None:
        return "Nimbos's own choice"
    file = next(iter(sorted(folder.glob("libllama.*"))), None)
    return f"{file.name} (sha256 {_digest(file)}) for both sides" if file else f"none found in {folder.name}"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
