"""Chat templates that write the date, told another day than today.

Templates get the date from `strftime_now`, a function that transformers offers them. One that is defined in the
template itself goes before it: the dates are looked up among the formats that the template names.
"""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING, Any

from tunery.jsonl import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = re.compile(r"'((?:[^'\\]|\\.)*%(?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*%(?:[^\"\\]|\\.)*)\"")
_BEFORE = "{%- macro strftime_now(format) -%}{{ dates_by_format[format] }}{%- endmacro +%}"


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes the date."""
    untyped: Any = tokenizer
    return "strftime_now" in str(untyped.chat_template)


def today(tokenizer: PreTrainedTokenizerBase) -> datetime.date:
    """The day that templates are told."""
    untyped: Any = tokenizer
    question = [{"role": "user", "content": ""}]
    text: str = untyped.apply_chat_template(question, chat_template="{{ strftime_now('%Y-%m-%d') }}", tokenize=False)
    return datetime.date.fromisoformat(text)


def dated_template(
    tokenizer: PreTrainedTokenizerBase, tools: list[JsonObject] | None, date: datetime.date
) -> JsonObject:
    """Arguments of `apply_chat_template` with which the tokenizer's template writes this date."""
    untyped: Any = tokenizer
    template: str = untyped.get_chat_template(tools=tools)
    formats = {single or double for single, double in _FORMAT.findall(template)}
    moment = datetime.datetime.combine(date, datetime.time())
    return {"chat_template": _BEFORE + template, "dates_by_format": {text: moment.strftime(text) for text in formats}}
