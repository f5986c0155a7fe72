"""The command as a whole: what it lists, and what it must not load before it is needed."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import click
import pytest
import typer

from nimbos.cli import app
from tests.cli.command import run

HEAVY = (
    "numpy",
    "starlette",
    "uvicorn",
    "httpx2",
    "huggingface_hub",
    "jinja2",
    "llguidance",
    "prometheus_client",
    "nimbos.api",
    "nimbos.hub.hub",
    "nimbos.service",
)
ELSEWHERE = ("alembic", "asyncpg", "numpy", "nimbos.engine.worker")  # what engines and other databases need


@cache
def commands() -> dict[str, click.Command]:
    """Every command with its full name. Made once: to make them takes longer than each of the tests."""
    found: dict[str, click.Command] = {}
    left = [("", typer.main.get_command(app))]
    while left:
        name, command = left.pop()
        found[name] = command
        for verb, inner in getattr(command, "commands", {}).items():
            left.append((f"{name} {verb}".strip(), inner))
    return found


def test_help_lists_every_command(tmp_path: Path) -> None:
    shown = run(tmp_path, "--help")
    assert shown.returncode == 0
    words = shown.stdout.split()
    verbs = [name for name in commands() if name and " " not in name]
    assert {"up", "chat", "pull", "models", "rm", "engine", "doctor", "bench"} <= set(verbs)
    assert [verb for verb in verbs if verb not in words] == []


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_and_each_of_its_options_says_what_it_is_for(name: str) -> None:
    command = commands()[name]
    assert command.help
    assert [p.name for p in command.params if p.name != "help" and not getattr(p, "help", None)] == []


@pytest.mark.parametrize(
    ("what", "heavy"),
    [
        ("nimbos.cli", HEAVY),
        ("nimbos.cli.serve, nimbos.runtime, nimbos.api.app, nimbos.kernel.kernel", ELSEWHERE),
    ],
    ids=["command", "server"],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(what: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {what}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
