"""Programs as files: one form for the same files anywhere, and nothing that could reach out of its folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nimbos.errors import BrokenProgram, PayloadTooLarge
from nimbos.kernel.package import (
    FILE_BYTES_MAX,
    FILES_MAX,
    PROGRAM_BYTES_MAX,
    check_files,
    check_path,
    pack,
    read_folder,
    unpack,
)

names = st.from_regex(r"[a-z0-9_äß][a-z0-9_äß.]{0,6}[a-z]", fullmatch=True).filter(
    lambda name: not name.endswith(".pyc")
)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)


@given(st.dictionaries(paths, st.binary(max_size=40), max_size=6), st.randoms())
def test_the_same_files_have_the_same_bytes_in_any_order(files: dict[str, bytes], random: object) -> None:
    try:
        check_files(files)
    except BrokenProgram:
        return  # a file that is also a folder
    content = pack(files)
    shuffled = list(files.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert pack(dict(shuffled)) == content
    assert unpack(content) == files


@given(st.binary(max_size=60))
def test_bytes_that_nobody_packed_are_refused(content: bytes) -> None:
    for guess in (content, b"nimbos-program 1\n" + content):
        try:
            files = unpack(guess)
        except BrokenProgram:
            continue
        assert pack(files) == guess or sorted(files) != list(files)


def test_names_and_sizes_cannot_be_read_as_contents() -> None:
    one = pack({"a": b"1 b\nx", "c": b""})
    two = pack({"a": b"", "b": b"x", "c": b""})
    assert one != two
    assert unpack(one) == {"a": b"1 b\nx", "c": b""}


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a/./b",
        "a//b",
        "a/",
        "..",
        "C:\\x",
        "a\\b",
        "a\nb",
        "a\0b",
        "x\x7f",
        ".hidden",
        "a/.git/config",
        "__pycache__/x.py",
        "a/x.pyc",
        "e\u0301.md",  # not composed
        "\ud800",
        "a" * 201,
        "/".join("abcdefghi"),
        "space ",
        "dot.",
        " x",
        "what?",
        "aux|x",
    ],
)
def test_a_path_that_could_be_anything_else_is_refused(path: str) -> None:
    with pytest.raises(BrokenProgram):
        check_path(path)
    with pytest.raises(BrokenProgram):
        pack({path: b""})


def test_paths_that_some_systems_take_for_one_are_refused() -> None:
    with pytest.raises(BrokenProgram, match="case only"):
        pack({"Read.md": b"", "read.md": b""})
    with pytest.raises(BrokenProgram, match="a file and a folder"):
        pack({"a/b": b"", "A": b""})


def test_sizes_and_counts_are_bounded() -> None:
    with pytest.raises(PayloadTooLarge, match="'a'"):
        pack({"a": bytes(FILE_BYTES_MAX + 1)})
    most = bytes(FILE_BYTES_MAX)
    with pytest.raises(PayloadTooLarge, match=str(PROGRAM_BYTES_MAX)):
        pack({"a": most, "b": most, "c": b"1"})
    with pytest.raises(BrokenProgram, match=str(FILES_MAX)):
        pack({str(number): b"" for number in range(FILES_MAX + 1)})


def test_a_folder_is_read_without_what_is_hidden_or_left_behind(tmp_path: Path) -> None:
    for path in ("a.md", "sub/b.md", ".env", ".git/config", "__pycache__/a.cpython.pyc", "sub/c.pyc"):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(path)
    (tmp_path / "empty").mkdir()
    assert read_folder(tmp_path) == {"a.md": b"a.md", "sub/b.md": b"sub/b.md"}


def test_times_modes_and_the_place_do_not_matter(tmp_path: Path) -> None:
    for name, mode in (("one", 0o600), ("two", 0o755)):
        file = tmp_path / name / "a.md"
        file.parent.mkdir()
        file.write_text("x")
        file.chmod(mode)
        os.utime(file, (mode, mode))
    assert pack(read_folder(tmp_path / "one")) == pack(read_folder(tmp_path / "two"))


def test_links_and_devices_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("s")
    for kind in ("link", "folder", "pipe"):
        program = tmp_path / f"program-{kind}"
        program.mkdir()
        if kind == "pipe":
            os.mkfifo(program / "x")
        else:
            (program / "x").symlink_to(outside if kind == "link" else tmp_path)
        with pytest.raises(BrokenProgram, match="x: it is a link or a device"):
            read_folder(program)


def test_a_folder_that_is_not_there_or_too_large_is_told(tmp_path: Path) -> None:
    with pytest.raises(BrokenProgram, match="no folder"):
        read_folder(tmp_path / "none")
    (tmp_path / "a").write_bytes(bytes(FILE_BYTES_MAX + 1))
    with pytest.raises(PayloadTooLarge, match="'a'"):
        read_folder(tmp_path)


def test_bytes_of_too_many_files_are_given_up_at_the_first_that_is_too_many() -> None:
    """The rest, which may be millions more of the same name, is not even looked at: it is no file at all here."""
    entries = b"0 x\n" * (FILES_MAX + 1)
    with pytest.raises(BrokenProgram, match=f"more than {FILES_MAX} files"):
        unpack(pack({}) + entries + b"no file")
