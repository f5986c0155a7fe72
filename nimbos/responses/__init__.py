"""State of the Responses API: what was said, in a tree of shared pasts, and answers that are made in the background.
Read `store.py` first, then `nodes.py`."""

from nimbos.responses.background import Background
from nimbos.responses.conversations import Conversation, Conversations
from nimbos.responses.ending import Ending
from nimbos.responses.journal import Live
from nimbos.responses.nodes import Placed
from nimbos.responses.store import Answered, Kept, Past, Piece, Status, Store

__all__ = [
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
]
