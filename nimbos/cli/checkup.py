"""What `nimbos doctor` finds out, in the order of its report. Everything here only looks; `compare.py` measures."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
from pathlib import Path

import msgspec

from nimbos import __version__
from nimbos.cli import machine, running
from nimbos.cli.compare import Comparison
from nimbos.cli.machine import Machine, features_unused, features_used
from nimbos.cli.measuring import BUSY_SHARE, Choice, libraries, library_name, look_at_library
from nimbos.cli.probe import Refused
from nimbos.cli.running import ServerState
from nimbos.config import Settings
from nimbos.errors import NimbosError
from nimbos.hub import Hub
from nimbos.keys import owner_key_file

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class LibraryFacts(msgspec.Struct, frozen=True, kw_only=True):
    """`used`: engines run on this one. `features`: of the processor, that it uses; `unused`: that it leaves, None where
    the system does not say. `refused`: why it cannot be used, else "". `tier`, `confined`: see `probe.Opened`."""

    name: str
    path: str
    used: bool = False
    variant: str = ""
    features: tuple[str, ...] = ()
    unused: tuple[str, ...] | None = None
    refused: str = ""
    tier: str = ""
    confined: bool = False


class SecretFile(msgspec.Struct, frozen=True, kw_only=True):
    """`private`: nobody but its owner may read or write it."""

    path: str
    mode: str
    private: bool


class InstalledModel(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    size_bytes: int
    quantisation: str
    problem: str | None


class Tools(msgspec.Struct, frozen=True, kw_only=True):
    npm: str | None
    pip: bool


class Checkup(msgspec.Struct, kw_only=True):
    """`comparison` is None when nothing was measured; `not_measured` then says why."""

    nimbos: str
    home: str
    python: str
    machine: Machine
    libraries: tuple[LibraryFacts, ...]
    tools: Tools
    secrets: tuple[SecretFile, ...]
    server: ServerState | None
    models: tuple[InstalledModel, ...]
    comparison: Comparison | None = None
    not_measured: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def library(self) -> LibraryFacts | None:
        """The one that engines run on."""
        return next((library for library in self.libraries if library.used), None)


def look(settings: Settings, hub: Hub) -> Checkup:
    """Takes a second or two: each library is opened in a process of its own."""
    home = Path(settings.home)
    return Checkup(
        nimbos=__version__,
        home=settings.home,
        python=machine.python_version(),
        machine=machine.look(home),
        libraries=_libraries(settings),
        tools=Tools(npm=shutil.which("npm"), pip=importlib.util.find_spec("pip") is not None),
        secrets=_secrets([home, settings.keys_file, owner_key_file(settings)]),
        server=running.look(settings),
        models=tuple(
            InstalledModel(
                id=model.id, size_bytes=model.size_bytes, quantisation=model.facts.quantisation, problem=model.problem
            )
            for model in hub.models()
        ),
    )


def _libraries(settings: Settings) -> tuple[LibraryFacts, ...]:
    try:
        choices = libraries(settings)
    except NimbosError as error:
        return (LibraryFacts(name=settings.engine.library or "none", path="", refused=error.message),)
    found: list[LibraryFacts] = []
    for choice in choices:
        found.append(_examine(choice, free=not any(library.used for library in found)))
    return tuple(found)


def _examine(choice: Choice, *, free: bool) -> LibraryFacts:
    """`free`: no library before this one is used, so that this will be if it can."""
    name, path = library_name(choice.path), str(choice.path)
    answer = look_at_library(choice.path)
    if isinstance(answer, Refused):
        return LibraryFacts(name=name, path=path, refused=answer.reason)
    used = features_used(answer.features)
    return LibraryFacts(
        name=name,
        path=path,
        used=choice.own and free,
        variant=answer.variant,
        features=used,
        unused=features_unused(used),
        tier=answer.tier,
        confined=answer.holds,
    )


def _secrets(paths: list[Path]) -> tuple[SecretFile, ...]:
    if os.name != "posix":
        return ()
    found = []
    for path in paths:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError:
            continue
        found.append(SecretFile(path=str(path), mode=f"{mode:04o}", private=not mode & _OTHERS))
    return tuple(found)


def warnings(checkup: Checkup) -> tuple[str, ...]:
    """What its owner should know, each with what to do."""
    found = [*_about_libraries(checkup), *_about_machine(checkup)]
    found += [
        f"{secret.path} has the mode {secret.mode}: others on this machine can read it. `chmod go= {secret.path}`."
        for secret in checkup.secrets
        if not secret.private
    ]
    server = checkup.server
    if server is not None and not server.reachable:
        found.append(f"run/server.json names a server at {server.url} (process {server.pid}), which does not answer.")
    found += [f"The model {model.id} cannot be used: {model.problem}" for model in checkup.models if model.problem]
    return tuple(found)


def _about_libraries(checkup: Checkup) -> list[str]:
    library, found = checkup.library, []
    if library is None:
        found.append("No libllama can be used, so no model can run. `nimbos engine install` brings one.")
    elif not library.confined:
        found.append(f"Engine processes are not confined here: {library.tier}.")
    found += [
        f"The library {refused.name} is not used: {refused.refused}" for refused in checkup.libraries if refused.refused
    ]
    if library is not None and len(checkup.libraries) == 1 and Path(library.path).is_file():
        found.append("No library made for this processor is installed. `nimbos engine install` brings one.")
    return found


def _about_machine(checkup: Checkup) -> list[str]:
    busy, comparison = checkup.machine.busy_share, checkup.comparison
    found = []
    if busy is not None and busy > BUSY_SHARE:
        found.append(
            f"The machine is overcommitted: other processes take {busy:.0%} of its cores, and engines wait for them."
        )
    if comparison is not None and comparison.contended:
        found.append(
            f"While measuring, {comparison.cpu_share:.0%} of the cores' time was to be had; the rest went to others, "
            "so the numbers are too low."
        )
    return found
