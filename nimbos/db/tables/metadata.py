"""The one collection of tables. A part declares its own in a file beside this one, on `metadata`.

Column types are Text, BigInteger, Integer, LargeBinary and Float only: they mean the same on both databases. Truth
values are 0 or 1, times `…_ms` since the epoch, money `…_micros`, JSON is text. Ids are text; no part refers to
another's rows by a foreign key.
"""

from __future__ import annotations

import importlib
import pkgutil

from sqlalchemy import MetaData

from nimbos.db import tables

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def all_tables() -> MetaData:
    """`metadata` once every part's file beside this one is imported: whoever makes or compares a schema needs all."""
    for module in pkgutil.iter_modules(tables.__path__):
        importlib.import_module(f"{tables.__name__}.{module.name}")
    return metadata
