"""What a model's template can do, read from its text and from two probes rendered once.
Knows nothing of requests; `chat.py` fits requests to it.

| read from         | fact                                                                                    |
| ----------------- | --------------------------------------------------------------------------------------- |
| `</think>` in it  | the model thinks between `<think>` and `</think>`                                       |
| `enable_thinking` | thinking can be switched, and is on where the prompt leaves it open                     |
| tools + forms     | how calls are written: Hermes (`<tool_call>`), Llama 3 (`"parameters"`), or ours        |
| probe: system     | whether a system message comes out                                                      |
| probe: tools      | whether an earlier call and its result come out                                         |

A template that knows tools in a form Nimbos does not parse (Mistral, Qwen3-Coder's XML) gets no `tools`; they are
described in a system message instead, in the Hermes form.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from nimbos.chat.template import Rendered, RenderResult
from nimbos.types import ModelCard

# Used when a GGUF has no template. The plain one writes the speaker's name before each message and stops at the next.
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message.role | capitalize + ': ' + message.content + '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PLAIN_STOP = ("\nUser:", "\nSystem:")

_OTHER_CALL_FORMS = ("<function=", "<arg_key>", "[TOOL_CALLS]", "<|tool_call|>")
_SYSTEM_PROBE, _CALL_PROBE, _RESULT_PROBE = "nimbosprobesystem", "nimbosprobecall", "nimbosproberesult"

Render = Callable[[dict[str, Any]], Awaitable[RenderResult]]


class CallForm(StrEnum):
    HERMES = "hermes"  # <tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>
    LLAMA = "llama"  # {"name": …, "parameters": {…}}, one call, and nothing else in the answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """`opening` and `skipped` are appended to a prompt to begin thinking and to pass over it."""

    open: str
    close: str
    opening: str
    skipped: str


THINK = Marks(open="<think>", close="</think>", opening="<think>\n", skipped="<think>\n\n</think>\n\n")
# gpt-oss: channels of one message. From the format's description; not yet run with the weights.
HARMONY = Marks(
    open="<|channel|>analysis<|message|>",
    close="<|end|><|start|>assistant<|channel|>final<|message|>",
    opening="<|channel|>analysis<|message|>",
    skipped="<|channel|>final<|message|>",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`describes_tools`: the template writes the tools itself. `takes_history`: it writes earlier calls and results, in
    the form that we parse. `habitual`: where its prompt leaves it open, the model thinks. `stop`: strings that end an
    answer of this template."""

    template: str
    form: CallForm
    describes_tools: bool
    takes_history: bool
    takes_system: bool
    marks: Marks | None
    habitual: bool
    stop: tuple[str, ...] = ()


def choose_template(card: ModelCard) -> tuple[str, tuple[str, ...]]:
    """The model's own template or a default, and the stop strings that the default needs."""
    if card.chat_template.strip():
        return card.chat_template, ()
    if "<|im_start|>" in card.control:
        return CHATML_TEMPLATE, ()
    return PLAIN_TEMPLATE, PLAIN_STOP


async def recognise(card: ModelCard, render: Render) -> Family:
    """`render` takes a template's variables; a probe that fails to render counts as "cannot"."""
    template, stop = choose_template(card)
    form = _call_form(template)
    marks = _marks(template)
    return Family(
        template=template,
        form=form or CallForm.HERMES,
        describes_tools=form is not None,
        takes_history=(form is not None or "tool_calls" not in template) and await _takes_history(render),
        takes_system=await _takes_system(render),
        marks=marks,
        habitual=marks is HARMONY or re.search(r"\benable_thinking\b", template) is not None,
        stop=stop,
    )


def _marks(template: str) -> Marks | None:
    if THINK.close in template:
        return THINK
    return HARMONY if "<|channel|>analysis" in template else None


def _call_form(template: str) -> CallForm | None:
    """None: it knows no tools, or a form that is not ours to parse."""
    plain = template.replace("\\", "")  # quotes are escaped inside template strings
    if re.search(r"\btools\b", plain) is None or any(form in plain for form in _OTHER_CALL_FORMS):
        return None
    if "<tool_call>" in plain and '"arguments"' in plain:
        return CallForm.HERMES
    if re.search(r'"name": .{0,80}"parameters": ', plain, re.DOTALL) is not None:
        return CallForm.LLAMA
    return None


async def _takes_system(render: Render) -> bool:
    result = await render(
        {"messages": [{"role": "system", "content": _SYSTEM_PROBE}, {"role": "user", "content": "Hi"}]}
    )
    return isinstance(result, Rendered) and _SYSTEM_PROBE in result.text


async def _takes_history(render: Render) -> bool:
    function = {"name": _CALL_PROBE, "arguments": {"a": 1}}
    call = {"type": "function", "id": "call_1", "function": function}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": _RESULT_PROBE, "tool_call_id": "call_1", "name": _CALL_PROBE},
    ]
    result = await render({"messages": messages})
    return isinstance(result, Rendered) and _CALL_PROBE in result.text and _RESULT_PROBE in result.text
