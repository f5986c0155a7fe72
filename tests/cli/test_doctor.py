"""`nimbos doctor` on a real home with a tiny model, and with what can be wrong there."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

from nimbos.cli import checkup, running
from nimbos.cli.compare import Comparison, Measured, Speed, verdict
from nimbos.cli.machine import busy_share, features_unused, features_used
from nimbos.cli.measuring import Bar, libraries, time_library, why_not_now
from nimbos.cli.probe import Refused, Timing
from nimbos.config import EngineSettings, Settings, load
from nimbos.engine.llama import wheel_library
from nimbos.hub import Hub
from nimbos.presence import traced
from tests import tiny_gguf
from tests.cli.command import document, make_home, refusal, run
from tests.live import OWNER_SECRET, serving


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write("qwen2", tmp_path_factory.mktemp("models"))


def test_a_quick_look_says_what_is_here_and_that_nothing_was_measured(home: Path, tiny: Path) -> None:
    assert run(home, "pull", str(tiny)).returncode == 0
    found = document(home, "doctor", "--quick")
    assert found["home"] == str(home)
    assert 1 <= found["machine"]["usable_cores"] <= found["machine"]["cores"]
    assert found["machine"]["disk_free_bytes"] > 0
    (library,) = found["libraries"]
    assert library["used"]
    assert library["path"] == str(wheel_library())
    assert library["refused"] == ""
    assert [model["id"] for model in found["models"]] == [tiny.stem]
    assert found["server"] is None
    assert found["tools"]["pip"]
    assert {secret["path"]: secret["private"] for secret in found["secrets"]} == {str(home): True}
    assert found["comparison"] is None
    assert found["not_measured"] == "--quick was given."


def test_people_read_the_same_in_lines(home: Path) -> None:
    shown = run(home, "doctor", "--quick")
    assert shown.returncode == 0
    heads = [line.split(maxsplit=1)[0] for line in shown.stdout.splitlines() if line and line[0].isupper()]
    assert {"Nimbos", "Python", "Cores", "Memory", "Disk", "Server", "Model", "Library", "Confinement"} <= set(heads)
    assert "Not measured: --quick was given." in shown.stdout


def test_the_tier_it_names_is_one_that_it_saw_hold(home: Path) -> None:
    (library,) = document(home, "doctor", "--quick")["libraries"]
    assert library["confined"] == library["tier"].startswith("landlock-")


def test_a_keys_file_that_others_can_read_is_named(home: Path) -> None:
    keys = home / "keys.toml"
    keys.write_text("")
    keys.chmod(0o644)
    warnings = document(home, "doctor", "--quick")["warnings"]
    assert any(str(keys) in warning and "0644" in warning for warning in warnings)
    keys.chmod(0o600)
    warnings = document(home, "doctor", "--quick")["warnings"]
    assert not any(str(keys) in warning for warning in warnings)


def test_a_library_that_does_not_load_is_named_with_its_reason_and_the_next_is_used(home: Path) -> None:
    broken = home / "engines" / "broken-1"
    broken.mkdir(parents=True)
    (broken / "libllama.so").write_bytes(b"no library")
    found = document(home, "doctor", "--quick")
    first, second = found["libraries"]
    assert (first["name"], first["used"]) == ("broken-1", False)
    assert "libggml-base" in first["refused"]
    assert second["used"]
    assert any("broken-1" in warning for warning in found["warnings"])


def test_without_any_library_it_says_so_and_fails(home: Path) -> None:
    (home / "config.toml").write_text(f"[engine]\nlibrary = '{home / 'missing'}'\n")
    shown = run(home, "doctor", "--quick")
    assert shown.returncode == 1
    assert "engine.library names" in shown.stdout
    assert "no model can run" in shown.stdout


def test_two_libraries_are_measured_in_turn_and_compared(home: Path, tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copied" / "library.so"
    copy.parent.mkdir()
    try:
        os.link(wheel_library(), copy)
    except OSError:
        shutil.copyfile(wheel_library(), copy)
    (home / "config.toml").write_text(f"[engine]\nthreads = 1\nlibrary = '{copy}'\n")
    found = document(home, "doctor", "--model", str(tiny))["comparison"]
    assert found["model"] == tiny.stem
    assert found["order"] == ["copied wheel", "xllamacpp wheel", "xllamacpp wheel", "copied wheel"]
    used, other = found["libraries"]
    assert (used["used"], other["used"]) == (True, False)
    for library in (used, other):
        assert [speed["rows"] for speed in library["speeds"]] == [1, 8, 128]
        assert all(speed["tokens_per_second"] > 0 for speed in library["speeds"])
    assert all(speed["ratio"] == 1.0 for speed in used["speeds"])
    assert 0 < found["cpu_share"] <= 1


@pytest.mark.parametrize(
    ("ratio", "cpu_share", "words"),
    [
        (1.5, 1.0, "other would gain here: decode of 1 1.50×."),
        (0.5, 1.0, "other would gain nothing here: decode of 1 0.50×."),
        (1.01, 1.0, "other would gain nothing here."),
        (None, 1.0, "other runs this model; the one that is used does not."),
        (1.5, 0.6, "Other programs had too much of the cores to say which is faster. Try again when they are idle."),
    ],
)
def test_the_verdict_says_no_more_than_was_measured(ratio: float | None, cpu_share: float, words: str) -> None:
    measured = Measured(library="other", used=False, speeds=(Speed(rows=1, tokens_per_second=9.0, ratio=ratio),))
    comparison = Comparison(model="m", threads=1, order=(), libraries=(measured,), cpu_share=cpu_share)
    assert verdict(comparison) == [words]


def test_a_wrong_model_name_is_one_line(home: Path) -> None:
    assert "no-such-model" in refusal(home, "doctor", "--model", "no-such-model")


def test_it_sees_which_models_a_running_server_has_loaded(
    home: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIMBOS_API_KEY", OWNER_SECRET)
    engine = EngineSettings(threads=1, cells=2048, sequences=16)
    with serving(home, {"demo": {"default": {"text": "Hi."}}}, models=(tiny,), engine=engine) as live:
        settings = load(home)
        with traced(settings, live.url):
            before = running.look(settings)
            assert before is not None
            assert (before.ready, before.loaded) == (True, ())
            assert why_not_now(before) is None
            assert live.chat(model=tiny.stem, max_tokens=1).status_code == 200
            after = running.look(settings)
            assert after is not None
            assert after.loaded == (tiny.stem,)
            line = refusal(home, "bench", "--quick", "--model", str(tiny), NIMBOS_API_KEY=OWNER_SECRET)
            assert tiny.stem in line
            assert "--force" in line
            stranger = refusal(home, "bench", "--quick", "--model", str(tiny), NIMBOS_API_KEY="nb-wrong")
            assert "does not say which models" in stranger


def test_a_server_that_left_its_trace_behind_is_a_warning(home: Path) -> None:
    settings = load(home)
    with traced(settings, "http://127.0.0.1:9"):
        found = checkup.look(settings, Hub(settings))
    assert found.server is not None
    assert not found.server.reachable
    assert any("does not answer" in warning for warning in checkup.warnings(found))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the child in /proc")
def test_a_probe_that_is_killed_is_a_refusal_that_names_the_signal(tiny: Path) -> None:
    class Killer(Bar):
        def at(self, done: int, total: int) -> None:
            (child,) = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
            os.kill(int(child), signal.SIGKILL)

    timing = Timing(model=str(tiny), threads=1, rows=(1, 8, 128), step_tokens=128, sequences=8, repeats=200)
    answer = time_library(wheel_library(), timing, Killer(), "dying")
    assert isinstance(answer, Refused)
    assert "SIGKILL" in answer.reason


def test_the_engines_own_libraries_come_first_and_none_twice(home: Path) -> None:
    wheel = wheel_library()
    assert [choice.path for choice in libraries(Settings(home=str(home)))] == [wheel]
    named = Settings(home=str(home), engine=EngineSettings(library=str(wheel)))
    assert [(choice.path, choice.own) for choice in libraries(named)] == [(wheel, True)]


def test_features_are_those_of_the_processor_that_are_on() -> None:
    said = "CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 0 | LLAMAFILE = 1 | REPACK = 1 | "
    assert features_used(said) == ("SSE3", "AVX2")
    unused = features_unused(("SSE3", "AVX2"))
    assert unused is None or not {"SSE3", "AVX2"} & set(unused)


def test_the_busy_share_is_a_share() -> None:
    share = busy_share(0.05)
    assert share is None or 0 <= share <= 1
