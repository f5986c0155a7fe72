"""Runs the installed `nimbos` command with a home of its own, as a user does."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from nimbos.cli import main
from tests.live import PATIENCE_S

NIMBOS = str(Path(sys.executable).with_name("nimbos"))
CONFIG = "[engine]\nthreads = 1\ncells = 4096\nsequences = 32\n"


def make_home(folder: Path) -> Path:
    """A private home whose engines are small."""
    home = folder / "home"
    home.mkdir(mode=0o700)
    (home / "config.toml").write_text(CONFIG)
    return home


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NIMBOS_")}
    return {**kept, "NIMBOS_HOME": str(home), "NO_COLOR": "1", "COLUMNS": "200", **more}


def run(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [NIMBOS, *arguments],
        env=environment(home, **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def called(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The same within this process, without a second of start-up: for tests of many commands. Not where a server runs
    in a thread of this process, which prints as well."""
    printed, told = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    before = dict(os.environ)
    with open(os.devnull) as nothing, redirect_stdout(printed), redirect_stderr(told):
        stdin, argv = sys.stdin, sys.argv
        sys.stdin, sys.argv = nothing, [NIMBOS, *arguments]
        os.environ.clear()
        os.environ.update(environment(home, **more))
        try:
            main()
            code = 0
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        finally:
            sys.stdin, sys.argv = stdin, argv
            os.environ.clear()
            os.environ.update(before)
    printed.flush()
    written = printed.buffer.getvalue().decode()  # type: ignore[attr-defined]
    return subprocess.CompletedProcess([NIMBOS, *arguments], code, written, told.getvalue())


def document(home: Path, *arguments: str, **more: str) -> dict[str, Any]:
    """What a command that succeeds prints with `--json`; nothing else may stand on stdout."""
    done = run(home, *arguments, "--json", **more)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refusal(home: Path, *arguments: str, **more: str) -> str:
    """The one line with which a command fails."""
    return refused(run(home, *arguments, **more))


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line with which it failed."""
    assert done.returncode == 1, done.stdout
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    return line
