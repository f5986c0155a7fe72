"""A context as memory: which segments a model is shown, in which order, and what goes when the window fills. Pure, but
for `load`.

    system · goal (pinned) · … · turns, oldest first          only the end changes, so what was computed of it stays

A turn is an assistant's message with the results of its calls; they come and go together. When the window is full, the
oldest turns that hold nothing pinned are evicted down to a low-water mark, far enough that it does not happen again
with the next turn, and a view in their place says in the model's own words what they were. What was evicted stays in
the log, and the view's handle lets the model read it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nimbos.errors import InvalidRequest
from nimbos.kernel.events import CallWanted, Segment
from nimbos.kernel.segments import Segments

Message = dict[str, Any]

VIEW = "view."  # how the ids of views begin
LOW_WATER = 0.5  # of the room, after an eviction
SUMMARY_SHARE = 8  # a summary takes at most this part of the room
SUMMARY_TOKENS_MAX = 512
ANSWER_SHARE, ANSWER_TOKENS_MAX = 4, 1_024  # kept free for an answer whose length nobody limits
_BYTES_PER_TOKEN = 3  # a rough guess that is rather too low: few texts have more tokens than that
_TOKENS_PER_MESSAGE = 8  # of the template around it
_SHOWN_BYTES = 2_000  # of one message, to whoever summarises it

SUMMARY_ORDER = (
    "Below is the earlier part of your own work, which no longer fits into your window. Write down, in your own words "
    "and as briefly as you can, what you must still know: what was asked and decided, facts and numbers that were "
    "found, what was tried and failed, what is promised and still open. Write nothing else."
)


class ContextFull(InvalidRequest):
    """What may not be evicted alone fills the window."""

    def __init__(self, *, have: int, room: int) -> None:
        super().__init__(
            f"The context has {have} tokens and there is room for {room}, and all of it is pinned or of the last turn. "
            "Use a model with a larger window, pin less, or let the tools return less."
        )
        self.have = have
        self.room = room


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """`tokens`: of the model, as far as the program uses them. `answer_tokens`: kept free for the answer."""

    tokens: int
    answer_tokens: int

    @property
    def room(self) -> int:
        """For the prompt."""
        return self.tokens - self.answer_tokens

    @property
    def summary_tokens(self) -> int:
        return max(16, min(SUMMARY_TOKENS_MAX, self.room // SUMMARY_SHARE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction:
    """`covered`: what goes, in order."""

    covered: tuple[Segment, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(segment.id for segment in self.covered)

    @property
    def of_a_view(self) -> bool:
        """There is nothing else: its words are what is too long, and words for it would be as long."""
        return len(self.covered) == 1 and self.covered[0].kind == "view"


def window_of(model_tokens: int, wanted_tokens: int, max_tokens: int | None) -> Window:
    """`wanted_tokens`: what the program uses of the model's window, 0 for all."""
    tokens = min(model_tokens, wanted_tokens or model_tokens)
    answer = max_tokens if max_tokens is not None else ANSWER_TOKENS_MAX
    return Window(tokens=tokens, answer_tokens=max(1, min(answer, tokens // ANSWER_SHARE)))


def estimate(content: bytes) -> int:
    """Tokens of a message, without asking the model."""
    return len(content) // _BYTES_PER_TOKEN + _TOKENS_PER_MESSAGE


def tokens_of(context: Sequence[Segment]) -> int:
    return sum(segment.tokens for segment in context)


def turns_of(context: Sequence[Segment]) -> list[list[Segment]]:
    """What comes and goes together: an assistant's message with the results of its calls, whatever was noted between
    them; anything else alone."""
    turns: list[list[Segment]] = []
    speaking: list[Segment] | None = None
    for segment in context:
        if segment.kind == "tool" and speaking is not None:
            speaking.append(segment)
            continue
        turns.append([segment])
        speaking = turns[-1] if segment.kind == "assistant" else speaking
    return turns


def plan_eviction(context: Sequence[Segment], *, have_tokens: int, room_tokens: int) -> Eviction | None:
    """What must go so that the context fits well again; None where it fits. `have_tokens`: of the whole prompt, as
    counted; what the segments say of themselves is only used to share it out.

    Raises: ContextFull.
    """
    if have_tokens <= room_tokens:
        return None
    turns = turns_of(context)
    scale = have_tokens / max(1, tokens_of(context))
    left, covered = float(have_tokens), list[Segment]()
    for turn in turns[:-1]:  # the last one is what it works on
        if left <= room_tokens * LOW_WATER:
            break
        if _stays(turn):
            continue
        left -= scale * tokens_of(turn)
        covered += turn
    if not covered or left > room_tokens or _is_bare(covered):
        raise ContextFull(have=have_tokens, room=room_tokens)
    return Eviction(covered=tuple(covered))


def _is_bare(covered: Sequence[Segment]) -> bool:
    """A view that stands for a view alone: it has no words any more, and nothing shorter could take its place."""
    return len(covered) == 1 and len(covered[0].covers) == 1 and covered[0].covers[0].startswith(VIEW)


def _stays(turn: Sequence[Segment]) -> bool:
    return any(segment.pinned or segment.kind in ("system", "goal") for segment in turn)


async def load(segments: Segments, account: str, context: Sequence[Segment]) -> list[Message]:
    """The messages of a context, results right behind their calls. What the user's side says in a row is one message,
    as templates want it.

    Raises: NotFound, StorageUnavailable.
    """
    messages: list[Message] = []
    for segment in (segment for turn in turns_of(context) for segment in turn):
        message = await segments.get(account, segment.hash)
        if message["role"] == "user" and messages and messages[-1]["role"] == "user":
            messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{message['content']}"}
        else:
            messages.append(message)
    return messages


def summary_request(messages: Sequence[Message]) -> list[Message]:
    """What the model is asked so that it writes the view."""
    return [{"role": "user", "content": f"{SUMMARY_ORDER}\n\n{transcript(messages, shown_bytes=_SHOWN_BYTES)}"}]


def transcript(messages: Sequence[Message], *, shown_bytes: int | None = None) -> str:
    """As plain text: what a view's handle leads to. `shown_bytes`: of each message, then only its head."""
    return "\n\n".join(_told(message, shown_bytes) for message in messages)


def view_text(summary: str, *, covered: int, handle: str, whole_bytes: int) -> str:
    """`summary` "": there is none, and the model is only told that something is missing."""
    words = summary.strip() or "(There is no summary of it.)"
    return (
        f"[{covered} earlier messages are no longer shown. What you noted of them:]\n{words}\n"
        f'[`read` with {{"handle": "{handle}"}} shows them whole, {whole_bytes} bytes.]'
    )


def assistant_message(text: str, thinking: str, calls: Sequence[CallWanted]) -> Message:
    """In OpenAI's shape."""
    message: Message = {"role": "assistant", "content": text}
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message


def _told(message: Message, shown_bytes: int | None) -> str:
    words = str(message.get("content") or "")
    for call in message.get("tool_calls", ()):
        function = call["function"]
        words += f"\n→ {function['name']}({function['arguments']})"
    raw = words.strip().encode("utf-8", "replace")
    if shown_bytes is not None and len(raw) > shown_bytes:
        words = raw[:shown_bytes].decode("utf-8", "ignore") + " …"
    return f"{message['role']}: {words.strip()}"
