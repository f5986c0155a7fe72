"""What others call the states of a process: the task states of A2A 1.0 and of MCP (2026-07-28, tasks). Pure.

Both know fewer states than the kernel. What waits by itself is work; whatever only a person can give is a required
input, and both protocols can say so. Killed is cancelled to them: somebody ended it.
"""

from __future__ import annotations

from enum import StrEnum

from nimbos.kernel.words import REASONS, Reason, State


class A2aState(StrEnum):
    """As A2A's JSON writes them."""

    SUBMITTED = "TASK_STATE_SUBMITTED"
    WORKING = "TASK_STATE_WORKING"
    INPUT_REQUIRED = "TASK_STATE_INPUT_REQUIRED"
    AUTH_REQUIRED = "TASK_STATE_AUTH_REQUIRED"
    COMPLETED = "TASK_STATE_COMPLETED"
    FAILED = "TASK_STATE_FAILED"
    CANCELED = "TASK_STATE_CANCELED"
    REJECTED = "TASK_STATE_REJECTED"


class McpState(StrEnum):
    WORKING = "working"
    INPUT_REQUIRED = "input_required"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


_A2A_ENDS = {
    Reason.OK: A2aState.COMPLETED,
    Reason.FAILED: A2aState.FAILED,
    Reason.CANCELLED: A2aState.CANCELED,
    Reason.KILLED: A2aState.CANCELED,
    Reason.REJECTED: A2aState.REJECTED,
}
_MCP_ENDS = {
    Reason.OK: McpState.COMPLETED,
    Reason.FAILED: McpState.FAILED,
    Reason.CANCELLED: McpState.CANCELLED,
    Reason.KILLED: McpState.CANCELLED,
    Reason.REJECTED: McpState.FAILED,
}


def a2a_state(state: State, reason: Reason, *, begun: bool) -> A2aState:
    """`begun`: some server has run it. `reason` is one of the state's."""
    assert reason in REASONS[state]
    if state is State.DONE:
        return _A2A_ENDS[reason]
    if state is State.ASKING:
        return A2aState.AUTH_REQUIRED if reason is Reason.AUTH else A2aState.INPUT_REQUIRED
    return A2aState.WORKING if begun else A2aState.SUBMITTED


def mcp_state(state: State, reason: Reason) -> McpState:
    """`reason` is one of the state's."""
    assert reason in REASONS[state]
    if state is State.DONE:
        return _MCP_ENDS[reason]
    return McpState.INPUT_REQUIRED if state is State.ASKING else McpState.WORKING
