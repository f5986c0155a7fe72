"""The database: SQLite by default, PostgreSQL by URL, one code path for both.

A part declares its tables (`tables/`), its statements and its transactions, which are plain generators; `Database` runs
them. Read `statements.py`, then `database.py`.
"""

from nimbos.db.database import Database
from nimbos.db.statements import (
    Bound,
    Dialect,
    ManyRows,
    Row,
    Statement,
    Transaction,
    Value,
    insert,
    insert_ignored,
    upsert,
)

__all__ = [
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
]
