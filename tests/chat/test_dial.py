"""One dial for every dialect."""

from typing import Any

import pytest

from nimbos.chat import LEVEL_TOKENS, Dial
from nimbos.chat.thinking import decide, resolve
from nimbos.errors import InvalidRequest

WINDOW = 40_000


@pytest.mark.parametrize(
    ("fields", "dial"),
    [
        ({}, Dial()),
        ({"temperature": 1, "reasoning_effort": None}, Dial()),
        ({"enable_thinking": True}, Dial(switch=True)),
        ({"enable_thinking": "auto"}, Dial(switch="auto")),
        ({"enable_thinking": True, "thinking_budget": 50}, Dial(switch=True, budget=50)),
        ({"thinking_token_budget": 7}, Dial(budget=7)),
        ({"reasoning_budget_tokens": 7}, Dial(budget=7)),
        ({"thinking_budget_tokens": 0}, Dial(budget=0)),
        ({"reasoning_effort": "xhigh"}, Dial(level="xhigh")),
        ({"reasoning_effort": "auto"}, Dial(switch="auto")),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, Dial(level="low")),
        ({"reasoning": {"enabled": True, "max_tokens": 9}}, Dial(switch=True, budget=9)),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, Dial(switch=True, budget=1024)),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, Dial(switch="auto", level="high")),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, Dial(switch=False)),
        ({"reasoning_effort": "low", "output_config": {"effort": "high"}}, Dial(level="low")),
        ({"thinking": {"type": "between_tools"}}, Dial(switch=True)),
        ({"thinking": False}, Dial(switch=False)),
        ({"think": True}, Dial(switch=True)),
        ({"think": "medium"}, Dial(level="medium")),
        ({"chat_template_kwargs": {"enable_thinking": False, "other": 1}}, Dial(switch=False)),
        ({"chat_template_kwargs": {"thinking_budget": 30}}, Dial(budget=30)),
        ({"thinking_budget": 5, "reasoning_budget_tokens": 5}, Dial(budget=5)),
        ({"enable_thinking": False, "reasoning_effort": "none"}, Dial(switch=False, level="none")),
    ],
)
def test_every_dialect_is_read(fields: dict[str, Any], dial: Dial) -> None:
    assert Dial.read(fields) == dial


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"enable_thinking": False, "thinking_budget": 50}, ("enable_thinking", "thinking_budget")),
        ({"enable_thinking": True, "reasoning_effort": "none"}, ("enable_thinking", "reasoning_effort")),
        ({"thinking_budget": 5, "thinking_token_budget": 6}, ("thinking_budget", "thinking_token_budget")),
        ({"think": "low", "reasoning": {"effort": "high"}}, ("think", "reasoning.effort")),
        ({"think": False, "thinking": {"type": "enabled"}}, ("think", "thinking.type")),
        ({"thinking": {"type": "disabled", "budget_tokens": 5}}, ("thinking.type", "thinking.budget_tokens")),
        ({"reasoning_effort": "high", "thinking_budget": 0}, ("reasoning_effort", "thinking_budget")),
        (
            {"think": True, "chat_template_kwargs": {"enable_thinking": False}},
            ("think", "chat_template_kwargs.enable_thinking"),
        ),
    ],
)
def test_contradiction_names_both_fields(fields: dict[str, Any], names: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="contradict") as caught:
        Dial.read(fields)
    assert all(name in caught.value.message for name in names)


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking_budget": -1},
        {"thinking_budget": True},
        {"thinking_budget": 1.5},
        {"thinking_budget": "9"},
        {"thinking": {"type": "maybe"}},
        {"thinking": {"type": ["enabled"]}},
        {"thinking": {"type": "enabled", "budget_tokens": -5}},
        {"thinking": {"kind": "enabled"}},
        {"thinking": 5},
        {"think": 1},
        {"think": "very"},
        {"reasoning": "high"},
        {"reasoning_effort": "huge"},
        {"reasoning_effort": 3},
        {"enable_thinking": "yes"},
        {"enable_thinking": 1},
        {"output_config": {"effort": 4}},
        {"chat_template_kwargs": {"enable_thinking": "no"}},
    ],
)
def test_wrong_value_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Dial.read(fields)
    assert caught.value.param is not None
    assert caught.value.param.split(".")[0] == next(iter(fields))


@pytest.mark.parametrize(
    ("dial", "tokens"),
    [
        (Dial(), None),
        (Dial(switch=False), 0),
        (Dial(switch=True), WINDOW - 1),
        (Dial(level="none"), 0),
        (Dial(level="low"), 512),
        (Dial(level="max"), WINDOW - 1),
        (Dial(level="high", budget=100), 100),
        (Dial(switch=True, level="low"), 512),
        (Dial(budget=0), 0),
        (Dial(budget=10**9), WINDOW - 1),
    ],
)
def test_budget_beats_level_beats_switch(dial: Dial, tokens: int | None) -> None:
    assert resolve(dial, max_tokens=None, context_tokens=WINDOW) == tokens


@pytest.mark.parametrize("level", [level for level in LEVEL_TOKENS if level != "none"])
def test_one_token_is_always_left_for_the_answer(level: str) -> None:
    for max_tokens in (1, 2, 100):
        budget = resolve(Dial(level=level), max_tokens=max_tokens, context_tokens=WINDOW)
        assert budget == min(LEVEL_TOKENS[level] or WINDOW, max_tokens - 1)


@pytest.mark.parametrize(
    ("text", "tools", "level"),
    [
        ("Hi!", 0, None),
        ("What is the capital of France?", 0, None),
        ("Thanks, that helped.", 5, None),
        ("Prove that the square root of 2 is irrational.", 0, "medium"),
        ("What is 12 * 7 + 31 * 4, step by step?", 0, "medium"),
        ("求解方程", 0, "medium"),
        ("Debug this, step by step:\n```python\ndef f(): pass\n```" + " context" * 80, 2, "high"),
    ],
)
def test_auto_follows_its_rule(text: str, tools: int, level: str | None) -> None:
    assert decide(text, tools=tools) == level


def test_auto_uses_a_given_level_or_budget_when_the_rule_says_yes() -> None:
    hard, easy = "Prove this theorem.", "Hi!"
    for dial, expected in ((Dial(switch="auto", level="low"), 512), (Dial(switch="auto", budget=9), 9)):
        assert resolve(dial, max_tokens=None, context_tokens=WINDOW, last_user_text=hard) == expected
        assert resolve(dial, max_tokens=None, context_tokens=WINDOW, last_user_text=easy) == 0


@pytest.mark.timeout(20)  # a pattern that backtracks would need hours
@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("1 + " * 100_000, "medium"),
        ("first " * 50_000, None),
        ("1" * 200_000, None),
        ("1 -" * 50_000 + " then", "medium"),
    ],
)
def test_rule_reads_a_hostile_text_without_backtracking(text: str, level: str | None) -> None:
    assert decide(text, tools=0) == level
