"""Templates: Hugging Face's semantics, and strangers' templates kept in their cage."""

import asyncio
import hashlib
import os
import signal
import sys
from pathlib import Path

import pytest

from nimbos.chat import Chat, ChatRequest
from nimbos.chat.isolation import RenderProcess
from nimbos.chat.template import Rendered, RenderFailure, RenderJob, TemplateRenderer
from nimbos.errors import InvalidRequest, ModelUnusable
from nimbos.types import ModelCard
from tests.chat.templates import CHATML, card

HELLO = [{"role": "user", "content": "Hi"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


async def prompt_of(model: ModelCard, *, trusted: bool = True) -> str:
    digest = hashlib.sha256(model.chat_template.encode()).hexdigest()
    chat = Chat(model, trusted_templates=frozenset([digest] if trusted else []))
    try:
        plan = await chat.plan(ChatRequest(messages=HELLO))
    finally:
        await chat.close()
    return "".join(part.text for part in plan.parts)


def render(template: str, **variables: object) -> str:
    result = TemplateRenderer().render(RenderJob(template, variables))
    assert isinstance(result, Rendered), result
    return result.text


def test_blocks_leave_no_white_space_and_loops_can_break() -> None:
    template = "{% for i in [1, 2, 3] %}\n    {% if i == 2 %}{% break %}{% endif %}\n{{ i }}\n{% endfor %}\nend"
    assert render(template) == "1\nend"


def test_tojson_writes_html_and_other_scripts_as_they_are() -> None:
    assert render("{{ x | tojson }}", x={"a": "<b> & é"}) == '{"a": "<b> & é"}'
    assert render("{{ x | tojson(indent=2) }}", x=[1]) == "[\n  1\n]"


def test_generation_tag_is_transparent() -> None:
    assert render("a{% generation %}{{ x }}{% endgeneration %}c", x="b") == "abc"


def test_date_is_available() -> None:
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10


async def test_worker_and_in_place_rendering_agree() -> None:
    model = card(CHATML)
    assert await prompt_of(model, trusted=True) == await prompt_of(model, trusted=False)


async def test_trusted_template_starts_no_process_and_another_does() -> None:
    digest = hashlib.sha256(CHATML.encode()).hexdigest()
    trusted = Chat(card(CHATML), trusted_templates=frozenset([digest]))
    stranger = Chat(card(CHATML + " "), trusted_templates=frozenset([digest]))
    try:
        await trusted.plan(ChatRequest(messages=HELLO))
        await stranger.plan(ChatRequest(messages=HELLO))
        assert trusted._worker.pid is None
        assert stranger._worker.pid is not None
    finally:
        await trusted.close()
        await stranger.close()


@pytest.mark.parametrize(
    ("template", "error", "says"),
    [
        (ENDLESS, ModelUnusable, "more time"),
        ("{{ (messages[0].content * 90000000) * 20 }}", ModelUnusable, "more memory"),
        ("{{ ''.__class__.__mro__ }}", ModelUnusable, "may not"),
        ("a\n{% if %}", ModelUnusable, "tiny cannot be used: its chat template at line 2 does not compile"),
        ("{{ 'x' * 5000000 }}", InvalidRequest, "longer than"),
        ("{% for i in range(9999) %}{{ 'y' * 1000 }}{% endfor %}", InvalidRequest, "longer than"),
        ("{{ raise_exception(' No\n' + 'way ') }}", InvalidRequest, "template says: No way"),
        ("ok\n{{ messages.x.y }}", InvalidRequest, "tiny cannot take these messages at line 2"),
    ],
)
async def test_hostile_template_fails_its_request_with_a_clear_error(
    template: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        await prompt_of(card(template), trusted=False)


async def test_bomb_takes_only_its_own_request_with_it() -> None:
    worker = RenderProcess()
    try:
        assert await worker.render(RenderJob("{{ x }}", {"x": 1})) == Rendered("1")
        first = worker.pid
        bomb, after = await asyncio.gather(
            worker.render(RenderJob(ENDLESS, {})), worker.render(RenderJob("{{ x }}", {"x": 2}))
        )
        assert bomb == RenderFailure("time")
        assert after == Rendered("2")
        assert worker.pid != first
    finally:
        await worker.close()


async def test_killed_worker_is_replaced() -> None:
    worker = RenderProcess()
    try:
        await worker.render(RenderJob("a", {}))
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        results = [await worker.render(RenderJob("a", {})) for _ in range(2)]
        assert results[-1] == Rendered("a")
    finally:
        await worker.close()


async def test_cancelled_render_does_not_answer_the_next_one() -> None:
    worker = RenderProcess()
    try:
        await worker.render(RenderJob("warm", {}))
        slow = asyncio.create_task(worker.render(RenderJob(ENDLESS, {})))
        await asyncio.sleep(0)  # let it start
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        assert await worker.render(RenderJob("next", {})) == Rendered("next")
    finally:
        await worker.close()


async def test_worker_ends_with_its_input_and_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    worker = RenderProcess()
    await worker.render(RenderJob("a", {}))
    process = worker._process
    assert process is not None and process.stdin is not None
    if sys.platform == "linux":
        assert b"HF_TOKEN" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    process.stdin.close()
    assert await process.wait() == 0
    await worker.close()


async def test_model_without_a_template_gets_chatml_where_its_vocabulary_has_the_marks() -> None:
    assert await prompt_of(card("")) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


async def test_model_without_a_template_or_marks_gets_plain_names_and_stops_at_the_next() -> None:
    chat = Chat(card("", control=()), trusted_templates=frozenset())
    plan = await chat.plan(ChatRequest(messages=HELLO))
    assert "".join(part.text for part in plan.parts) == "User: Hi\n\nAssistant:"
    assert "\nUser:" in plan.stop
    await chat.close()


async def test_an_integer_that_the_worker_cannot_be_sent_is_refused_by_its_place() -> None:
    worker = RenderProcess()
    variables = {"messages": [{"tool_calls": [{"function": {"arguments": {"a": [1, 2**64]}}}]}]}
    try:
        with pytest.raises(InvalidRequest) as caught:
            await worker.render(RenderJob("{{ messages }}", variables))
        assert caught.value.param == "messages[0].tool_calls[0].function.arguments.a[1]"
        assert isinstance(await worker.render(RenderJob("{{ messages }}", {"messages": [2**64 - 1]})), Rendered)
    finally:
        await worker.close()
