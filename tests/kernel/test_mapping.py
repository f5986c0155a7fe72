"""The table of states: every state and reason of the kernel has its name in A2A and in MCP."""

from __future__ import annotations

import pytest

from nimbos.kernel.mapping import a2a_state, mcp_state
from nimbos.kernel.words import REASONS, Reason, State

# state, reason: A2A before it ever ran, A2A afterwards, MCP
TABLE = {
    (State.READY, Reason.NONE): ("SUBMITTED", "WORKING", "working"),
    (State.RUNNING, Reason.NONE): ("SUBMITTED", "WORKING", "working"),
    (State.WAITING, Reason.MODEL): ("SUBMITTED", "WORKING", "working"),
    (State.WAITING, Reason.TOOL): ("SUBMITTED", "WORKING", "working"),
    (State.WAITING, Reason.CHILD): ("SUBMITTED", "WORKING", "working"),
    (State.WAITING, Reason.TIMER): ("SUBMITTED", "WORKING", "working"),
    (State.WAITING, Reason.SIGNAL): ("SUBMITTED", "WORKING", "working"),
    (State.ASKING, Reason.INPUT): ("INPUT_REQUIRED", "INPUT_REQUIRED", "input_required"),
    (State.ASKING, Reason.PERMISSION): ("INPUT_REQUIRED", "INPUT_REQUIRED", "input_required"),
    (State.ASKING, Reason.AUTH): ("AUTH_REQUIRED", "AUTH_REQUIRED", "input_required"),
    (State.ASKING, Reason.BUDGET): ("INPUT_REQUIRED", "INPUT_REQUIRED", "input_required"),
    (State.ASKING, Reason.IN_DOUBT): ("INPUT_REQUIRED", "INPUT_REQUIRED", "input_required"),
    (State.PAUSED, Reason.USER): ("SUBMITTED", "WORKING", "working"),
    (State.PAUSED, Reason.POLICY): ("SUBMITTED", "WORKING", "working"),
    (State.PAUSED, Reason.SHUTDOWN): ("SUBMITTED", "WORKING", "working"),
    (State.DONE, Reason.OK): ("COMPLETED", "COMPLETED", "completed"),
    (State.DONE, Reason.FAILED): ("FAILED", "FAILED", "failed"),
    (State.DONE, Reason.CANCELLED): ("CANCELED", "CANCELED", "cancelled"),
    (State.DONE, Reason.KILLED): ("CANCELED", "CANCELED", "cancelled"),
    (State.DONE, Reason.REJECTED): ("REJECTED", "REJECTED", "failed"),
}


def test_the_table_knows_every_state_with_its_reasons() -> None:
    assert set(TABLE) == {(state, reason) for state, reasons in REASONS.items() for reason in reasons}


@pytest.mark.parametrize(("state", "reason"), sorted(TABLE))
def test_a_state_has_its_name_elsewhere(state: State, reason: Reason) -> None:
    fresh, begun, mcp = TABLE[state, reason]
    assert a2a_state(state, reason, begun=False) == f"TASK_STATE_{fresh}"
    assert a2a_state(state, reason, begun=True) == f"TASK_STATE_{begun}"
    assert mcp_state(state, reason) == mcp


@pytest.mark.parametrize(
    ("state", "reason"), [(State.DONE, Reason.NONE), (State.READY, Reason.USER), (State.ASKING, Reason.TIMER)]
)
def test_a_reason_of_another_state_is_a_bug_of_ours(state: State, reason: Reason) -> None:
    with pytest.raises(AssertionError):
        a2a_state(state, reason, begun=True)
    with pytest.raises(AssertionError):
        mcp_state(state, reason)
