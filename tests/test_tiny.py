"""The whole system in seconds: files, hub, engine process, chat layer, service, HTTP, the official client.

One tiny model with random weights and one scripted model stand behind one server. Each step is what a user does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nimbos.config import EngineSettings
from tests import tiny_gguf
from tests.live import serving, user

SCRIPT = {
    "replies": [{"match": "weather", "times": 1, "tool_calls": [{"name": "look", "arguments": {"at": "the sky"}}]}],
    "default": {"thinking": "Easy.", "text": "It is sunny."},
}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def test_the_whole_system_answers(tmp_path: Path) -> None:
    files = (tiny_gguf.write("qwen3", tmp_path), tiny_gguf.write("qwen3-embedding", tmp_path))
    chatting, embedding = (file.stem for file in files)
    engine = EngineSettings(threads=1, cells=2048, sequences=8)
    with serving(tmp_path / "home", {"play": SCRIPT}, models=files, engine=engine) as live:
        assert live.http.get("/health").status_code == 200
        assert [model.id for model in live.client.models.list()] == ["play", chatting, embedding]

        # A tool is called, and its result is answered, with thinking told apart.
        messages = user("What is the weather?")
        first = live.client.chat.completions.create(model="play", messages=messages, tools=[LOOK])  # type: ignore[list-item]
        called = first.choices[0].message
        assert called.tool_calls
        messages += [
            called.model_dump(),
            {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "blue"},
        ]
        second = live.client.chat.completions.create(model="play", messages=messages, tools=[LOOK])  # type: ignore[list-item]
        assert second.choices[0].message.content == "It is sunny."
        assert second.choices[0].message.model_extra == {"reasoning_content": "Easy."}

        # A real engine: streamed and whole answers are the same, the second prompt is in memory already.
        fields = {"model": chatting, "messages": user("hello world"), "temperature": 0, "max_tokens": 16}
        whole = live.post("/v1/chat/completions", fields).json()
        stream = live.client.chat.completions.create(**fields, stream=True)  # type: ignore[call-overload]
        deltas = [chunk.choices[0].delta for chunk in stream]
        message = whole["choices"][0]["message"]
        assert "".join(delta.content or "" for delta in deltas) == message["content"]
        thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        assert thoughts == message.get("reasoning_content", "")
        assert live.post("/v1/chat/completions", fields).json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0

        # Another engine beside it: vectors.
        vector = np.array(live.client.embeddings.create(model=embedding, input="hello").data[0].embedding)
        assert abs(float(np.linalg.norm(vector)) - 1) < 1e-3

        # What was done is counted.
        page = live.http.get("/metrics").text
        assert f'nimbos_asks_total{{ask_class="interactive",model="{chatting}",outcome="done"}} 3.0' in page
        assert f'nimbos_engine_restarts_total{{model="{chatting}"}} 0.0' in page
