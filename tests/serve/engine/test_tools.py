"""Calls of tools: the template's form, reading answers, and streams."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serve.engine.templates import FORMS
from tests.tiny import CHATML, tiny_tokenizer
from tunery.data.render import Renderer
from tunery.models.templates import PLAIN_TEMPLATE
from tunery.serve.engine.tools import HERMES, Call, Form, ToolReader, control_pattern, find_form, read_calls

NAMES = ("weather", "add")
CALLS = [("weather", {"city": 'Ås "x" {1}', "days": 2}), ("add", {"numbers": [1, 2.5], "deep": {"a": None}})]
CONTROL = control_pattern(tiny_tokenizer())


def renderer(template: str) -> Renderer:
    return Renderer(tiny_tokenizer(template))


def rendered(template: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """What the template writes as the answer that makes these calls, without its end-of-turn token."""
    maker = renderer(template)
    question = {"role": "user", "content": "q"}
    made = [
        {"id": f"abcdefgh{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for i, (name, arguments) in enumerate(calls)
    ]
    prompt = maker.prompt([question])
    whole = maker.prompt([question, {"role": "assistant", "content": None, "tool_calls": made}])
    return whole[len(prompt) :].partition("<|im_end|>")[0]


def reader(form: Form, parallel: bool = True, forced: bool = False) -> ToolReader:
    return ToolReader(form, NAMES, forced, parallel, CONTROL)


def as_calls(deltas: Any) -> list[tuple[str | None, Any]]:
    return [(delta.name, json.loads(delta.arguments)) for delta in deltas]


@pytest.mark.parametrize("family", FORMS)
def test_calls_are_read_as_the_template_writes_them(family: str) -> None:
    form = find_form(renderer(FORMS[family]))
    for count in (1, 2) if form.joint is not None else (1,):
        text = rendered(FORMS[family], CALLS[:count])
        found = read_calls(text, form, frozenset(NAMES))
        assert [(call.name, json.loads(call.arguments)) for call in found] == CALLS[:count]


def test_the_form_is_found_by_asking_the_template() -> None:
    assert find_form(renderer(FORMS["hermes"])) == HERMES
    llama = find_form(renderer(FORMS["llama"]))
    assert (llama.opening, llama.middle, llama.closing) == ('{"name": "', '", "parameters": ', "}")
    assert llama.joint is None
    mistral = find_form(renderer(FORMS["mistral"]))
    assert mistral.marker == "[TOOL_CALLS]"
    assert mistral.closing == ', "id": "tuneryid9"}]'
    assert find_form(renderer(PLAIN_TEMPLATE)).joint == '}\n{"name": "'


def test_a_template_without_calls_gets_the_common_form() -> None:
    assert find_form(renderer(CHATML)) == HERMES


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>',
        '<tool_call>\n{"arguments": {"x": 1}, "name": "add"}\n</tool_call>\n',
        '[TOOL_CALLS][{"name": "add", "arguments": {"x": 1}}]',
        '[TOOL_CALLS]add{"x": 1}',
        '[TOOL_CALLS]add[CALL_ID]abc[ARGS]{"x": 1}',
        '<|python_tag|>{"name": "add", "parameters": {"x": 1}}',
        '{"name": "add", "parameters": {"x": 1}}',
        ' {"type": "function", "function": {"name": "add", "arguments": "{\\"x\\": 1}"}}',
        '[{"name": "add", "arguments": {"x": 1}}]',
    ],
)
@pytest.mark.parametrize("form", [HERMES, Form('{"name": "', '", "parameters": ', None, "}")], ids=["hermes", "llama"])
def test_other_forms_are_read_too(text: str, form: Form) -> None:
    (call,) = read_calls(text, form, frozenset(NAMES))
    assert (call.name, json.loads(call.arguments)) == ("add", {"x": 1})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        '{"a": 1}',
        '{"name": "Ada", "arguments": {}}',
        '{"name": "add", "arguments": {"x": ',
        "[1, 2]",
        '<tool_call>{"name": ',
        "{",
        '{"name": "add", "arguments": {}} and more',
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert read_calls(text, HERMES, frozenset(NAMES)) == []
    one = reader(HERMES)
    said = one.feed(text)
    rest, calls = one.end()
    assert calls == []
    assert said + rest == text


def pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("family", FORMS)
def test_a_streamed_answer_says_its_text_and_never_a_part_of_a_call(family: str, size: int) -> None:
    form = find_form(renderer(FORMS[family]))
    call = rendered(FORMS[family], CALLS[:1])
    for before in ("", "I will look. ") if form.marker else ("",):
        one = reader(form)
        said = [one.feed(piece) for piece in pieces(before + call, size)]
        rest, calls = one.end()
        assert "".join(said) + rest == before.rstrip()
        assert as_calls(calls) == CALLS[:1]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_text_with_signs_like_markers_comes_out_whole(size: int) -> None:
    text = "a < b <tool and <|python but [TOOL_ nothing\n\n more "
    one = reader(HERMES)
    said = [one.feed(piece) for piece in pieces(text, size)]
    rest, calls = one.end()
    assert "".join(said) + rest == text
    assert not calls
    assert "".join(said).startswith("a < b")


def test_control_tokens_are_never_said() -> None:
    one = reader(HERMES)
    said = one.feed("hi <|im_start|>there")
    assert said + one.end()[0] == "hi there"


def test_one_call_only_where_several_are_not_wanted() -> None:
    text = rendered(FORMS["hermes"], CALLS)
    one, two = reader(HERMES, parallel=False), reader(HERMES)
    for each in (one, two):
        each.feed(text)
    assert len(one.end()[1]) == 1
    calls = two.end()[1]
    assert [call.index for call in calls] == [0, 1]
    ids = [call.id for call in calls]
    assert len(set(ids)) == 2
    assert all(i and i.startswith("call_") and len(i) == 29 for i in ids)


def test_arguments_are_json_text() -> None:
    delta = Call("add", '{"x": 1}').delta(3)
    assert (delta.index, delta.name, delta.arguments) == (3, "add", '{"x": 1}')
