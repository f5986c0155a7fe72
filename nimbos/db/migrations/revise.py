"""Writes the next revision from what changed in `tables/`: `python -m nimbos.db.migrations.revise WHAT_CHANGES`.

For those who develop Nimbos. Read what it wrote: rows that need other values, and columns that change, are yours to
add. SQLite cannot change a column; there, give `op.batch_alter_table` the table as it was (`copy_from`), as nothing is
connected when the statements are written. Then set `HEAD` in `schema.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from alembic.autogenerate import produce_migrations, render_python_code
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine

from nimbos.db.schema import HEAD, VERSION_TABLE, upgrade
from nimbos.db.tables.metadata import all_tables

_REVISION = '''"""{title}."""

import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = {before}


def upgrade() -> None:
    {body}
'''


def revise(name: str, *, start: str | None = HEAD) -> Path:
    """The file that was written. `start`: the revision to go on from; None writes the first."""
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        for statement in upgrade(None, "sqlite") if start is not None else ():
            connection.exec_driver_sql(statement)
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        operations = produce_migrations(context, all_tables()).upgrade_ops
    assert operations is not None
    body = render_python_code(operations, render_as_batch=False)
    body = "\n".join(line for line in body.splitlines() if not line.strip().startswith("#")).strip()
    revision = f"{int(start or 0) + 1:04}"
    text = _REVISION.format(
        title=name.replace("_", " ").capitalize(),
        revision=revision,
        before=f'"{start}"' if start is not None else None,
        body=body,
    )
    file = Path(__file__).parent / "versions" / f"{revision}_{name}.py"
    file.write_text(text)
    return file


if __name__ == "__main__":
    revise(sys.argv[1])
