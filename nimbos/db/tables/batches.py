"""Files that clients keep here, uploads that become files, and batches of requests that are answered from them.

A line of a batch is waiting until its answer, or the reason why there is none, is written; then its place in the
output or error file is settled. `unique_id` is the custom id while it is the first of its batch, so that each is
answered once.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, Table, Text, UniqueConstraint

from nimbos.db.tables.metadata import metadata

files = Table(
    "files",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("blob", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger),
    Index(None, "project", "id"),
    Index(None, "blob"),
    Index(None, "expires_ms"),
)

# Until its hour is over, whatever became of it: a client that did not get the answer asks for it again.
uploads = Table(
    "uploads",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),  # of all parts, as announced
    Column("file_expires_s", BigInteger),
    Column("state", Text, nullable=False),  # pending, completed, cancelled
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Column("file", Text),  # once it is completed
    Index(None, "expires_ms"),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("upload", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("blob", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Index(None, "upload"),
)

# Kept in the transaction that adds or removes a file, or a part of one, so that a quota costs one row.
file_totals = Table(
    "file_totals",
    metadata,
    Column("project", Text, primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("files", BigInteger, nullable=False),
)

batches = Table(
    "batches",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project", Text, nullable=False),
    Column("account", Text, nullable=False),  # JSON: whose key submitted it, as it was then
    Column("dialect", Text, nullable=False),  # openai, anthropic: whose routes show it
    Column("endpoint", Text, nullable=False),
    Column("input_file", Text, nullable=False),
    Column("input_blob", Text, nullable=False),
    Column("completion_window", Text, nullable=False),
    Column("metadata", Text),  # JSON: an object
    Column("output_expires_s", BigInteger),
    Column("state", Text, nullable=False),
    Column("ending", Text, nullable=False),  # "" while nothing ends it; completed, expired, cancelled
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Column("in_progress_ms", BigInteger),
    Column("finalizing_ms", BigInteger),
    Column("completed_ms", BigInteger),
    Column("failed_ms", BigInteger),
    Column("expired_ms", BigInteger),
    Column("cancelling_ms", BigInteger),
    Column("cancelled_ms", BigInteger),
    Column("errors", Text),  # JSON: why it failed
    Column("output_file", Text),
    Column("error_file", Text),
    Column("total", BigInteger, nullable=False),
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("validated_lines", BigInteger, nullable=False),
    Column("validated_bytes", BigInteger, nullable=False),
    Column("waiting_for", Text),  # the limit that holds it up: its message
    Column("waiting_until_ms", BigInteger, nullable=False),
    Index(None, "project", "id"),
    Index(None, "state", "id"),
    Index(None, "input_file"),
)

batch_lines = Table(
    "batch_lines",
    metadata,
    Column("batch", Text, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),  # of the line in the file, from 1
    Column("custom_id", Text),  # as the line says; null where it says none
    Column("unique_id", Text),
    Column("start_byte", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("state", Text, nullable=False),  # waiting, done, refused (answered with an error), failed (no answer)
    Column("status", Integer),
    Column("request_id", Text),
    Column("answer", LargeBinary),
    Column("error_code", Text),
    Column("error_message", Text),
    UniqueConstraint("batch", "unique_id"),
)
