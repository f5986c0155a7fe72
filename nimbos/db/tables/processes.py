"""Heads of processes, which say what the fold of each log says, for lists and for who comes from outside; mailboxes.

The log (`kernel.py` beside this) is the truth: a head is written in the transaction that appends to it, and could be
made from it again. A signal's row stays after it was taken, so that the same one is never received twice.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, Table, Text, UniqueConstraint, text

from nimbos.db.tables.metadata import metadata

processes = Table(
    "processes",
    metadata,
    Column("id", Text, primary_key=True),
    Column("account", Text, nullable=False),  # the project that pays
    Column("spawner", Text, nullable=False),  # JSON: the account, with the key that spawned it
    Column("spawn_key", Text),  # null: it was made without one
    Column("program", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("ask_class", Text, nullable=False),
    Column("parent", Text),
    Column("depth", Integer, nullable=False),
    Column("detached", Integer, nullable=False),
    Column("withheld", Integer, nullable=False),  # 1: a fork, or a child of one, that is not adopted
    Column("forked_from", Text),
    Column("forked_seq", BigInteger, nullable=False),  # 0: it is no fork
    Column("state", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("due_ms", BigInteger),  # a timer wakes it
    Column("about", Text, nullable=False),  # JSON array: what it waits for, or asked last
    Column("asked_seq", BigInteger, nullable=False),  # the event with which it asked last; 0: never
    Column("epoch", BigInteger, nullable=False),  # how often it was claimed
    Column("seq", BigInteger, nullable=False),
    Column("hash", Text, nullable=False),
    Column("result", Text),  # segment
    Column("error", Text, nullable=False),
    Column("used", Text, nullable=False),  # JSON: by meter
    Column("mail", BigInteger, nullable=False),  # signals that were ever put into its mailbox
    Column("taken", BigInteger, nullable=False),  # those of them that the process has received
    Column("created_ms", BigInteger, nullable=False),
    Column("changed_ms", BigInteger, nullable=False),
    UniqueConstraint("account", "spawn_key"),
    Index(None, "account", "id"),
    Index(None, "parent"),
    Index(None, "forked_from"),
    Index(None, "state", "id"),
)
Index(
    "ix_processes_living",
    processes.c.account,
    processes.c.id,
    sqlite_where=text("state != 'done'"),
    postgresql_where=text("state != 'done'"),
)
Index(
    "ix_processes_due",
    processes.c.due_ms,
    sqlite_where=text("due_ms IS NOT NULL"),
    postgresql_where=text("due_ms IS NOT NULL"),
)

process_mailbox = Table(
    "process_mailbox",
    metadata,
    Column("process", Text, primary_key=True),
    # From 1, dense; those up to `processes.taken` were received. 0 is no signal: its `at_ms` says how many messages
    # were received and not consumed.
    Column("position", BigInteger, primary_key=True),
    Column("source", Text, nullable=False),
    Column("external_id", Text, nullable=False),
    Column("signal", Text, nullable=False),
    Column("about", Text, nullable=False),
    Column("body", Text),  # segment
    Column("reason", Text, nullable=False),  # of a child's exit: how it ended
    Column("after_seq", BigInteger, nullable=False),  # the head's, when it came
    Column("at_ms", BigInteger, nullable=False),
    UniqueConstraint("process", "source", "external_id"),
)
