"""Who there is and what they may: projects, users, service accounts, keys, sessions; and the audit log.

A removed user, service account or key and an archived project stay as rows, with the moment, so that usage and the
audit log always find a name. Secrets are kept as SHA-256 only. `live_name` is the name while the row is in force and
null afterwards, so that names are unique among the living alone.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, Index, LargeBinary, Table, Text, UniqueConstraint

from nimbos.db.tables.metadata import metadata

projects = Table(
    "projects",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organisation", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("live_name", Text),
    Column("model_mode", Text, nullable=False),  # "", allow_list, deny_list
    Column("models", Text, nullable=False),  # JSON: a list of ids
    Column("weight", Float, nullable=False),  # its share of the scheduler
    Column("created_ms", BigInteger, nullable=False),
    Column("archived_ms", BigInteger),
    UniqueConstraint("live_name"),
)

users = Table(
    "users",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organisation", Text, nullable=False),
    Column("email", Text, nullable=False),  # lower case
    Column("live_email", Text),
    Column("name", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("password_hash", Text),  # argon2id, with its parameters and salt
    Column("created_ms", BigInteger, nullable=False),
    Column("removed_ms", BigInteger),
    UniqueConstraint("live_email"),
)

memberships = Table(
    "memberships",
    metadata,
    Column("project_id", Text, primary_key=True),
    Column("user_id", Text, primary_key=True),
    Column("role", Text, nullable=False),
    Column("added_ms", BigInteger, nullable=False),
    Index(None, "user_id"),
)

service_accounts = Table(
    "service_accounts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("removed_ms", BigInteger),
    Index(None, "project_id"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),  # project, admin
    Column("project_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("live_name", Text),
    Column("digest", LargeBinary, nullable=False),
    Column("redacted", Text, nullable=False),
    Column("owner_kind", Text, nullable=False),  # user, service_account
    Column("owner_id", Text, nullable=False),
    Column("scopes", Text, nullable=False),  # JSON: a list
    Column("models", Text),  # JSON: a list; null: all
    Column("routes", Text),  # JSON: a list; null: all
    Column("weight", Float, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger),
    Column("revoked_ms", BigInteger),
    Column("last_used_ms", BigInteger),
    UniqueConstraint("digest"),
    UniqueConstraint("project_id", "live_name"),
    Index(None, "owner_id"),
)

sessions = Table(
    "sessions",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    Column("user_id", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Index(None, "user_id"),
)

# Append-only. `body` is stored as the very bytes that were hashed: SHA-256(prev_hash + body) is `hash`.
audit_log = Table(
    "audit_log",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("id", Text, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("action", Text, nullable=False),
    Column("actor_id", Text, nullable=False),
    Column("actor_email", Text, nullable=False),
    Column("project_id", Text, nullable=False),
    Column("target_id", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("prev_hash", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    UniqueConstraint("id"),
)

# The end of the chain: what the next row joins, and what tells that the last rows are missing. Locked by who appends.
audit_head = Table(
    "audit_head",
    metadata,
    Column("organisation", Text, primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("hash", LargeBinary, nullable=False),
)
