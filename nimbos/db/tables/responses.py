"""Stored responses and conversations.

What was said is a tree of nodes that only grow: a node has some items and stands behind its parent, so a context is
the path from the root to a node, and n turns share their pasts instead of repeating them. Items name their bytes by
hash; the bytes are in `blobs`. Nobody counts references: a node goes when no child, response or conversation needs it
(`response_garbage` lists those to look at), a segment when no item or response names it. What a response repeats of its
request is an item, too, without an id and with the response in the place of the node, so that all that an account keeps
can be summed up; so is a conversation's metadata, with the conversation's id for a hash.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, Table, Text

from nimbos.db.tables.metadata import metadata

responses = Table(
    "responses",
    metadata,
    Column("id", Text, primary_key=True),
    Column("account", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("background", Integer, nullable=False),
    Column("conversation", Text),
    Column("input_node", Text),  # ends in what was asked; null: nothing was
    Column("output_node", Text),  # ends in what was answered; null: nothing was
    Column("output_items", Integer, nullable=False),  # how many of its last items are the answer
    Column("echo", Text, nullable=False),  # segment: the fields that repeat the request
    Column("body", Text, nullable=False),  # JSON: the other fields, without the output
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Index(None, "expires_ms"),
    Index(None, "input_node"),
    Index(None, "output_node"),
    Index(None, "echo"),
)

conversations = Table(
    "conversations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("account", Text, nullable=False),
    Column("metadata", Text, nullable=False),  # JSON
    Column("head", Text),  # node; null: it is empty
    Column("created_ms", BigInteger, nullable=False),
    Index(None, "head"),
)

response_nodes = Table(
    "response_nodes",
    metadata,
    Column("id", Text, primary_key=True),
    Column("account", Text, nullable=False),
    Column("parent", Text),
    Column("items_total", Integer, nullable=False),  # from the root to here
    Column("bytes_total", BigInteger, nullable=False),
    Index(None, "parent"),
)

response_items = Table(
    "response_items",
    metadata,
    Column("node", Text, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("account", Text, nullable=False),
    Column("item", Text, nullable=False),
    Column("hash", Text, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Index(None, "account", "item"),
    Index(None, "hash"),
)

response_segments = Table(
    "response_segments",
    metadata,
    Column("hash", Text, primary_key=True),
    Column("touched_ms", BigInteger, nullable=False),
    Column("free", Integer, nullable=False),  # 1: perhaps nothing names it any more
    Column("removing_ms", BigInteger),  # since when a sweeper removes the bytes
    Index(None, "free", "touched_ms"),
)

response_garbage = Table(
    "response_garbage",
    metadata,
    Column("node", Text, primary_key=True),
)

response_events = Table(
    "response_events",
    metadata,
    Column("response", Text, primary_key=True),
    Column("first", Integer, primary_key=True),  # sequence numbers [first, last]
    Column("last", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),  # MessagePack: a list of encoded events
    Column("at_ms", BigInteger, nullable=False),
    Index(None, "at_ms"),
)
