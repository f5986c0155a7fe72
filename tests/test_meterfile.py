"""The meter file: what is counted survives the processes that count."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nimbos.errors import Overloaded, StorageUnavailable
from nimbos.meterfile import Counts, MeterFile, Rows, leftovers
from nimbos.types import Usage, new_id

# A server in its own process: allots a row to each id it is given, adds, frees the last, and says that it is done.
SERVER = """
import sys
from pathlib import Path
from nimbos.meterfile import MeterFile
meters = MeterFile.create(Path(sys.argv[1]))
ids = sys.argv[2:]
for ask_id in ids:
    row = meters.allot(ask_id)
    meters.row(row, ask_id).add(input=7, cached=3, output=2, thinking=1, recomputed_input=5, compute_us=11)
meters.free(row)
print("ready", flush=True)
sys.stdin.read()
"""


def killed_server(run_dir: Path, ids: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(run_dir), *ids], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        assert list(leftovers(run_dir)) == [], "a living server's file was read"
        os.kill(server.pid, signal.SIGKILL)


def test_a_new_row_is_zero_and_counts_what_is_added(tmp_path: Path) -> None:
    meters = MeterFile.create(tmp_path)
    ask_id = new_id("ask")
    row = meters.allot(ask_id)
    assert meters.read(row) == Counts()
    writer = meters.row(row, ask_id)
    writer.add(input=10, cached=4)
    writer.add(output=3, thinking=2, compute_us=1_500)
    writer.add(recomputed_input=6, recomputed_output=2, recomputed_thinking=1)
    writer.add(thinking=-1)
    counts = meters.read(row)
    assert counts == Counts(
        computed_input=16, cached_input=4, output=5, thinking=2,
        recomputed_input=6, recomputed_output=2, recomputed_thinking=1, compute_us=1_500,
    )  # fmt: skip
    assert counts.usage() == Usage(input=14, cached=4, output=3, thinking=1, recomputed=8)
    meters.close()


def test_only_the_owner_may_read_the_file_and_a_clean_end_removes_it(tmp_path: Path) -> None:
    meters = MeterFile.create(tmp_path / "run")
    assert stat.S_IMODE(meters.path.stat().st_mode) == 0o600
    meters.free(meters.allot(new_id("ask")))
    meters.close()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_late_writer_cannot_touch_the_row_of_another_ask(tmp_path: Path) -> None:
    meters = MeterFile.create(tmp_path, rows=1)
    first, second = new_id("ask"), new_id("ask")
    row = meters.allot(first)
    late = meters.row(row, first)
    meters.free(row)
    late.add(output=1)
    assert meters.allot(second) == row
    late.add(output=1)
    assert meters.read(row) == Counts()
    assert not late.ours


def test_rows_are_reused_as_late_as_possible(tmp_path: Path) -> None:
    meters = MeterFile.create(tmp_path, rows=4)
    row = meters.allot(new_id("ask"))
    meters.free(row)
    assert row not in [meters.allot(new_id("ask")) for _ in range(3)]


def test_a_full_file_refuses_the_newest(tmp_path: Path) -> None:
    meters = MeterFile.create(tmp_path, rows=2)
    for _ in range(2):
        meters.allot(new_id("ask"))
    with pytest.raises(Overloaded):
        meters.allot(new_id("ask"))


@pytest.mark.parametrize("bad", ["", "ask_1", "ask_" + "g" * 32, "proc_" + "0" * 32])
def test_only_ids_of_asks_have_rows(bad: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"id|hex"):
        MeterFile.create(tmp_path).allot(bad)


def test_an_engine_adds_through_a_descriptor_of_its_own_and_keeps_none(tmp_path: Path) -> None:
    meters = MeterFile.create(tmp_path)
    ask_id = new_id("ask")
    row = meters.allot(ask_id)
    descriptor = meters.descriptor()
    rows = Rows(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    rows.row(row, ask_id).add(output=2)
    assert meters.read(row).output == 2
    with pytest.raises(IndexError):
        rows.row(10**6, ask_id)
    with pytest.raises(IndexError):
        rows.row(-1, ask_id)


def test_a_disk_that_fills_up_later_ends_nobody_who_counts(tmp_path: Path) -> None:
    """Writing to a part of a mapped file that has no place on the disk is the end of the process."""
    meters = MeterFile.create(tmp_path)
    found = meters.path.stat()
    assert found.st_blocks * 512 >= found.st_size
    meters.close()


def test_a_disk_that_is_full_is_told(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageUnavailable):
            MeterFile.create(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_rows_of_a_killed_server_are_found_once_and_only_when_settled(tmp_path: Path) -> None:
    ids = [new_id("ask") for _ in range(4)]
    killed_server(tmp_path, ids)
    kept = Counts(computed_input=12, cached_input=3, output=2, thinking=1, recomputed_input=5, compute_us=11)
    interrupted = leftovers(tmp_path)
    assert next(interrupted) == (ids[0], kept)
    assert list(leftovers(tmp_path)) == [], "two servers settle the same rows"
    interrupted.close()
    assert list(leftovers(tmp_path)) == [(ask_id, kept) for ask_id in ids[:3]]
    assert list(leftovers(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_clean_end_with_unsettled_rows_leaves_them_to_the_next_server(tmp_path: Path) -> None:
    meters = MeterFile.create(tmp_path)
    ask_id = new_id("ask")
    meters.allot(ask_id)
    meters.close()
    assert list(leftovers(tmp_path)) == [(ask_id, Counts())]


@pytest.mark.parametrize("content", [b"", b"NBMETER1", b"x" * 4096])
def test_a_file_that_is_none_of_ours_is_passed_over(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "meter-broken.bin").write_bytes(content)
    (tmp_path / "meter-draft.new").write_bytes(content)
    killed_server(tmp_path, [new_id("ask"), new_id("ask")])
    assert len(list(leftovers(tmp_path))) == 1
    descriptor = os.open(tmp_path / "any", os.O_RDWR | os.O_CREAT)
    os.write(descriptor, content or b"-")
    with pytest.raises(ValueError, match="meter file"):
        Rows(descriptor)
