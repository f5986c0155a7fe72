"""Programs: what a folder says, who has which, and folders for workers that cannot be half there."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from nimbos.accounts import CODE_SCOPE
from nimbos.blobs import open_blobs
from nimbos.config import Settings
from nimbos.db import Database
from nimbos.errors import BrokenProgram, Forbidden, NotFound, PayloadTooLarge
from nimbos.kernel import programs as kept
from nimbos.kernel.program import program_of
from nimbos.kernel.programs import Program, Programs
from nimbos.types import Account, Grammar

MEMBER = Account(id="proj_one", name="one")
ADMIN = msgspec.structs.replace(MEMBER, scopes=frozenset({CODE_SCOPE}))
OTHER = msgspec.structs.replace(ADMIN, id="proj_two", name="two")
PLAIN = {"nimbos.toml": b'name = "plain"\n', "instructions.md": b"Be plain.\n"}
SKILL = {
    "SKILL.md": b"---\nname: pdf-notes\ndescription: |\n  Takes notes.\nlicense: MIT\nallowed-tools: Read\n"
    b"metadata:\n  version: '2.1'\n  tags: [a, b]\n---\n\n# Notes\n\nRead references/how.md.\n",
    "references/how.md": b"So.\n",
    "scripts/run.py": b"print('never run by us')\n",
}


@pytest.fixture
async def programs(database: Database, database_settings: Settings) -> AsyncIterator[Programs]:
    root = Path(database_settings.home) / "programs"
    yield Programs(database, open_blobs(database_settings, database), root)


def of(files: dict[str, bytes]) -> Program:
    return program_of(files)[0]


# --- what a folder says


def test_an_agent_is_a_manifest_and_instructions() -> None:
    program = of(PLAIN)
    assert (program.name, program.version, program.instructions) == ("plain", "0", "Be plain.\n")
    assert (program.python, program.entry, program.answer, program.parts) == (False, "", None, {})
    assert [file.path for file in program.files] == ["instructions.md", "nimbos.toml"]
    assert program.documents == ()


def test_a_plain_skill_runs_as_it_is() -> None:
    program = of(SKILL)
    assert (program.name, program.version, program.description) == ("pdf-notes", "2.1", "Takes notes.\n")
    assert program.instructions == "# Notes\n\nRead references/how.md.\n"
    assert not program.python  # its scripts are files like others: nothing here runs them
    assert program.manifest.tools.builtin == ("read",)
    assert program.documents == ("references/how.md",)


@pytest.mark.parametrize("version", [b"0x" + b"f" * 5_000, b"-0x" + b"f" * 5_000, b"2026-11-22", b"a b"])
def test_a_version_of_a_skill_that_is_none_is_left_out(version: bytes) -> None:
    text = b"---\nname: x\ndescription: d\nmetadata:\n  version: " + version + b"\n---\nBe plain.\n"
    assert of({"SKILL.md": text}).version == "0"


def test_a_skill_with_a_manifest_keeps_its_instructions() -> None:
    program = of({**SKILL, "nimbos.toml": b'name = "notes"\n[budget]\ntokens = 5\n'})
    assert (program.name, program.manifest.budget.tokens) == ("notes", 5)
    assert program.instructions.startswith("# Notes")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"# no front", "SKILL.md, line 1"),
        (b"---\nname: x\n---\n", "description"),
        (b"---\nname: Not So\ndescription: d\n---\n", "name"),
        (b"---\nname: [x\ndescription: d\n---\n", "SKILL.md, line 3"),
        (b"---\n- name\n---\n", "keys and values"),
        (b"---\nname: !!python/object/apply:os.system [ls]\ndescription: d\n---\n", "not YAML"),
        (b"---\nname: x\ndescription: d\ndate: 2026-99-99\n---\n", "cannot be read"),
        (b"---\nname: x\ndescription: d\nx: " + b"[" * 5_000 + b"\n---\n", "between the dashes"),
        (b"---\nname: x\ndescription: d\nx: " + b"y" * 20_000 + b"\n---\n", "bytes"),
        (b"---\nname: \xff\n---\n", "line 2"),
        (b"---\nname: x\ndescription: d\nx: " + b"1:" * 300 + b"1.5\n---\n", "cannot be read"),
        (b"---\nname: x\ndescription: d\nx: !!int ''\n---\n", "cannot be read"),
        (b"---\nname: x\ndescription: d\nx: !!bool maybe\n---\n", "cannot be read"),
        (b"---\nname: x\ndescription: d\nx: !!timestamp soon\n---\n", "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_skill_is_told(text: bytes, says: str) -> None:
    with pytest.raises(BrokenProgram, match=r"SKILL\.md") as caught:
        of({"SKILL.md": text})
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "neither nimbos.toml nor SKILL.md"),
        ({"nimbos.toml": b'name = "x"'}, "neither instructions"),
        ({"nimbos.toml": b'name = "x"', "instructions.md": b" \n"}, "neither instructions"),
        ({"nimbos.toml": b'name = "x"\ninstructions = "no.md"'}, "'no.md'"),
        ({"nimbos.toml": b'name = "x"\nentry = "main.py:main"'}, "'main.py'"),
        ({**PLAIN, "nimbos.toml": b'name = "x"\n[answer]\nschema = "s.json"'}, "'s.json'"),
        (
            {**PLAIN, "nimbos.toml": b'name = "x"\n[answer]\nschema = "s.json"', "s.json": b"{"},
            "s.json: it is not JSON",
        ),
        ({**PLAIN, "nimbos.toml": b'name = "x"\n[answer]\nschema = "s.json"', "s.json": b"[]"}, "an object"),
        ({**PLAIN, "instructions.md": b"a\n\xff"}, "instructions.md, line 2"),
        ({**PLAIN, "agents/note.md": b""}, "a folder for each part"),
        ({**PLAIN, "agents/pro/x.md": b""}, "agents/pro"),
        ({**PLAIN, "agents/pro/nimbos.toml": b'name = "x"\nbad = 1'}, "agents/pro/nimbos.toml, line 2"),
        ({**PLAIN, "agents/pro/nimbos.toml": b'name = "x"', "agents/pro/agents/con/x.md": b""}, "no parts of its own"),
    ],
)
def test_what_is_wrong_with_a_folder_is_told(files: dict[str, bytes], says: str) -> None:
    with pytest.raises(BrokenProgram) as caught:
        of(files)
    assert says in caught.value.message


def test_an_answer_is_a_grammar() -> None:
    schema = {**PLAIN, "nimbos.toml": b'name = "x"\n[answer]\nschema = "s.json"', "s.json": b'{ "type": "object" }'}
    assert of(schema).answer == Grammar(kind="json_schema", source='{"type":"object"}')
    regex = {**PLAIN, "nimbos.toml": b'name = "x"\n[answer]\nregex = "yes|no"'}
    assert of(regex).answer == Grammar(kind="regex", source="yes|no")


def test_tools_an_entry_or_a_part_with_tools_are_python() -> None:
    assert of({**PLAIN, "tools.py": b""}).python
    assert of({"nimbos.toml": b'name = "x"\nentry = "main.py:main"', "main.py": b""}).python
    part = {f"agents/pro/{path}": content for path, content in PLAIN.items()}
    assert not of({**PLAIN, **part}).python
    assert of({**PLAIN, **part, "agents/pro/tools.py": b""}).python


def test_identity_is_what_is_said_and_nothing_else() -> None:
    commented = {**PLAIN, "nimbos.toml": b'# hello\n\nversion = "0"\r\nname    = "plain"\r\n'}
    assert of(commented).hash == of(PLAIN).hash
    assert of({**PLAIN, "nimbos.toml": b'name = "plain"\nversion = "1"'}).hash != of(PLAIN).hash
    assert of({**PLAIN, "data.csv": b""}).hash != of(PLAIN).hash
    assert of({**PLAIN, "instructions.md": b"Be plain. \n"}).hash != of(PLAIN).hash
    program, content = program_of(PLAIN)
    assert program.hash == hashlib.sha256(content).hexdigest()


# --- who has which


async def test_a_program_is_put_once_and_read_again(programs: Programs, database_settings: Settings) -> None:
    first = await programs.put(MEMBER, SKILL)
    again = await programs.put(MEMBER, dict(reversed(SKILL.items())))
    assert first == again == await programs.load(first.hash)
    fresh = Programs(programs._database, programs._blobs, Path(database_settings.home) / "elsewhere")
    assert await fresh.load(first.hash) == first
    assert [listed.hash for listed in await programs.list(MEMBER.id)] == [first.hash]
    assert await programs.file(first, "references/how.md") == b"So.\n"
    with pytest.raises(NotFound, match="no file"):
        await programs.file(first, "../../etc/passwd")


async def test_python_needs_its_scope(programs: Programs) -> None:
    files = {**PLAIN, "tools.py": b"x = 1\n"}
    with pytest.raises(Forbidden, match="programs:code"):
        await programs.put(MEMBER, files)
    assert await programs.list(MEMBER.id) == []
    program = await programs.put(ADMIN, files)
    assert await programs.find(MEMBER.id, "plain") == program.hash  # what an admin brought, the project may run


async def test_programs_are_found_by_name_version_and_hash(programs: Programs) -> None:
    one = await programs.put(MEMBER, {**PLAIN, "nimbos.toml": b'name = "plain"\nversion = "1"'})
    two = await programs.put(MEMBER, {**PLAIN, "nimbos.toml": b'name = "plain"\nversion = "2"'})
    assert await programs.find(MEMBER.id, "plain") == two.hash
    assert await programs.find(MEMBER.id, "plain@1") == one.hash
    await programs.put(MEMBER, {**PLAIN, "nimbos.toml": b'name = "plain"\nversion = "1"'})
    assert await programs.find(MEMBER.id, "plain") == one.hash  # the one uploaded last
    assert await programs.find(MEMBER.id, two.hash) == two.hash
    assert await programs.find(MEMBER.id, two.hash[:12]) == two.hash
    for wanted in ("none", "plain@3", "f" * 64, "f" * 12, "", "a\0b", "x" * 5_000):
        with pytest.raises(NotFound):
            await programs.find(MEMBER.id, wanted)


async def test_another_projects_programs_are_not_there(programs: Programs) -> None:
    program = await programs.put(MEMBER, PLAIN)
    for wanted in ("plain", program.hash, program.hash[:12]):
        with pytest.raises(NotFound):
            await programs.find(OTHER.id, wanted)
    assert await programs.list(OTHER.id) == []
    with pytest.raises(NotFound):
        await programs.list(OTHER.id, after=program.hash)


async def test_lists_come_in_pages_last_uploaded_first(programs: Programs) -> None:
    put = [await programs.put(MEMBER, {**PLAIN, "n": str(number).encode()}) for number in range(5)]
    wanted = [program.hash for program in reversed(put)]
    first = await programs.list(MEMBER.id, limit=2)
    rest = await programs.list(MEMBER.id, after=first[-1].hash, limit=10)
    assert [listed.hash for listed in (*first, *rest)] == wanted


async def test_parts_are_programs_that_only_their_whole_may_name(programs: Programs) -> None:
    part = {f"agents/pro/{path}": content for path, content in PLAIN.items()}
    whole = await programs.put(MEMBER, {**SKILL, **part})
    assert whole.parts == {"pro": of(PLAIN).hash}
    assert await programs.find(MEMBER.id, "pro", inside=whole) == of(PLAIN).hash
    assert (await programs.load(whole.parts["pro"])).instructions == "Be plain.\n"
    with pytest.raises(NotFound):
        await programs.find(MEMBER.id, "pro")
    with pytest.raises(NotFound, match="Its parts: pro"):
        await programs.find(MEMBER.id, "con", inside=whole)


async def test_a_projects_programs_have_a_bound(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "PROJECT_BYTES_MAX", 3_000)
    await programs.put(MEMBER, {**PLAIN, "n": b"1"})
    await programs.put(MEMBER, {**PLAIN, "n": b"2"})
    with pytest.raises(PayloadTooLarge, match="project's programs"):
        await programs.put(MEMBER, {**PLAIN, "n": b"3"})
    assert len(await programs.list(MEMBER.id)) == 2
    await programs.put(OTHER, PLAIN)


# --- folders for workers


async def test_a_folder_is_read_only_and_whole(programs: Programs) -> None:
    program = await programs.put(MEMBER, SKILL)
    folder = await programs.folder(program)
    assert folder.name == program.hash
    assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")} == SKILL
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o555 if path.is_dir() else 0o444)
    assert await programs.folder(program) == folder


def spoil(folder: Path, how: str) -> None:
    if how == "deleted":
        shutil.rmtree(folder)
        return
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    if how == "changed":
        (folder / "SKILL.md").write_text("Do evil.")
    elif how == "a file gone":
        (folder / "SKILL.md").unlink()
    elif how == "a file more":
        (folder / "json.py").write_text("evil = 1")
    elif how == "a link":
        target = folder / "references"
        target.rename(folder.parent / "moved")
        target.symlink_to(folder.parent / "moved")
    elif how == "a file instead":
        shutil.rmtree(folder)
        folder.write_text("")


@pytest.mark.parametrize("how", ["deleted", "changed", "a file gone", "a file more", "a link", "a file instead"])
async def test_a_folder_that_was_spoilt_is_made_anew(programs: Programs, how: str) -> None:
    program = await programs.put(MEMBER, SKILL)
    spoil(await programs.folder(program), how)
    folder = await programs.folder(program)
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == SKILL
    assert not list(folder.parent.glob(".incoming-*"))


async def test_workers_that_begin_at_once_get_one_whole_folder(programs: Programs) -> None:
    program = await programs.put(MEMBER, SKILL)
    folders = await asyncio.gather(*(programs.folder(program) for _ in range(16)))
    assert len(set(folders)) == 1
    assert [path.name for path in folders[0].parent.iterdir()] == [program.hash]


async def test_what_a_dead_server_left_behind_is_never_taken_for_a_program(programs: Programs) -> None:
    program = await programs.put(MEMBER, SKILL)
    root = (await programs.folder(program)).parent
    half = root / program.hash
    spoil(half, "deleted")
    half.mkdir()
    (half / "SKILL.md").write_bytes(SKILL["SKILL.md"])  # as after a loss of power
    folder = await programs.folder(program)
    assert (folder / "references/how.md").read_bytes() == b"So.\n"
