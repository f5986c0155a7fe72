"""Small templates with the structure of the families that Nimbos meets."""

import hashlib

from nimbos.chat import Chat
from nimbos.types import ModelCard

CHATML_MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

HERMES = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{%- endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\n<tool_call>\\n{\\"name\\": NAME, \\"arguments\\": ARGS}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
        {%- set thought = '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' if m.reasoning_content else '' %}
        {{- '<|im_start|>' + m.role + '\\n' + thought + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- for c in m.tool_calls %}
            {{- '\\n<tool_call>\\n{\\"name\\": \\"' + c.function.name + '\\", \\"arguments\\": ' }}
            {{- (c.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

LLAMA = """\
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
    {%- if m.role == 'system' and tools %}
        {{- 'Answer in the form {"name": NAME, "parameters": OBJECT}.\\n' }}
        {%- for tool in tools %}{{- (tool | tojson) + '\\n' }}{%- endfor %}
    {%- endif %}
    {%- if m.tool_calls %}
        {%- if m.tool_calls | length > 1 %}{{- raise_exception('One call at a time, please!') }}{%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
    {%- else %}
        {{- m.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

GEMMA = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{- raise_exception('No system role here') }}{%- endif %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/…') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""

DISTILLED = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}{{- '<A>' + m.content.split('</think>')[-1] + '<end>' }}
    {%- else %}{{- '<U>' + m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<A><think>\\n' }}{%- endif %}
"""


def card(template: str = CHATML, **facts: object) -> ModelCard:
    known = {
        "id": "tiny",
        "model_hash": "0" * 64,
        "architecture": "qwen2",
        "context_tokens": 4096,
        "control": CHATML_MARKS,
        "user_defined": (),
    }
    return ModelCard(**{**known, **facts}, chat_template=template)  # type: ignore[arg-type]


def trusted_chat(model: ModelCard) -> Chat:
    """Renders in this process, which saves each test the start of a worker."""
    digest = hashlib.sha256(model.chat_template.encode()).hexdigest()
    return Chat(model, trusted_templates=frozenset([digest]))
