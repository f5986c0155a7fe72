"""The house rules that a reader relies on, held on the syntax tree: which package may know which, what a package
shows, that importing does no work, that errors are not swallowed, and that only the command line prints."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "nimbos"
FILES = sorted(ROOT.rglob("*.py"))

# Each layer may import those before it, and its members not each other. New packages are placed here.
LAYERS = (
    ("__init__",),
    ("errors",),
    ("types", "integers", "toolwire"),
    ("config", "meterfile", "keeper"),
    ("db",),
    ("blobs", "keys", "presence"),
    ("accounts", "ledger", "work", "engine", "chat", "meters", "telemetry", "watching"),
    ("hub",),
    ("cloud", "sources"),
    ("service", "models"),
    ("kernel", "evals", "batches", "responses"),
    ("adk", "store"),
    ("runtime",),
    ("api",),
    ("server",),
    ("cli",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

DOORS = {
    "accounts": {
        "CODE_SCOPE",
        "Accounts",
        "Action",
        "Actor",
        "Authority",
        "Identity",
        "ProjectRole",
        "Role",
        "allowed_classes",
        "allowed_model",
        "allowed_route",
        "project_weights",
    },
    "adk": {
        "BadTool",
        "Child",
        "Client",
        "Ended",
        "Field",
        "Happened",
        "Message",
        "Process",
        "Program",
        "Refused",
        "Seen",
        "StepFailed",
        "Tool",
        "ask",
        "call",
        "child",
        "each",
        "gather",
        "read_program",
        "receive",
        "send",
        "sleep",
        "spawn",
        "think",
        "tool",
        "wait",
    },
    "batches": {
        "TEST_MODEL",
        "AnswerJournal",
        "Batch",
        "Batches",
        "Endpoint",
        "Fault",
        "File",
        "Part",
        "Perform",
        "Refuse",
        "Reply",
        "State",
        "Upload",
        "UploadState",
        "rehearsal_source",
    },
    "api": {"build", "build_ollama"},
    "blobs": {"Aged", "Blobs", "Stored", "hash_of", "open_blobs"},
    "chat": {
        "DIAL_FIELDS",
        "LEVEL_TOKENS",
        "MAX_PROMPT_CHARACTERS",
        "Chat",
        "ChatRequest",
        "ContentDelta",
        "Delta",
        "Dial",
        "FoldedMessage",
        "Plan",
        "ReasoningDelta",
        "Splitter",
        "ToolCall",
        "ToolCallDelta",
        "fold",
    },
    "db": {
        "Bound",
        "Database",
        "Dialect",
        "ManyRows",
        "Row",
        "Statement",
        "Transaction",
        "Value",
        "insert",
        "insert_ignored",
        "upsert",
    },
    "engine": {"STEP_BUCKETS_S", "Engine", "EngineStats"},
    "hub": {"Gguf", "Hub", "LocalModel", "ModelFacts", "NativeLibrary", "Progress", "read_gguf"},
    "kernel": {
        "A2aState",
        "Allowance",
        "Asked",
        "Cost",
        "Delta",
        "Event",
        "Folded",
        "Head",
        "Kernel",
        "Left",
        "Listed",
        "McpState",
        "Program",
        "Programs",
        "Reason",
        "Replayed",
        "Said",
        "SignalKind",
        "State",
        "Verdict",
        "a2a_state",
        "asks_of",
        "mcp_state",
        "pack",
        "read_folder",
        "release_dead",
        "unpack",
    },
    "ledger": {
        "PAGE_MOST",
        "ROWS",
        "ROWS_MOST",
        "Alert",
        "Allowance",
        "Attempt",
        "Attempts",
        "Budget",
        "Desk",
        "Extended",
        "Fired",
        "Journal",
        "Ledger",
        "Limit",
        "Price",
        "PriceTable",
        "ProcessUse",
        "Progress",
        "Recovery",
        "Report",
        "Reserved",
        "Running",
        "Settled",
        "Settlement",
        "Span",
        "Spent",
        "UsageRow",
        "Used",
        "add_alert",
        "alerts_of",
        "all_budgets",
        "all_limits",
        "budgets_of",
        "change_alert",
        "current_table",
        "export_asks",
        "family_use",
        "find_alert",
        "find_budget",
        "limits_of",
        "remove_alert",
        "remove_budget",
        "set_budget",
        "set_limit",
        "set_prices",
        "spent",
        "usage",
        "usage_buckets",
        "with_what_is_paid",
    },
    "responses": {
        "Answered",
        "Background",
        "Conversation",
        "Conversations",
        "Ending",
        "Kept",
        "Live",
        "Past",
        "Piece",
        "Placed",
        "Status",
        "Store",
    },
    "work": {"LEASE_S", "Claim", "ClaimLost", "Crew", "Work", "shares_of", "until_written"},
}

# Who reaches past a door, and to what: commands that look inside, and the scripted source, which is not an engine.
PAST_DOORS = {
    ("batches", "engine"): {"script", "scripted"},
    ("accounts", "db"): {"tables"},
    ("adk", "kernel"): {"manifest", "package", "program"},
    ("api", "accounts"): {"audit", "keys", "login", "people", "projects", "roles", "secret", "words"},
    ("cli", "accounts"): {"words"},
    ("cli", "api"): {"access", "admin", "ollama_key"},
    ("cli", "engine"): {"calibrate", "confine", "engine", "library", "llama", "memo", "model", "scripted"},
    ("cli", "hub"): {"catalog", "memory", "progress", "reading"},
    ("kernel", "ledger"): {"allowances"},
    ("models", "engine"): {"scripted"},
    ("runtime", "engine"): {"scripted"},
    ("server", "api"): {"access", "protocol"},
    ("sources", "engine"): {"scripted"},
    ("sources", "hub"): {"reading"},
}

# What may be called while a module is imported: it builds a value, and reads, starts or registers nothing.
PURE = {
    "ContextVar",
    "ManyRows",
    "ParamSpec",
    "Path",
    "TypeVar",
    "auto",
    "bytes",
    "codecs.getincrementaldecoder",
    "ctypes.CFUNCTYPE",
    "dataclass",
    "field",
    "float",
    "frozenset",
    "get_args",
    "hashlib.sha256",
    "json.JSONDecoder",
    "len",
    "lru_cache",
    "msgspec.Meta",
    "msgspec.Raw",
    "msgspec.field",
    "msgspec.json.Decoder",
    "msgspec.json.Encoder",
    "msgspec.msgpack.Decoder",
    "msgspec.msgpack.Encoder",
    "range",
    "re.compile",
    "struct.Struct",
    "structlog.get_logger",
    "tuple",
    "typer.Argument",
}
PURE_METHODS = {"encode", "hexdigest", "split", "to_bytes"}
COMMAND_TREE = {
    "typer.Typer",
    "app.callback",
    "app.command",
    "app.command()",
    "batch.register",
    "budget.register",
    "forking.register",
    "key.register",
    "limit.register",
    "models.register",
    "native.register",
    "organisation.register",
    "processes.register",
    "programs.register",
    "signalling.register",
    "usage.register",
}

# Loop tops: they log the traceback and fail the one request. Every other broad `except` ends by raising again, or is
# around a library that raises plain `Exception`, and raises ours from it.
LOOP_TOPS = {
    "adk/worker.py:_perform",  # what a program's own code raises is its result
    "adk/worker.py:_plainly",
    "adk/worker.py:_run",
    "db/writer.py:_perform",
    "engine/worker.py:_prepare_one",
    "engine/loop.py:_sample",
    "api/errors.py:__call__",
    "api/sse.py:_pump",
    "kernel/timers.py:_wake",
    "work/crew.py:_do",
}
PLAIN_EXCEPTIONS = {"adk/loading.py:_module", "engine/grammar.py:_lark_from_gbnf"}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def part_of(file: Path) -> str:
    """The package, or the module for those that stand alone."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), filename=str(file))


@pytest.fixture(scope="module", autouse=True)
def trees_are_let_go() -> Iterator[None]:
    """Each is parsed once, and all together are a few hundred megabytes."""
    yield
    tree_of.cache_clear()


def imports_of(file: Path) -> Iterator[tuple[str, ...]]:
    """Modules of Nimbos that a file imports anywhere, also for types only, without the leading `nimbos`."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, *rest = name.split(".")
            if root == "nimbos":
                yield tuple(rest)


def test_the_tree_was_found_and_every_part_has_a_layer() -> None:
    assert len(FILES) > 50
    assert {part_of(file) for file in FILES} - RANK.keys() == set()


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_one_way(file: Path) -> None:
    own = part_of(file)
    wrong = []
    for path in imports_of(file):
        other = path[0] if path and path[0] in RANK else "__init__"
        if other != own and RANK[other] >= RANK[own]:
            wrong.append(other)
    assert wrong == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_doors_are_walked_around_only_where_it_is_listed(file: Path) -> None:
    own = part_of(file)
    for path in imports_of(file):
        if len(path) < 2 or path[0] == own or path[0] not in DOORS:
            continue
        package, inner = path[0], path[1]
        if (package, inner) == ("db", "tables"):
            continue  # every part's tables are a file there, which is the part's own
        if inner not in DOORS[package]:
            assert inner in PAST_DOORS.get((own, package), set()), f"{package}.{inner}"


@pytest.mark.parametrize("package", sorted(DOORS))
def test_a_package_shows_its_door_and_nothing_else(package: str) -> None:
    tree = tree_of(ROOT / package / "__init__.py")
    shown: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            shown = set(ast.literal_eval(node.value))
    assert shown == DOORS[package]
    own = {alias.name for path, alias in _from_imports(tree) if path.startswith("nimbos.")}
    assert own == shown
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert defined <= {"__getattr__"}  # for what is loaded only when it is asked for


def test_every_package_has_a_door() -> None:
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert packages == DOORS.keys() | {"cli"}  # whose door is the command itself


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_importing_does_no_work(file: Path) -> None:
    tree = tree_of(file)
    statement_words = _statement_words(tree)
    allowed = PURE | _own_values(tree) | (COMMAND_TREE if name_of(file) == "cli/__init__.py" else set())
    for call in _calls_at_import(tree):
        name = ast.unparse(call.func)
        method = isinstance(call.func, ast.Attribute) and call.func.attr in PURE_METHODS
        statement = _root_of(call.func) in statement_words
        assert name in allowed or method or statement, f"{name_of(file)}:{call.lineno}: {name}"


@pytest.mark.parametrize("file", [file for file in FILES if part_of(file) != "cli"], ids=name_of)
def test_only_the_command_line_prints(file: Path) -> None:
    printing = [
        node.lineno
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert printing == []


def test_broad_excepts_stand_at_loop_tops_or_raise_again() -> None:
    swallowed, mapped = set(), set()
    for file in FILES:
        for function in ast.walk(tree_of(file)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{name_of(file)}:{function.name}"
                for handler in filter(_is_broad, _own_handlers(function)):
                    last = handler.body[-1]
                    if not isinstance(last, ast.Raise):
                        swallowed.add(where)
                    elif last.exc is not None:
                        mapped.add(where)
    assert swallowed == LOOP_TOPS
    assert mapped == PLAIN_EXCEPTIONS


def _from_imports(tree: ast.Module) -> Iterator[tuple[str, ast.alias]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.module or "", alias


def _own_values(tree: ast.Module) -> set[str]:
    """Names of classes that are defined here or imported from Nimbos: making one is making a value, as classes that
    do work when they are made are made in functions."""
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    imported = {alias.name for path, alias in _from_imports(tree) if path.startswith("nimbos.")}
    return {name for name in classes | imported if name[:1].isupper()}


def _statement_words(tree: ast.Module) -> set[str]:
    """Names of what declares tables and statements, which are values: from SQLAlchemy, the database and its tables."""
    homes = ("sqlalchemy", "nimbos.db")
    imported = {alias.asname or alias.name for path, alias in _from_imports(tree) if path.startswith(homes)}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.returns is not None]
    made = re.compile(r"Column|Statement|BindParameter")
    return imported | {node.name for node in functions if made.search(ast.unparse(node.returns or node))}


def _root_of(expression: ast.expr) -> str:
    """The name that a chain of calls and attributes starts with: `select` of `select(…).where`."""
    while isinstance(expression, ast.Attribute | ast.Call):
        expression = expression.func if isinstance(expression, ast.Call) else expression.value
    return expression.id if isinstance(expression, ast.Name) else ""


def _calls_at_import(tree: ast.AST) -> Iterator[ast.Call]:
    """Not inside functions, but their decorators and defaults; not under `if __name__ == "__main__"`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            early = [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]
            for part in early:
                yield from (call for call in ast.walk(part) if isinstance(call, ast.Call))
            continue
        if isinstance(node, ast.Call):
            yield node
        yield from _calls_at_import(node)


def _own_handlers(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.ExceptHandler]:
    """Not those of functions inside it."""
    left: list[ast.AST] = list(function.body)
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.ExceptHandler):
            yield node
        left.extend(ast.iter_child_nodes(node))


def _is_broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)
