"""`nimbos.toml`: what it may say, where it is wrong to the line, and its one canonical form."""

from __future__ import annotations

import tomllib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nimbos.errors import BrokenProgram
from nimbos.kernel.manifest import (
    BYTES_MAX,
    KEY_PARTS_MAX,
    Budget,
    Manifest,
    ModelNeeds,
    line_of,
    read_manifest,
    toml_of,
)

WHOLE = """
name = "trip"   # a comment
version = "1.2.0"
description = "Says where it is warmer."

[model]
name = "qwen3:0.6b"
temperature = 0
max_tokens = 300
thinking = "low"

[tools]
builtin = ["ask",
           "spawn"]
python = ["temperature"]
confirm = ["book"]

[budget]
tokens = 20_000
cost = 0.05
seconds = 600
calls = 20

[limits]
turns = 12
tool_deadline_s = 5

[answer]
regex = "[A-Z][a-z]+"
"""


def broken(text: str | bytes) -> BrokenProgram:
    with pytest.raises(BrokenProgram) as caught:
        read_manifest(text.encode() if isinstance(text, str) else text)
    assert caught.value.param == "nimbos.toml"
    return caught.value


def test_a_manifest_says_needs_tools_budget_and_limits() -> None:
    manifest = read_manifest(WHOLE.encode())
    assert (manifest.name, manifest.version) == ("trip", "1.2.0")
    assert manifest.model == ModelNeeds(name="qwen3:0.6b", temperature=0.0, max_tokens=300, thinking="low")
    assert (manifest.tools.builtin, manifest.tools.python, manifest.tools.confirm) == (
        ("ask", "spawn"),
        ("temperature",),
        ("book",),
    )
    assert manifest.budget == Budget(tokens=20_000, cost=0.05, seconds=600, calls=20)
    assert manifest.budget.cost_micros == 50_000
    assert (manifest.limits.turns, manifest.limits.tool_deadline_s, manifest.limits.children) == (12, 5.0, 32)
    assert manifest.answer.regex == "[A-Z][a-z]+"


def test_a_name_is_enough() -> None:
    assert read_manifest(b'name = "x"') == Manifest(name="x")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('name = "x"\ncolour = "red"\n', 2, "unknown key 'colour'"),
        ('name = "x"\n\n[model]\n# a comment\ncontext_token = 3\n', 5, "did you mean `context_tokens`?"),
        ('name = "x"\ndescription = """\n[model]\nthinking = 1\n"""\n[modle]\n', 6, "did you mean `model`?"),
        ('name = "x"\nmodel = { nam = "y" }\n', 2, "in [model]"),
        ('name = "x"\nbudget.token = 3\n', 2, "did you mean `tokens`?"),
        ('name = "x"\n[tools]\nbuiltin = [\n  "ask",\n  "fly",\n]\n', 3, "tools.builtin"),
        ('name = "x"\n[model]\nthinking = "lots"\n', 3, "model.thinking"),
        ('name = "x"\n[budget]\ntokens = 0\n', 3, "budget.tokens"),
        ('name = "x"\n[budget]\ntokens = 1.5\n', 3, "budget.tokens"),
        ('name = "x"\nmodel = 3\n', 2, "model"),
        ('version = "1"\nname = "Not So"\n', 2, "lower-case letters"),
        ('name = "x"\n[limits]\nturns = 10_000_000\n', 3, "limits.turns"),
        ('name = "x"\n[answer]\nschema = "a.json"\nregex = "b"\n', 4, "both"),
        ('name = "x"\nentry = "main.txt:main"\n', 2, "entry"),
        ('name = "x"\n[tools\n', 2, "Expected"),
        ('name = "x"\n\nname = "y"\n', 3, "overwrite"),
        ('name = "x"\nlist = [[[\n', 2, ""),
        (b'name = "x"\n# \xff\n', 2, "UTF-8"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str | bytes, line: int, says: str) -> None:
    error = broken(text)
    assert error.line == line, error.message
    assert f"nimbos.toml, line {line}: " in error.message
    assert says in error.message


def test_a_missing_name_and_too_much_text_are_told_without_one() -> None:
    assert "`name`" in broken('version = "1"').message
    assert str(BYTES_MAX) in broken("#" * (BYTES_MAX + 1)).message


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 30_000,
        "x" + ".y" * 20_000 + " = 1",
        "name = 'x'\nmodel = {'a' . \"b\" " + ".y" * 20_000 + " = 1}",
        "[" + "y." * 20_000 + "y]\nx = 1\n",
        "model = " + "{a=" * 5_000 + "1" + "}" * 5_000,
        '"' + "k" * 50_000 + '" = 1',
        "[a]\n" * 3,
        "name = 'x'\n[model]\ntemperature = nan",
        "name = 'x'\n[budget]\ncost = inf",
        "name = 'x'\n[model]\nseed = 99999999999999999999999",
        "name = 'x'\n[model]\nseed = " + "9" * 5_000,
        "name = 'x'\ndescription = 1979-05-27",
    ],
)
def test_hostile_text_is_an_error_and_nothing_else(text: str) -> None:
    assert len(broken(text).message) < 1_000


def test_a_key_of_many_parts_is_refused_before_the_parser_counts_them() -> None:
    long = ".".join(["a"] * (KEY_PARTS_MAX + 1))
    for text in (f"name = 'x'\n{long} = 1", f"name = 'x'\n [ [{long}]]", f"name = 'x'\nmodel = {{b = 1, {long} = 1}}"):
        error = broken(text)
        assert (error.line, f"more than {KEY_PARTS_MAX} parts" in error.message) == (2, True)
    assert "unknown key 'a'" in broken(f"name = 'x'\n{long.removesuffix('.a')} = 1").message
    assert read_manifest(f"name = 'x'\ndescription = 'from {long}'  # {long}".encode()).description == f"from {long}"


def test_comments_order_and_defaults_do_not_change_the_canonical_form() -> None:
    other = 'version="1"\nname="x"\n[limits]\nturns=100\n[budget]\ncalls=3\n[model]\ntemperature=1 # warm\n'
    one = 'name = "x"\nversion = "1"\n[model]\ntemperature = 1.0\n[budget]\ncalls = 3\n'
    assert toml_of(read_manifest(one.encode())) == toml_of(read_manifest(other.encode()))
    assert toml_of(Manifest(name="x")) == b'name = "x"\n'


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
manifests = st.builds(
    Manifest,
    name=st.from_regex(r"[a-z0-9]{1,5}(-[a-z0-9]{1,5}){0,2}", fullmatch=True),
    description=words,
    instructions=words,
    model=st.builds(
        ModelNeeds,
        name=words,
        temperature=st.none() | st.floats(0, 10),
        thinking=st.none() | st.booleans() | st.integers(0, 10_000_000) | st.just("high"),
    ),
    budget=st.builds(Budget, tokens=st.none() | st.integers(1, 10**12), cost=st.none() | st.floats(1e-6, 1e9)),
)


@given(manifests)
def test_the_canonical_form_says_the_same(manifest: Manifest) -> None:
    text = toml_of(manifest)
    assert read_manifest(text) == manifest
    assert toml_of(read_manifest(text)) == text


keys = st.from_regex(r"[a-z]{1,3}", fullmatch=True)
values: st.SearchStrategy[Any] = st.one_of(st.integers(0, 9), words, st.lists(words, max_size=2))


@given(st.dictionaries(keys, values, max_size=4), st.dictionaries(keys, st.dictionaries(keys, values), max_size=3))
def test_every_key_is_found_where_it_stands(plain: dict[str, Any], sections: dict[str, dict[str, Any]]) -> None:
    lines: list[str] = []
    where: dict[tuple[str, ...], int] = {}

    def write(path: tuple[str, ...], value: Any) -> None:
        where[path] = len(lines) + 1
        encoded = msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
        lines.append(f"{path[-1]} = {encoded}  # ] }}")

    for key, value in plain.items():
        if key not in sections:
            lines.append("# [not] = 'this'")
            write((key,), value)
    for section, table in sections.items():
        where[(section,)] = len(lines) + 1
        lines.append(f"[{section}]")
        for key, value in table.items():
            write((section, key), value)
    text = "\n".join(lines)
    tomllib.loads(text)
    assert {path: line_of(text, path) for path in where} == where
