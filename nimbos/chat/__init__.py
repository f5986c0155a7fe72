"""Messages in, prompts out; chunks in, messages out. Read `chat.py` first."""

from nimbos.chat.chat import Chat
from nimbos.chat.deltas import ContentDelta, Delta, FoldedMessage, ReasoningDelta, ToolCall, ToolCallDelta, fold
from nimbos.chat.dial import DIAL_FIELDS, LEVEL_TOKENS, Dial
from nimbos.chat.plan import ChatRequest, Plan
from nimbos.chat.splitter import Splitter
from nimbos.chat.template import MAX_PROMPT_CHARACTERS

__all__ = [
    "DIAL_FIELDS",
    "LEVEL_TOKENS",
    "MAX_PROMPT_CHARACTERS",
    "Chat",
    "ChatRequest",
    "ContentDelta",
    "Delta",
    "Dial",
    "FoldedMessage",
    "Plan",
    "ReasoningDelta",
    "Splitter",
    "ToolCall",
    "ToolCallDelta",
    "fold",
]
