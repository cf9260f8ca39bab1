"""The plain chat template renders every kind of conversation, and its answers end in a token that is trained."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.tiny import CHATML, tiny_tokenizer
from tunery.data.example import Example, Place
from tunery.data.render import Renderer
from tunery.errors import ModelError
from tunery.models.templates import PLAIN_TEMPLATE, ensure_template

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Bye"},
]


def plain(messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = tiny_tokenizer(None)
    assert ensure_template(tokenizer) == "tunery plain"
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(text, str)
    return text


def test_a_conversation_in_plain_headings_with_the_end_token_after_each_answer() -> None:
    assert plain(TALK, add_generation_prompt=True) == (
        "### System:\nBe kind.\n\n### User:\nHello\n\n### Assistant:\nHi!<|im_end|>\n\n"
        "### User:\nBye\n\n### Assistant:\n"
    )


def test_a_developer_message_is_a_system_message_and_parts_of_a_content_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    text = plain([{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert text == "### System:\nBe brief.\n\n### User:\none two\n\n"


def test_tools_their_calls_and_their_answers_are_shown_as_json() -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": {"q": "é"}}}
    text = plain(
        [
            {"role": "user", "content": "Find"},
            {"role": "assistant", "content": "", "tool_calls": [call, call]},
            {"role": "tool", "content": "found", "tool_call_id": "1"},
        ],
        tools=[tool],
    )
    head, _, rest = text.partition("\n\n### User:")
    assert json.loads(head.removeprefix("### Tools:\n")) == tool
    calls = rest.partition("### Assistant:\n")[2].partition("<|im_end|>")[0].split("\n")
    assert [json.loads(line) for line in calls] == [{"name": "look_up", "arguments": {"q": "é"}}] * 2
    assert text.endswith("### Tool:\nfound\n\n")


def test_what_is_asked_is_the_beginning_of_what_is_trained_and_the_end_token_is_trained() -> None:
    tokenizer = tiny_tokenizer(None)
    ensure_template(tokenizer)
    renderer = Renderer(tokenizer)
    example = Example("chat", Place("a", 1), messages=(*TALK, {"role": "assistant", "content": "See you"}))
    ids, trained = renderer.encode(renderer.render(example))[0]
    answers = tokenizer.decode([token for token, on in zip(ids, trained, strict=True) if on])
    assert answers == "Hi!<|im_end|>See you<|im_end|>"
    asked = renderer.encode_prompt(renderer.prompt(TALK))
    assert ids[: len(asked)] == asked
    assert renderer.end_of_turn == tokenizer.eos_token_id
    assert renderer.remarks.sentences() == []


def test_a_model_keeps_its_own_template() -> None:
    tokenizer = tiny_tokenizer()
    assert ensure_template(tokenizer) == "model"
    assert tokenizer.chat_template == CHATML


def test_of_several_templates_the_default_one_is_used() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"tool_use": PLAIN_TEMPLATE, "default": CHATML}
    assert ensure_template(tokenizer) == "model"
    assert tokenizer.chat_template == CHATML
    tokenizer.chat_template = {"rag": PLAIN_TEMPLATE, "tool_use": CHATML}
    with pytest.raises(ModelError, match=r"rag, tool_use.*none is the default"):
        ensure_template(tokenizer)


def test_without_template_and_end_token_there_is_no_way_to_end_an_answer() -> None:
    tokenizer = tiny_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a chat template nor an end-of-sequence token"):
        ensure_template(tokenizer)
