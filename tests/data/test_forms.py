"""The same conversation in other forms is the same row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunery.config import DataConfig
from tunery.data.example import DataSet, Example
from tunery.data.forms import FORMS
from tunery.data.read import read_data
from tunery.errors import DataError

TOOL = {"type": "function", "function": {"name": "track", "description": "d", "parameters": {"type": "object"}}}
FLAT = {"name": "track", "description": "d", "parameters": {"type": "object"}}


def call(arguments: object = '{"id": 1}', **more: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "track", "arguments": arguments}, **more}


OURS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "", "tool_calls": [call(id="c1")]},
    {"role": "tool", "tool_call_id": "c1", "content": "Oslo"},
    {"role": "assistant", "content": "In Oslo."},
]


def read(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> DataSet:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_data(DataConfig(train=str(file), validation=None, **settings), 0)


def meaning(example: Example) -> list[dict[str, Any]]:
    """The messages, without the ids that calls and answers share."""
    ids: dict[str, int] = {}
    result: list[dict[str, Any]] = []
    for message in example.messages:
        plain = dict(message)
        for tool_call in plain.get("tool_calls", ()):
            ids[tool_call["id"]] = len(ids)
        if plain.get("tool_calls"):
            plain["tool_calls"] = [
                (c["function"]["name"], json.loads(c["function"]["arguments"]), ids[c["id"]])
                for c in plain["tool_calls"]
            ]
        if "tool_call_id" in plain:
            plain["tool_call_id"] = ids[plain["tool_call_id"]]
            plain.pop("name", None)  # which the call says
        result.append(plain)
    return result


OTHER_FORMS: dict[str, dict[str, Any]] = {
    "arguments as an object": {
        "messages": [*OURS[:2], {"role": "assistant", "tool_calls": [call({"id": 1}, id="c1")]}, *OURS[3:]],
        "tools": [TOOL],
    },
    "calls without ids": {
        "messages": [
            *OURS[:2],
            {"role": "assistant", "content": None, "tool_calls": [call()]},
            {"role": "tool", "content": "Oslo", "name": "track"},
            OURS[4],
        ],
        "tools": [TOOL],
    },
    "flat calls and tools": {
        "messages": [
            *OURS[:2],
            {"role": "assistant", "tool_calls": [{"id": "c1", "name": "track", "arguments": {"id": 1}}]},
            *OURS[3:],
        ],
        "tools": [FLAT],
    },
    "functions": {
        "messages": [
            *OURS[:2],
            {"role": "assistant", "content": None, "function_call": {"name": "track", "arguments": '{"id": 1}'}},
            {"role": "function", "name": "track", "content": "Oslo"},
            OURS[4],
        ],
        "functions": [FLAT],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Where is it?"},
            {"from": "function_call", "value": '{"name": "track", "arguments": {"id": 1}}'},
            {"from": "observation", "value": "Oslo"},
            {"from": "gpt", "value": "In Oslo."},
        ],
        "system": "Be brief.",
        "tools": json.dumps([FLAT]),
    },
    "hermes": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Where is it?"},
            {"from": "gpt", "value": '<tool_call>\n{"name": "track", "arguments": {"id": 1}}\n</tool_call>'},
            {"from": "tool", "value": '<tool_response>\n{"name": "track", "content": "Oslo"}\n</tool_response>'},
            {"from": "gpt", "value": "In Oslo."},
        ],
        "tools": [TOOL],
    },
    "responses": {
        "instructions": "Be brief.",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Where is it?"}]},
            {
                "type": "function_call",
                "call_id": "c1",
                "name": "track",
                "arguments": '{"id": 1}',
                "status": "completed",
            },
            {"type": "function_call_output", "call_id": "c1", "output": "Oslo"},
        ],
        "output": [
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "In Oslo."}]},
        ],
        "tools": [{"type": "function", **FLAT}],
    },
    "bedrock": {
        "system": [{"text": "Be brief."}],
        "messages": [
            {"role": "user", "content": [{"text": "Where is it?"}]},
            {"role": "assistant", "content": [{"toolUse": {"toolUseId": "t", "name": "track", "input": {"id": 1}}}]},
            {"role": "user", "content": [{"toolResult": {"toolUseId": "t", "content": [{"text": "Oslo"}]}}]},
            {"role": "assistant", "content": [{"text": "In Oslo."}]},
        ],
        "toolConfig": {
            "tools": [
                {"toolSpec": {"name": "track", "description": "d", "inputSchema": {"json": {"type": "object"}}}},
            ]
        },
    },
    "gemini": {
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "contents": [
            {"role": "user", "parts": [{"text": "Where is it?"}]},
            {"role": "model", "parts": [{"functionCall": {"name": "track", "args": {"id": 1}}}]},
            {"role": "user", "parts": [{"functionResponse": {"name": "track", "response": "Oslo"}}]},
            {"role": "model", "parts": [{"text": "In "}, {"text": "Oslo."}]},
        ],
        "tools": [{"functionDeclarations": [FLAT]}],
    },
    "anthropic": {
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "Where is it?"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "track", "input": {"id": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "Oslo"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "In Oslo."}]},
        ],
        "tools": [{"name": "track", "description": "d", "input_schema": {"type": "object"}}],
    },
    "dumps of the SDK's objects": {
        "messages": [
            *OURS[:2],
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "annotations": [],
                "audio": None,
                "function_call": None,
                "tool_calls": [call(id="c1", index=None)],
            },
            OURS[3],
            {**OURS[4], "refusal": None, "tool_calls": [], "function_call": None, "annotations": []},
        ],
        "tools": [{**TOOL, "function": {**FLAT, "strict": None}}],
    },
    "texts of JSON, as tables hold them": {"messages": json.dumps(OURS), "tools": json.dumps([TOOL])},
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_a_conversation_with_a_tool_means_the_same_in_every_form(tmp_path: Path, form: str) -> None:
    expected = read(tmp_path, {"messages": OURS, "tools": [TOOL]}).train[0]
    data = read(tmp_path, OTHER_FORMS[form])
    prompt = [{k: v for k, v in m.items() if k != "weight"} for m in meaning(data.train[0])]
    assert prompt == meaning(expected)
    assert data.train[0].tools == expected.tools
    if form not in ("texts of JSON, as tables hold them", "dumps of the SDK's objects"):
        assert data.converted
        assert any(note.startswith("Converted to OpenAI's form: ") for note in data.notes)


def test_conversions_are_counted_by_rows(tmp_path: Path) -> None:
    rows = [OTHER_FORMS["gemini"], OTHER_FORMS["gemini"], {"contents": OTHER_FORMS["gemini"]["contents"]}]
    data = read(tmp_path, *rows)
    assert data.converted["Gemini contents"] == 3
    assert data.converted["tool calls without an id"] == 3
    assert "Gemini contents (3 rows)" in data.notes[-1]


def test_what_is_openai_s_form_already_is_not_called_converted(tmp_path: Path) -> None:
    assert read(tmp_path, {"messages": OURS, "tools": [TOOL]}).converted == {}


def test_every_form_says_what_it_is() -> None:
    assert len({form.name for form in FORMS}) == len(FORMS)
    assert all(form.name for form in FORMS)


@pytest.mark.parametrize(
    ("message", "reasoning", "content"),
    [
        ({"content": "Yes.", "thinking": "Hm."}, "Hm.", "Yes."),
        ({"content": "Yes.", "reasoning": "Hm.", "reasoning_content": "Hm."}, "Hm.", "Yes."),
        ({"content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Yes."}]}, "Hm.", "Yes."),
        ({"content": [{"reasoningContent": {"reasoningText": {"text": "Hm."}}}, {"text": "Yes."}]}, "Hm.", "Yes."),
    ],
)
def test_thoughts_arrive_under_one_key(tmp_path: Path, message: dict[str, Any], reasoning: str, content: str) -> None:
    data = read(tmp_path, {"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", **message}]})
    assert data.train[0].messages[1] == {"role": "assistant", "content": content, "reasoning_content": reasoning}


def test_thoughts_and_calls_of_the_responses_api_are_one_message(tmp_path: Path) -> None:
    output = [
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "a", "name": "track", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "track", "arguments": "{}"},
    ]
    [prompt, answer] = read(tmp_path, {"input": "Where?", "output": output}).train[0].messages
    assert prompt == {"role": "user", "content": "Where?"}
    assert answer["reasoning_content"] == "Hm."
    assert [c["id"] for c in answer["tool_calls"]] == ["a", "b"]


@pytest.mark.parametrize("arguments", ["", None, {}, " "])
def test_a_call_without_arguments(tmp_path: Path, arguments: object) -> None:
    messages = [OURS[1], {"role": "assistant", "tool_calls": [call(arguments, id="c")]}]
    data = read(tmp_path, {"messages": messages})
    assert data.train[0].messages[1]["tool_calls"][0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1e999}', "too large"),
        ('{"a": 1, "a": 2}', "this key stands twice"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ("[1]", "arguments are an object, not a list"),
        ("{a: 1}", "not valid JSON"),
    ],
)
def test_arguments_that_are_not_json(tmp_path: Path, arguments: str, words: str) -> None:
    messages = [OURS[1], {"role": "assistant", "tool_calls": [call(arguments, id="c")]}]
    with pytest.raises(DataError, match=r"messages\[1\]\.tool_calls\[0\]\.function\.arguments") as error:
        read(tmp_path, {"messages": messages})
    assert words in str(error.value)


def test_ids_that_calls_are_given_do_not_meet_others(tmp_path: Path) -> None:
    messages = [
        OURS[1],
        {"role": "assistant", "tool_calls": [call(), call(), call(id="call00003")]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
        {"role": "tool", "content": "three", "tool_call_id": "call00003"},
        OURS[4],
    ]
    found = read(tmp_path, {"messages": messages}).train[0].messages
    assert [c["id"] for c in found[1]["tool_calls"]] == ["call00001", "call00002", "call00003"]
    assert [m["tool_call_id"] for m in found[2:5]] == ["call00001", "call00002", "call00003"]


def test_what_a_form_cannot_hold_is_named_where_it_stands(tmp_path: Path) -> None:
    parts = [{"text": "a"}, {"inlineData": {"data": "x"}}]
    row = {"contents": [{"role": "user", "parts": parts}, {"role": "model", "parts": [{"text": "b"}]}]}
    with pytest.raises(DataError, match=r"contents\[0\]\.parts\[1\]: parts of type inlineData"):
        read(tmp_path, row)
