"""`nimbos bench` with a tiny model: sane numbers, a kept table, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest

from nimbos.cli import benchmark
from nimbos.cli.measuring import Bar
from nimbos.config import load
from nimbos.engine.calibrate import KNOTS, StepTimeTable
from nimbos.engine.memo import StepTimes
from nimbos.hub import Hub
from tests import tiny_gguf
from tests.cli.command import NIMBOS, document, environment, make_home, refusal, run
from tests.live import PATIENCE_S


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write("qwen2", tmp_path_factory.mktemp("models"))


def test_a_quick_run_measures_everything_and_keeps_nothing(home: Path, tiny: Path) -> None:
    found = document(home, "bench", "--model", str(tiny), "--quick")
    assert (found["model"], found["quick"], found["table"]) == (tiny.stem, True, None)
    assert [point["rows"] for point in found["calibration"]] == list(benchmark.QUICK_ROWS)
    assert all(point["milliseconds"] > 0 for point in found["calibration"])
    engine = found["engine"]
    assert engine["load_s"] > 0
    assert engine["first_token_ms"] > 0
    assert engine["overhead_share"] > 0
    assert [prefill["tokens"] for prefill in engine["prefill"]] == [128, 512]
    assert [decode["rows"] for decode in engine["decode"]] == [1, 8]
    assert all(speed["tokens_per_second"] > 0 for speed in (*engine["prefill"], *engine["decode"]))
    assert engine["fan_out"]["branches"] == 4
    assert engine["fan_out"]["shared_s"] > 0 < engine["fan_out"]["apart_s"]  # which is less says a quiet machine alone
    assert not list((home / "cache").rglob("steps/*"))


def test_people_read_the_same_in_lines(home: Path, tiny: Path) -> None:
    assert run(home, "pull", str(tiny)).returncode == 0  # then it needs no name
    shown = run(home, "bench", "--quick")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"{tiny.stem} with xllamacpp wheel, 1 threads, 4,096 cells of KV\n")
    for words in ("First token", "Prefill of 512", "Decode,  8 at a time", "Fan-out", "128 rows", "are not kept"):
        assert words in shown.stdout


def test_a_whole_run_leaves_the_table_that_engines_start_with(
    home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "CPU_SHARE_MIN", 0.0)  # also on a machine that is busy with other tests
    settings = load(home)
    model = Hub(settings).find(str(tiny))
    results = benchmark.run(settings, model, quick=False, bar=Bar())
    kept = StepTimes(settings, model.sha256)
    assert results.table == str(kept.path)
    table = msgspec.json.decode(kept.load(), type=StepTimeTable)
    assert table.usable
    assert all(table.seen)
    measured = {point.rows: point.milliseconds for point in results.calibration if point.cells == 0}
    assert table.row_ms == pytest.approx([measured[rows] for rows in KNOTS])
    assert [decode.rows for decode in results.engine.decode] == [1, 4, 8, 16]
    fan_out = results.engine.fan_out
    assert fan_out is not None
    assert (fan_out.branches, fan_out.shared_tokens) == (16, 512)
    assert fan_out.gain == fan_out.apart_s / fan_out.shared_s > 0


def test_a_machine_that_others_use_keeps_no_step_times(home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "CPU_SHARE_MIN", 1.1)
    monkeypatch.setattr(benchmark, "Size", lambda: benchmark.QUICK)
    settings = load(home)
    results = benchmark.run(settings, Hub(settings).find(str(tiny)), quick=False, bar=Bar())
    assert results.table is None
    assert any("not kept" in warning for warning in results.warnings)
    assert not list((home / "cache").rglob("steps/*"))


@pytest.mark.parametrize(
    ("arch", "decoded"),
    [
        ("gemma3", 32),
        ("qwen35", 15),  # each of its sequences costs a state: as many as its engine has, one of them for a context
    ],
)
def test_a_model_that_cannot_share_is_measured_without_a_context(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, decoded: int
) -> None:
    monkeypatch.setattr(benchmark, "Size", lambda: benchmark.QUICK)
    settings = load(home)
    results = benchmark.run(settings, Hub(settings).find(str(tiny_gguf.write(arch, tmp_path))), quick=False, bar=Bar())
    assert [point.rows for point in results.calibration] == [rows for rows in KNOTS if rows <= decoded or rows > 32]
    assert {point.cells for point in results.calibration} == {0}
    assert results.table is None


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_control_c_leaves_no_file_and_no_process_behind(home: Path, tiny: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [NIMBOS, "bench", "--model", str(tiny)],
        env=environment(home, TMPDIR=str(scratch)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line == "Decode\n":
            break
    assert list(scratch.glob("nimbos-bench-*/run/engine-*.log"))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    said, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, said) == (130, "")
    assert "Traceback" not in errors
    assert not list(scratch.iterdir())
    assert not list((home / "cache").rglob("steps/*"))
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_wrong_model_name_is_one_line(home: Path) -> None:
    assert "no-such-model" in refusal(home, "bench", "--model", "no-such-model")


def test_without_a_model_it_says_how_to_get_one(home: Path) -> None:
    assert "nimbos pull smollm2:135m" in refusal(home, "bench")


def test_a_model_that_makes_no_text_is_refused_by_name(home: Path, tmp_path: Path) -> None:
    embedding = tiny_gguf.write("qwen3-embedding", tmp_path)
    assert embedding.stem in refusal(home, "bench", "--model", str(embedding))
