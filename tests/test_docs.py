"""The docs keep up with the code: what exists is described, what is described exists, and the README's examples run."""

from __future__ import annotations

import ast
import asyncio
import importlib
import json
import os
import pkgutil
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from starlette.routing import Route
from typer.core import TyperGroup

import nimbos
from nimbos.api import build
from nimbos.api.anthropic_body import REFUSED as ANTHROPIC_REFUSED
from nimbos.api.anthropic_body import MessagesBody
from nimbos.api.anthropic_content import BLOCK_FIELDS
from nimbos.api.anthropic_tools import FIELDS as TOOL_FIELDS
from nimbos.api.anthropic_tools import HINTS as TOOL_HINTS
from nimbos.api.chat_request import REFUSED, ChatBody
from nimbos.api.fields import NimbosFields, StreamOptions, StructuredOutputs
from nimbos.api.openai_completions import CompletionsBody
from nimbos.api.openai_embeddings import EmbeddingsBody
from nimbos.api.openai_wire import ReceiptBody
from nimbos.api.rerank import RerankBody
from nimbos.chat.dial import DIAL_FIELDS, LEVEL_TOKENS
from nimbos.chat.isolation import _INHERITED
from nimbos.cli import app
from nimbos.config import BatchSettings, EngineSettings, ServerSettings, Settings, StorageSettings
from nimbos.engine.engine import KEPT_ENVIRONMENT
from nimbos.engine.script import Reply
from nimbos.errors import NimbosError
from nimbos.hub.catalog import load_catalog
from nimbos.keys import OwnerKey, file_keys
from nimbos.models import open_models
from nimbos.runtime import assemble
from tests import tiny_gguf
from tests.live import OWNER_SECRET, PATIENCE_S, Live, serving

ROOT = Path(__file__).parent.parent
DOCS = ("README.md", "CHANGELOG.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@cache
def page(name: str) -> str:
    return (ROOT / name).read_text()


def section(name: str, heading: str) -> str:
    """From a heading to the next one of its level or above."""
    level = heading.split(" ", 1)[0]
    rest = page(name).split(f"\n{heading}\n", 1)[1]
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> dict[str, list[str]]:
    """A page's table rows: the cells behind each `name` of a first cell."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            first, *rest = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", first), rest)
    return found


def blocks(name: str, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page(name)) if language in languages]


def missing(names: Any, text: str) -> list[str]:
    return sorted(name for name in names if f"`{name}`" not in text)


@cache
def modules() -> tuple[tuple[str, ast.Module], ...]:
    files = sorted((ROOT / "nimbos").rglob("*.py"))
    return tuple((str(file.relative_to(ROOT)), ast.parse(file.read_text())) for file in files)


@pytest.fixture(scope="module", autouse=True)
def trees_are_let_go() -> Iterator[None]:
    """Each is parsed once, and all together are a few hundred megabytes."""
    yield
    modules.cache_clear()


# --- the HTTP API


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> list[Route]:
    settings = Settings(home=str(tmp_path_factory.mktemp("home")))

    async def made() -> list[Route]:
        runtime = await assemble(settings, owner=OwnerKey(secret="nb-x", file=None), models=open_models(settings))
        try:
            return [route for route in build(runtime).routes if isinstance(route, Route)]
        finally:
            await runtime.close()

    found = asyncio.run(made())
    assert len(found) >= 7
    return found


def test_every_route_is_described_and_no_other(routes: list[Route]) -> None:
    text = page("docs/api.md")
    listed = set(re.findall(r"^\| `((?:GET|POST|PUT|PATCH|DELETE) [^`]+)` \|", text, re.MULTILINE))
    served = {
        f"{method} {route.path.replace(':path', '')}"
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert listed == served


def test_every_field_of_a_request_is_described() -> None:
    shared = section("docs/api.md", "## Shared fields")
    for heading, body in (
        ("## POST /v1/chat/completions", ChatBody),
        ("## POST /v1/completions", CompletionsBody),
        ("## POST /v1/embeddings", EmbeddingsBody),
        ("## POST /v1/rerank", RerankBody),
    ):
        own = section("docs/api.md", heading)
        text = own if body in (EmbeddingsBody, RerankBody) else own + shared
        assert not missing(body.__struct_fields__, text), heading


def test_every_field_and_block_of_anthropics_messages_is_described() -> None:
    fields = section("docs/anthropic.md", "## The body")
    assert not missing({*MessagesBody.__struct_fields__} - {"thread"}, fields)
    assert not missing({*ANTHROPIC_REFUSED, "thread"}, fields)
    assert set(rows(section("docs/anthropic.md", "## Messages"))) == set(BLOCK_FIELDS)
    assert not missing({*TOOL_FIELDS, *TOOL_HINTS} - {"type"}, section("docs/anthropic.md", "## Tools"))
    reasons = {"end_turn", "stop_sequence", "tool_use", "max_tokens", "model_context_window_exceeded"}
    assert set(rows(section("docs/anthropic.md", "## The answer"))) - {"stop_reason"} == reasons


def test_every_refused_field_is_named_with_its_reason() -> None:
    assert not missing(REFUSED, section("docs/api.md", "## POST /v1/chat/completions"))
    reasons = section("docs/compatibility.md", "## Fields that are refused, and why")
    assert not missing(REFUSED, reasons)


def test_objects_inside_requests_and_answers_are_described() -> None:
    shared = section("docs/api.md", "## Shared fields")
    for struct in (StreamOptions, StructuredOutputs, NimbosFields):
        assert not missing((field.encode_name for field in msgspec.structs.fields(struct)), shared), struct
    receipt = rows(section("docs/api.md", "## Receipts and headers"))
    assert {field.encode_name for field in msgspec.structs.fields(ReceiptBody)} <= set(receipt)


def test_the_dial_and_its_levels_are_described() -> None:
    dial = section("docs/api.md", "### The thinking dial")
    assert not missing(DIAL_FIELDS - {"output_config", "reasoning"}, dial)
    table = rows(dial)
    for level, tokens in LEVEL_TOKENS.items():
        assert table[level] == [f"{tokens:,}" if tokens is not None else "as many as fit"], level


def test_every_error_is_described_with_its_status() -> None:
    for found in pkgutil.walk_packages(nimbos.__path__, "nimbos."):
        importlib.import_module(found.name)
    table = rows(section("docs/api.md", "## Errors"))
    classes = list(subclasses(NimbosError))
    assert len(classes) > 15
    for error in classes:
        assert error.code in table, error
        assert table[error.code][0] == str(error.status), error


def subclasses(of: type[NimbosError]) -> Iterator[type[NimbosError]]:
    for error in of.__subclasses__():
        yield error
        yield from subclasses(error)


def test_errors_without_a_class_are_described_too(live: Live) -> None:
    table = rows(section("docs/api.md", "## Errors"))
    codes = set()
    for method, path in (("GET", "/nowhere"), ("DELETE", "/v1/models"), ("GET", "/v1/models/none")):
        response = live.http.request(method, path)
        codes.add(response.json()["error"]["code"])
        assert table[response.json()["error"]["code"]][0] == str(response.status_code)
    assert codes == {"not_found", "method_not_allowed", "model_not_found"}
    sources = (file.read_text() for file in (ROOT / "nimbos").rglob("*.py"))
    written = {code for source in sources for code in re.findall(r'"code":\s*"([a-z_]+)"', source)}
    assert written and written <= set(table)


def test_every_metric_is_described_and_no_other(live: Live) -> None:
    live.chat()
    kinds = dict(re.findall(r"^# TYPE (nimbos_\w+) (\w+)$", live.http.get("/metrics").text, re.MULTILINE))
    served = {name: kind for name, kind in kinds.items() if not name.endswith("_created")}
    described = {
        name: cells[0] for name, cells in rows(section("docs/api.md", "## GET /metrics")).items() if "nimbos_" in name
    }
    assert described == served


# --- commands, settings, environment


def commands(group: TyperGroup, path: str = "nimbos") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_every_command_and_option_is_described_and_no_other() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    found = dict(commands(group))
    assert {"nimbos up", "nimbos engine install"} <= set(found)
    heading = re.compile(r"^## `([a-z ]+?)(?: [A-Z]+)*`$", re.MULTILINE)
    parts = heading.split(page("docs/commands.md"))[1:]
    described = dict(zip(parts[::2], parts[1::2], strict=True))
    assert set(described) == set(found)
    for name, command in found.items():
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("-")}
        table = "".join(line for line in described[name].splitlines() if line.startswith("|"))
        assert set(re.findall(r"`(--?[a-z-]+)`", table)) == options - {"--help"}, name
        assert name in page("README.md")


def test_every_setting_is_described_with_its_default_and_no_other() -> None:
    told = rows(page("docs/settings.md"))
    described = {name: cells[0] for name, cells in told.items() if re.match(r"(engine|server|storage|batches)\.", name)}
    built = msgspec.to_builtins(
        {
            "engine": EngineSettings(),
            "server": ServerSettings(),
            "storage": StorageSettings(),
            "batches": BatchSettings(),
        }
    )
    settings = {
        f"{part}.{key}": f"`{json.dumps(value)}`" for part, table in built.items() for key, value in table.items()
    }
    assert described == settings


def test_every_variable_of_the_environment_is_described() -> None:
    read = {name for _, tree in modules() for name in variables(tree)} | set(KEPT_ENVIRONMENT) | set(_INHERITED)
    assert {"NIMBOS_HOME", "NIMBOS_API_KEY", "HF_ENDPOINT", "HF_TOKEN", "MODELSCOPE_ENDPOINT", "CXX"} <= read
    assert not missing(read, section("docs/settings.md", "## Environment variables"))


def variables(tree: ast.Module) -> Iterator[str]:
    """Names that the code looks up in, or adds to, an environment."""
    for node in ast.walk(tree):
        names: list[ast.expr] = []
        if isinstance(node, ast.Call):
            names = [keyword.value for keyword in node.keywords if keyword.arg == "envvar"]
            if re.fullmatch(
                r"(os\.)?(environ|environment|target)\.(get|setdefault|pop)|_endpoint", ast.unparse(node.func)
            ):
                names += node.args[:2]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("os.environ", "environment"):
            names = [node.slice]
        for name in names:
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and name.value.isupper():
                yield name.value


def test_every_model_of_the_catalog_is_listed_as_it_is() -> None:
    table = rows(section("docs/models.md", "## The catalog"))
    catalog = load_catalog()
    assert set(table) == {model.name for model in catalog.models}
    for model in catalog.models:
        _, quantisations, context, licence, *_ = table[model.name]
        listed = quantisations.split(", ")
        assert (listed[0], set(listed)) == (model.default, set(model.files)), model.name
        assert (context, licence) == (f"{model.context_tokens:,}", model.licence), model.name


def test_the_keys_of_a_script_are_described() -> None:
    assert not missing(Reply.__struct_fields__, section("README.md", "## A scripted model, for your own tests"))


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads(page("pyproject.toml"))["project"]
    named = [re.match(r"[\w-]+", line)[0] for line in project["dependencies"]]  # type: ignore[index]
    reasons = re.findall(r"^\| ([\w-]+) \|", page("CHANGELOG.md"), re.MULTILINE)
    assert set(named) == set(reasons) - {"package", "---"}
    for line in project["optional-dependencies"]["dev"]:
        assert re.match(r"[\w-]+", line)[0] in page("CHANGELOG.md")  # type: ignore[index]
    assert f"## {nimbos.__version__}\n" in page("CHANGELOG.md")


# --- the pages themselves


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.is_file(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("name", DOCS)
def test_files_that_are_named_exist(name: str) -> None:
    for path in re.findall(r"\b(?:nimbos|bench|tests|docs)/[\w/]+\.(?:py|toml|sh)\b", page(name)):
        assert (ROOT / path).is_file(), path


def test_the_tree_in_the_readme_exists_and_names_every_package() -> None:
    folder = ROOT
    seen = set()
    tree = BLOCK.search(section("README.md", "## The files"))
    assert tree is not None
    for line in tree[2].splitlines():
        indent = len(line) - len(line.lstrip())
        name = line.split()[0]
        if name.endswith("/"):
            folder = ROOT / "nimbos" / name if indent else ROOT / name
            seen.add(folder)
        parent = ROOT / "nimbos" if indent == 2 else folder
        path = folder if name.endswith("/") else parent / name
        assert path.exists(), line
    packages = {file.parent for file in (ROOT / "nimbos").rglob("__init__.py")}
    assert packages <= seen


@pytest.mark.parametrize("name", DOCS)
def test_code_in_the_docs_is_code(name: str) -> None:
    for text in blocks(name, "python"):
        compile(text, name, "exec")
    for text in blocks(name, "json"):
        json.loads(text)
    for text in blocks(name, "toml"):
        tomllib.loads(text)
    for text in blocks(name, "sh"):
        subprocess.run(["sh", "-n"], input=text, text=True, check=True)
    assert {language for language, _ in BLOCK.findall(page(name))} <= {"", "python", "json", "toml", "sh"}


def test_the_configuration_and_the_keys_in_the_docs_are_taken(tmp_path: Path) -> None:
    config, keys = blocks("docs/settings.md", "toml")
    settings = msgspec.convert(tomllib.loads(config), Settings)
    assert settings.server.aliases
    (tmp_path / "keys.toml").write_text(keys)
    loaded = file_keys(Settings(home=str(tmp_path)))
    assert [key.account for key in loaded] == ["alice", "reports"]


def test_the_import_arrows_hold() -> None:
    """`a, b ← c` in the architecture page: c may import a and b, a and b import neither each other nor c."""
    (line,) = (text for text in blocks("docs/architecture.md", "") if "←" in text)
    levels = {part.strip(): number for number, group in enumerate(line.split("←")) for part in group.split(",")}
    for name, tree in modules():
        part = Path(name).parts[1].removesuffix(".py")
        if part == "__init__":
            continue
        for target in imported(tree):
            if target and target != part:
                assert levels[target] < levels[part], f"{name} imports nimbos.{target}"


def imported(tree: ast.Module) -> Iterator[str]:
    """The parts of Nimbos that a module imports, also inside functions and for types."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "nimbos":
            dotted = [f"nimbos.{alias.name}" for alias in node.names if not alias.name.startswith("__")]
        elif isinstance(node, ast.ImportFrom):
            dotted = [node.module or ""]
        else:
            continue
        yield from (name.split(".")[1] for name in dotted if name.startswith("nimbos."))


# --- the README's examples


@pytest.fixture(scope="module")
def readme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, str]]:
    """A server with the README's own script, and a tiny model that makes vectors, by its name."""
    folder: Path = tmp_path_factory.mktemp("readme")
    (script,) = blocks("README.md", "json")
    vectors = tiny_gguf.write("qwen3-embedding", folder)
    engine = EngineSettings(threads=1, cells=2048, sequences=8)
    with serving(folder / "home", {"demo": json.loads(script)}, models=(vectors,), engine=engine) as running:
        yield running, vectors.stem


def test_the_python_examples_run_one_after_the_other(
    readme: tuple[Live, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    live, vectors = readme
    monkeypatch.setenv("NIMBOS_API_KEY", OWNER_SECRET)
    named: dict[str, Any] = {}
    examples = blocks("README.md", "python")
    for example in examples:
        here = example.replace("http://127.0.0.1:8000", live.url).replace("qwen3-embedding:0.6b", vectors)
        here = re.sub(r'"(smollm2:135m|qwen3:0\.6b)"', '"demo"', here)
        exec(compile(here, "README.md", "exec"), named)
    named["client"].close()
    named["claude"].close()
    printed = re.sub(r"\d{4}-\d\d-\d\d [\d:]+ \[.*\n", "", capsys.readouterr().out)  # the server's log, in between
    assert printed.count("I am a script, and I always say this.") == 4  # whole, streamed, Anthropic's, DashScope's
    assert len(examples) == 9
    for expected in (
        "I am a script, and I always say this.",
        "11 tokens",
        "It is 21 degrees in Paris.",
        "\nParis\n",
        "thought: 3 bags of 4 are 12, and 12 less 5 are 7.",
        "answer: Seven.",
        "0 ms in the queue",
        "2 vectors of 64",
        "11 tokens out",
    ):
        assert expected in printed


def test_the_curl_lines_run_as_pasted(readme: tuple[Live, str]) -> None:
    live, _ = readme
    lines = [text for name in ("README.md", "docs/api.md") for text in blocks(name, "sh") if text.startswith("curl ")]
    assert len(lines) == 2
    for line in lines:
        here = line.replace("http://127.0.0.1:8000", live.url).replace("smollm2:135m", "demo")
        done = subprocess.run(
            here,
            shell=True,
            env={**os.environ, "NIMBOS_API_KEY": OWNER_SECRET},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=True,
        )
        assert '"content":"I am a script' in done.stdout or '"content":"I"' in done.stdout
