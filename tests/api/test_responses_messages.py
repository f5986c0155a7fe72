"""Items as chat messages: one message of the assistant for each answer, and prompts that only grow."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nimbos.api.responses_fit import cuts, kept
from nimbos.api.responses_items import read_items, seal
from nimbos.api.responses_messages import messages_of

THOUGHT: dict[str, Any] = {
    "type": "reasoning",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "hm"}],
}
SAID: dict[str, Any] = {"role": "assistant", "content": "words"}
ASKED: dict[str, Any] = {"role": "user", "content": "hi"}
ORDER: dict[str, Any] = {"role": "developer", "content": "be kind"}
COMPACTED: dict[str, Any] = {"type": "compaction", "encrypted_content": seal("in short")}


def call(name: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": name, "name": name, "arguments": "{}"}


def result(name: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": name, "output": f"of {name}"}


def instructs(item: dict[str, Any]) -> bool:
    return item["type"] == "compaction" or item.get("role") == "developer"


def made(*items: dict[str, Any], instructions: str | None = None) -> list[dict[str, Any]]:
    return messages_of(read_items(list(items)), instructions=instructions)


def test_thinking_words_and_calls_of_one_answer_are_one_message() -> None:
    first, second, third, fourth = made(ASKED, THOUGHT, SAID, call("a"), call("b"), result("a"), result("b"))
    assert (first["role"], third["role"], fourth["role"]) == ("user", "tool", "tool")
    assert (second["reasoning_content"], second["content"]) == ("hm", "words")
    assert [one["id"] for one in second["tool_calls"]] == ["a", "b"]


def test_the_next_answer_begins_a_message_of_its_own() -> None:
    roles = [message["role"] for message in made(ASKED, call("a"), result("a"), THOUGHT, SAID, SAID)]
    assert roles == ["user", "assistant", "tool", "assistant", "assistant"]


def test_instructions_lead_and_a_compaction_instructs() -> None:
    messages = made(COMPACTED, ASKED, instructions="be kind")
    assert [(one["role"], one["content"]) for one in messages] == [
        ("system", "be kind"),
        ("system", "in short"),
        ("user", "hi"),
    ]


TURNS = st.lists(
    st.sampled_from(
        [
            (ASKED,),
            (ORDER,),
            (COMPACTED,),
            (THOUGHT, SAID),
            (SAID,),
            (call("a"), result("a")),
            (THOUGHT, call("b"), result("b")),
        ]
    ),
    min_size=1,
    max_size=8,
)


@given(TURNS, TURNS)
def test_what_comes_later_changes_no_earlier_message(earlier: list[Any], later: list[Any]) -> None:
    """So the next turn's prompt begins like the last one's, and is found in the cache."""
    before = [item for turn in earlier for item in turn] + [ASKED]
    after = before + [item for turn in later for item in turn]
    assert made(*after)[: len(made(*before))] == made(*before)


@given(TURNS)
def test_no_cut_parts_a_result_from_its_call_or_drops_an_instruction(turns: list[Any]) -> None:
    items = read_items([item for turn in turns for item in turn])
    orders = [item for item in items if instructs(item)]
    for start in cuts(items):
        left = kept(items, start)
        assert [item for item in left if instructs(item)] == orders
        assert len(left) < len(items) or start <= len(orders)
        for number, item in enumerate(left):
            if item["type"] == "function_call_output":
                calls = [one["call_id"] for one in left[:number] if one["type"] == "function_call"]
                assert item["call_id"] in calls
