"""A chat template for models that bring none (GPT-2 and other base models), and the choice among several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunery.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = """\
{%- if tools -%}
{{- '### Tools:\\n' -}}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor -%}
{{- '\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- set role = 'system' if message.role == 'developer' else message.role -%}
{{- '### ' + role | capitalize + ':\\n' -}}
{%- if message.content is string %}{{ message.content }}{% elif message.content -%}
{%- for part in message.content %}{{ part.text }}{% endfor -%}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{{- ('\\n' if message.content or not loop.first else '') -}}
{{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson -}}
{%- endfor -%}
{{- (eos_token if role == 'assistant' else '') + '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif -%}
"""
"""Roles as plain text headings, because such a model has no control tokens for them; the end-of-sequence token after
each assistant turn, so that the model learns to stop. A developer message is a system message. Tool calls are one JSON
object per line: {"name": …, "arguments": …}.
"""


def ensure_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Settle which chat template the tokenizer uses: its own, its "default" one of several, or PLAIN_TEMPLATE.

    Returns:
        "model", or "tunery plain" when the plain template was put in.

    Raises:
        ModelError: several templates without a default one; or none, and no end-of-sequence token to end a turn with.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict) and template:
        name = "default" if "default" in template else next(iter(template))
        if len(template) > 1 and name != "default":
            raise ModelError(
                f"the tokenizer has several chat templates ({', '.join(sorted(template))}) and none is the default",
                "name one of them `default` in the model's folder",
            )
        tokenizer.chat_template = template[name]
        return "model"
    if template:
        return "model"
    if not tokenizer.eos_token:
        raise ModelError(
            "the tokenizer has neither a chat template nor an end-of-sequence token, so no answer could ever end",
            'set "eos_token" in the model\'s tokenizer_config.json',
        )
    tokenizer.chat_template = PLAIN_TEMPLATE
    return "tunery plain"
