"""Every statement of batches, files and work compiles for both databases."""

from __future__ import annotations

from types import ModuleType

import pytest

from nimbos.batches import files, rows
from nimbos.db import Dialect, Statement
from nimbos.work import claims


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
@pytest.mark.parametrize("module", [files, rows, claims], ids=lambda module: module.__name__)
def test_statements_compile(module: ModuleType, dialect: Dialect) -> None:
    values = [*vars(module).values(), *getattr(module, "MOVE", {}).values()]
    statements = [value for value in values if isinstance(value, Statement)]
    assert statements
    for statement in statements:
        assert statement.compiled(dialect).text
