"""Chat templates that write tool calls in the forms of well-known model families, cut down to what tests need."""

from __future__ import annotations

_HEAD = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
)
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

HERMES = (
    _HEAD
    + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    + "{% for call in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}<tool_call>\n"
    + '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    + "{% endfor %}<|im_end|>\n{% endfor %}"
    + _ASK
)

LLAMA = (
    _HEAD
    + "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    + "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    + '{"name": "{{ m.tool_calls[0].function.name }}", '
    + '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    + _ASK
)

MISTRAL = (
    _HEAD
    + "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.tool_calls %}"
    + "[TOOL_CALLS] [{% for call in m.tool_calls %}"
    + '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}'
    + "{% if not loop.last %}, {% endif %}{% endfor %}]<|im_end|>"
    + "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)

MISTRAL_NAMES = (
    _HEAD
    + "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}"
    + "{% for call in m.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}"
    + "{% endfor %}<|im_end|>{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)

FORMS = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "mistral_names": MISTRAL_NAMES}
