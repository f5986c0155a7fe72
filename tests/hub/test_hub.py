"""What is on the disk: finding, listing, removing, registering, refusing."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from nimbos.cli import models as model_commands
from nimbos.cli import native as native_commands
from nimbos.cli.progress import Lines
from nimbos.config import Settings
from nimbos.errors import InvalidRequest, ModelNotFound, ModelUnusable, Overloaded
from nimbos.hub import Hub
from nimbos.hub.facts import Gguf, ModelFacts, read_gguf
from nimbos.hub.memory import memory_need
from nimbos.hub.reading import sha256_of
from nimbos.hub.store import Manifest, ManifestFile
from tests import tiny_gguf
from tests.hub.gguf_bytes import STRING, Made, pair, text

TINY = Made().bytes()


@pytest.fixture
def hub(settings: Settings) -> Hub:
    return Hub(settings, environment={})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "Mine-Q8_0.gguf"
    path.write_bytes(TINY)
    return path


def test_nothing_installed_is_an_empty_list(hub: Hub, settings: Settings) -> None:
    assert hub.models() == []
    assert not settings.models_dir.exists()
    with pytest.raises(ModelNotFound, match="none yet"):
        hub.find("qwen3:0.6b")


async def test_a_file_of_this_machine_is_used_where_it_lies(hub: Hub, file: Path, settings: Settings) -> None:
    model = await hub.pull(str(file))
    assert (model.id, model.path) == ("Mine-Q8_0", file)
    assert list(settings.models_dir.rglob("*.gguf")) == []
    assert hub.find(str(file)) == hub.find("Mine-Q8_0") == model
    assert await hub.pull(str(file)) == model
    hub.remove("Mine-Q8_0")
    assert file.exists()
    assert hub.models() == []


async def test_two_files_of_one_name_are_two_models(hub: Hub, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / file.name
    other.parent.mkdir()
    other.write_bytes(Made(data=b"\1" * 128).bytes())
    first, second = await hub.pull(str(file)), await hub.pull(str(other))
    assert first.id != second.id
    assert hub.find(first.id).path == file
    assert hub.find(second.id).path == other
    assert hub.find(str(other)).id == second.id


def test_a_path_can_be_found_without_pulling_it(hub: Hub, file: Path) -> None:
    model = hub.find(str(file))
    assert (model.id, model.path) == ("Mine-Q8_0", file)
    assert len(model.sha256) == 64
    assert hub.find(str(file)) == model
    assert hub.models() == []
    with pytest.raises(ModelNotFound):
        hub.find(str(file), allow_path=False)


def test_a_changed_file_has_another_hash(hub: Hub, file: Path) -> None:
    before = hub.find(str(file)).sha256
    file.write_bytes(Made(data=b"\1" * 160).bytes())
    assert hub.find(str(file)).sha256 != before


async def test_a_broken_file_is_a_row_with_its_reason(hub: Hub, file: Path, tmp_path: Path) -> None:
    good = tmp_path / "good.gguf"
    good.write_bytes(TINY)
    await hub.pull(str(good))
    await hub.pull(str(file))
    file.write_bytes(TINY[:100])
    rows = {model.id: model for model in hub.models()}
    assert rows["good"].problem is None
    assert "100 bytes" in (rows["Mine-Q8_0"].problem or "")
    with pytest.raises(ModelUnusable, match="100 bytes"):
        hub.find("Mine-Q8_0")
    file.unlink()
    with pytest.raises(ModelUnusable, match="is gone"):
        hub.find("Mine-Q8_0")
    file.write_bytes(TINY)
    assert hub.find("Mine-Q8_0").problem is None


async def test_a_damaged_manifest_is_a_row_with_its_reason(hub: Hub, file: Path, settings: Settings) -> None:
    await hub.pull(str(file))
    (manifest,) = settings.models_dir.rglob("manifest.json")
    elsewhere = manifest.read_bytes().replace(b"Mine-Q8_0.gguf", b"../../evil.gguf", 2)
    deep = b'{"x": ' + b"[" * 100_000
    for damage in (b"{", deep, b'{"id": "\xff"}', b'{"version": 9}', elsewhere):
        manifest.write_bytes(damage)
        (row,) = hub.models()
        assert "manifest is damaged" in (row.problem or "")
        assert str(manifest.parent) in (row.problem or ""), "its name is not known, so no command can remove it"
        with pytest.raises(ModelNotFound):
            hub.find("Mine-Q8_0")


async def test_a_manifest_is_durable_before_it_has_its_name(
    hub: Hub, file: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave a name without content, and a model that has to be pulled again."""
    done: list[tuple[str, bool]] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        manifests = [path.name for path in settings.models_dir.rglob("manifest.json*")]
        whole = stat.S_ISREG(os.fstat(descriptor).st_mode) and os.pread(descriptor, 1, 0) == b"{"
        done.append((" ".join(manifests), whole))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    await hub.pull(str(file))
    assert done == [("manifest.json.new", True), ("manifest.json", False)]


async def test_an_unknown_architecture_is_refused_by_name_before_it_is_loaded(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "warp.gguf"
    path.write_bytes(Made(pairs=[pair("general.architecture", STRING, text("warp9"))]).bytes())
    with pytest.raises(ModelUnusable, match="'warp9' is not known"):
        await hub.pull(str(path))
    with pytest.raises(ModelUnusable, match="'warp9' is not known"):
        hub.find(str(path))


async def test_a_model_that_does_not_fit_is_refused_with_the_numbers(hub: Hub, tmp_path: Path) -> None:
    model = hub.find(str(tiny_gguf.write("qwen3", tmp_path)))
    need = hub.check_memory(model, cells=4096, budget_bytes=1 << 40)
    assert need == memory_need(model.facts, cells=4096).total_bytes
    assert need > model.size_bytes + 4096 * model.facts.kv_bytes_per_cell
    assert hub.check_memory(model, cells=4096, budget_bytes=need) == need
    with pytest.raises(ModelUnusable) as caught:
        hub.check_memory(model, cells=4096, budget_bytes=need - 1)
    for number in (need, need - 1):
        assert f"{number / 1e6:,.0f} MB" in caught.value.reason
    assert "4096 cells" in caught.value.reason


def test_windows_save_memory_only_where_they_may() -> None:
    facts = ModelFacts(kv_bytes_per_cell=100, window_bytes_per_cell=1000, window_tokens=512, state_bytes=7)
    whole = memory_need(facts, cells=10_000, sequences=2)
    small = memory_need(facts, cells=10_000, sequences=2, whole_window=False)
    assert whole.cache_bytes == 10_000 * 1100 + 2 * 7
    assert memory_need(facts, cells=1, sequences=128).cache_bytes == 1100 + 128 * 7
    assert small.cache_bytes == 10_000 * 100 + (2 * 512 + 512) * 1000 + 2 * 7


async def test_removing_what_is_being_pulled_is_refused(hub: Hub, file: Path) -> None:
    await hub.pull(str(file))
    lock = hub._store.lock("Mine-Q8_0")
    assert lock.try_acquire()
    with pytest.raises(Overloaded):
        hub.remove("Mine-Q8_0")
    lock.release()
    hub.remove("Mine-Q8_0")
    with pytest.raises(ModelNotFound):
        hub.remove("Mine-Q8_0")


def test_a_part_that_gets_its_name_while_it_is_looked_at_counts_nothing(hub: Hub) -> None:
    folder = hub._store.folder("mine")
    folder.mkdir(parents=True)
    (folder / "here.gguf.part").write_bytes(b"123")
    (folder / "gone.gguf.part").symlink_to(folder / "nowhere")
    assert hub.partial_bytes("mine") == 3


def test_ids_cannot_leave_the_store(hub: Hub, settings: Settings) -> None:
    for model_id in ("../../x", "/etc", "a/b", "..", "", "\0", "x" * 999, "CON"):
        folder = hub._store.folder(model_id)
        assert folder.parent == settings.models_dir
        assert len(folder.name) <= 100
    assert hub._store.folder("a:b") != hub._store.folder("a_b")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "~nobody-here/x.gguf",
        "\0.gguf",
        "\ud800",
        "x" * 100_000,
        "../../nothing/there",
        "hf:../x",
        "pypi:",
        ".",
        "https://[",
    ],
)
def test_any_name_that_is_not_there_is_a_clean_error(name: str, hub: Hub) -> None:
    with pytest.raises((ModelNotFound, InvalidRequest)):
        hub.find(name)
    with pytest.raises((ModelNotFound, InvalidRequest)):
        hub.find(name, allow_path=False)


def test_the_hash_of_a_split_model_is_of_all_its_parts() -> None:
    files = [ManifestFile(name=name, size_bytes=1, sha256=name * 64) for name in ("a", "b")]
    both = Manifest(id="x", source="x", files=files, pulled_at="")
    other = Manifest(id="x", source="x", files=files[::-1], pulled_at="")
    assert both.sha256 != other.sha256
    assert Manifest(id="x", source="x", files=files[:1], pulled_at="").sha256 == "a" * 64


def test_what_was_read_is_remembered_until_the_file_changes(
    hub: Hub, file: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []

    def counting(path: Path) -> object:
        reads.append(path)
        return read_gguf(path)

    monkeypatch.setattr("nimbos.hub.store.read_gguf", counting)
    facts = hub.find(str(file)).facts
    assert Hub(settings, environment={}).find(str(file)).facts == facts
    assert len(reads) == 1
    file.write_bytes(TINY + bytes(32))
    hub.find(str(file))
    assert len(reads) == 2


@pytest.mark.parametrize("left", [b"", bytes(40), b'{"version": 1, "stamp": []}', b'{"sha256": "\xff"}'])
def test_what_another_release_or_a_power_cut_left_of_it_is_read_again(
    left: bytes, hub: Hub, file: Path, settings: Settings
) -> None:
    facts = hub.find(str(file)).facts
    (remembered,) = (settings.cache_dir / "gguf").glob("*.json")
    remembered.write_bytes(left)
    assert hub.find(str(file)).facts == facts
    assert remembered.read_bytes() != left


def test_what_is_replaced_while_its_metadata_is_read_is_not_remembered_with_the_facts_of_the_other(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_gguf.write("qwen2", tmp_path)
    (tmp_path / "other").mkdir()
    other = tiny_gguf.write("gemma3", tmp_path / "other")

    def replaced_meanwhile(path: Path) -> Gguf:
        found = read_gguf(path)
        other.replace(path)
        return found

    monkeypatch.setattr("nimbos.hub.store.read_gguf", replaced_meanwhile)
    hub.find(str(path))
    monkeypatch.undo()
    assert hub.find(str(path)).facts.architecture == "gemma3"


def test_what_changes_while_it_is_hashed_is_not_remembered(
    hub: Hub, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = TINY[:-1] + b"\1"  # the last of its weights
    assert other != TINY

    def replaced_meanwhile(path: Path) -> str:
        found = sha256_of(path)
        file.with_suffix(".new").write_bytes(other)
        file.with_suffix(".new").replace(file)
        return found

    monkeypatch.setattr("nimbos.hub.store.sha256_of", replaced_meanwhile)
    assert hub.find(str(file)).sha256 == hashlib.sha256(TINY).hexdigest()
    monkeypatch.undo()
    assert hub.find(str(file)).sha256 == hashlib.sha256(other).hexdigest()


@pytest.fixture
def app(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setenv("NIMBOS_HOME", settings.home)
    app = typer.Typer()
    model_commands.register(app)
    native_commands.register(app)
    return app


def test_the_commands_pull_list_and_remove(app: typer.Typer, file: Path) -> None:
    run = CliRunner().invoke
    empty = run(app, ["models"])
    assert "nimbos pull" in empty.output
    pulled = run(app, ["pull", str(file)])
    assert pulled.exit_code == 0, pulled.output
    assert "Mine-Q8_0 is ready" in pulled.output
    table = run(app, ["models"]).output
    for cell in ("Mine-Q8_0", "llama", "F32", "128", "mit"):
        assert cell in table
    (row,) = json.loads(run(app, ["models", "--json"]).output)
    assert row["id"] == "Mine-Q8_0"
    assert row["facts"]["architecture"] == "llama"
    assert row["problem"] is None
    assert "removed" in run(app, ["rm", "Mine-Q8_0"]).output
    assert file.exists()
    missing = run(app, ["rm", "Mine-Q8_0"])
    assert isinstance(missing.exception, ModelNotFound)


def test_the_catalog_can_be_listed(app: typer.Typer) -> None:
    rows = json.loads(CliRunner().invoke(app, ["models", "--catalog", "--json"]).output)
    assert {"qwen3:0.6b", "smollm2:135m", "qwen3:4b-q8_0"} <= {row["model"] for row in rows}
    assert all(row["memory"] and row["licence"] for row in rows)


def test_stopping_says_what_is_kept(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted(self: Hub, name: str, *, progress: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Hub, "pull", interrupted)
    monkeypatch.setattr(Hub, "partial_bytes", lambda self, name: 12_300_000)
    result = CliRunner().invoke(app, ["pull", "qwen3"])
    assert result.exit_code == 130
    assert "12.3 MB are kept" in result.output


def test_installing_if_possible_succeeds_without_npm(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(app, ["engine", "install", "--if-possible"])
    assert result.exit_code == 0
    assert len(result.output.strip().splitlines()) == 1
    assert "xllamacpp" in result.output
    assert CliRunner().invoke(app, ["engine", "install"]).exit_code == 1


def test_lines_come_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    lines = Lines(Console(width=200))
    lines.start("m.gguf", total_bytes=1000, done_bytes=0)
    for _ in range(100):
        lines.advance(10)
    lines.done()
    out = capsys.readouterr().out.strip().splitlines()
    assert len(out) == 11
    assert "100 %" in out[-1]


async def test_pulling_blocks_nobody(hub: Hub, file: Path) -> None:
    results = await asyncio.gather(*(hub.pull(str(file)) for _ in range(4)))
    assert len({result.id for result in results}) == 1
