"""Contents that are kept in the database (`storage.blobs = "database"`), in pieces.

A content that is coming in has a row in `blob_uploads` until it is whole; its pieces belong to the upload, and its
hash, which is known only at the end, names the upload.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, Table, Text

from nimbos.db.tables.metadata import metadata

blobs = Table(
    "blobs",
    metadata,
    Column("hash", Text, primary_key=True),  # SHA-256 of the content, in hexadecimal
    Column("upload", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
)

blob_pieces = Table(
    "blob_pieces",
    metadata,
    Column("upload", Text, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),  # from 0; all but the last are equally long
    Column("content", LargeBinary, nullable=False),
)

blob_uploads = Table(
    "blob_uploads",
    metadata,
    Column("id", Text, primary_key=True),
    Column("started_ms", BigInteger, nullable=False),
)
