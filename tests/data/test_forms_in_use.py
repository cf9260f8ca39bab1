"""Rows as public data sets and other programs write them: what is trained is what their authors meant."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunery.config import DataConfig
from tunery.data.example import DataSet
from tunery.data.read import read_data
from tunery.errors import ConfigError, DataError, TuneryError

USER = {"role": "user", "content": "Where?"}
ANSWER = {"role": "assistant", "content": "Here."}
OTHER = {"role": "assistant", "content": "There."}


def read(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> DataSet:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_data(DataConfig(train=str(file), validation=None, **settings), 0)


def said(messages: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


TALK = [("user", "Where?"), ("assistant", "Here.")]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"conversations": ["Where?", "Here."]}, "turns as texts"),
        ({"conversations": [["Where?", "Here."]]}, "turns as texts"),
        ({"conversation": [{"input": "Where?", "output": "Here."}]}, "turns with input and output"),
        ({"messages": [{**USER, "role": "User"}, {**ANSWER, "role": "Chatbot"}]}, "other names"),
        ({"messages": [{"speaker": "human", "text": "Where?"}, {"speaker": "bot", "text": "Here."}]}, "other names"),
        ({"messages": [{"type": "human", "content": "Where?"}, {"type": "ai", "content": "Here."}]}, "other names"),
        (
            {"contents": [{"role": "user", "parts": ["Where?"]}, {"role": "model", "parts": {"text": "Here."}}]},
            "Gemini",
        ),
        ({"messages": "[{'role': 'user', 'content': 'Where?'}, {'role': 'assistant', 'content': 'Here.'}]"}, "Python"),
        ({"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}, "lists of messages as text"),
    ],
)
def test_one_conversation_in_many_forms(tmp_path: Path, row: dict[str, Any], form: str) -> None:
    data = read(tmp_path, row)
    assert data.kind == "chat"
    assert said(data.train[0].messages) == TALK
    assert any(form in name for name in data.converted), data.converted


def test_messages_as_text_in_a_csv_are_the_messages_of_jsonl(tmp_path: Path) -> None:
    row = {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(row), [json.dumps(value) for value in row.values()]])
    table = read_data(DataConfig(train=str(tmp_path / "rows.csv"), validation=None), 0).train[0]
    lines = read(tmp_path, row).train[0]
    assert (table.messages, table.chosen, table.rejected) == (lines.messages, lines.chosen, lines.rejected)


def test_earlier_answers_in_a_prompt_are_not_trained_whatever_the_file(tmp_path: Path) -> None:
    prompt = [USER, OTHER, USER]
    for written in (prompt, json.dumps(prompt), str(prompt)):
        messages = read(tmp_path, {"prompt": written, "completion": "Here."}).train[0].messages
        assert [m.get("weight", 1) for m in messages if m["role"] == "assistant"] == [0, 1]


@pytest.mark.parametrize(
    "text", ["[{'role': 'user', 'content': '\\ud800'}]", "[{'role': 'a', 'role': 'user'}]", "[{'a'}]"]
)
def test_what_json_cannot_hold_is_refused_in_pythons_writing_too(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="not valid JSON"):
        read(tmp_path, {"messages": text})


def test_a_context_that_the_prompt_holds_is_not_said_twice(tmp_path: Path) -> None:
    context = "Oslo is the capital of Norway."
    row = {"prompt": f"{context} What is the capital?", "context": context, "completion": "Oslo"}
    assert read(tmp_path, row).train[0].prompt == row["prompt"]
    assert read(tmp_path, {**row, "prompt": "What?"}).train[0].prompt == f"What?\n\n{context}"


@pytest.mark.parametrize(
    "text",
    [
        '[{"value": 1, "unit": "kg"}]',
        '{"role": "admin", "name": "x"}',
        '{"content": "x"}',
        '{"role": "user", "name": "x"}',
    ],
)
def test_json_that_a_model_should_write_stays_text(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, {"prompt": "Extract it.", "completion": text}).train[0].completion == text


def test_json_beside_tools_is_a_call_only_of_these(tmp_path: Path) -> None:
    tools = [{"name": "track", "description": "d", "parameters": {}}]
    for text in ('{"name": "Bob", "age": 3}', '{"name": "track", "age": 3}', '{"name": "other", "arguments": {}}'):
        row = {"prompt": "Who?", "completion": text, "tools": tools}
        assert read(tmp_path, row).train[0].messages[-1]["content"] == text


def test_messages_each_as_text(tmp_path: Path) -> None:
    row = {"messages": [json.dumps(USER), json.dumps(ANSWER)]}
    assert said(read(tmp_path, row).train[0].messages) == TALK


def test_openai_pairs_in_a_csv(tmp_path: Path) -> None:
    row = {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [OTHER]}
    texts = read(tmp_path, {key: json.dumps(value) for key, value in row.items()}).train[0]
    values = read(tmp_path, row).train[0]
    assert (texts.messages, texts.chosen, texts.rejected) == (values.messages, values.chosen, values.rejected)


def test_what_pandas_shows_has_no_invented_nulls(tmp_path: Path) -> None:
    """As from Parquet, where every object of a column has the same keys."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}, "b": None}}}}]
    found = read(tmp_path, {"messages": [USER, ANSWER], "tools": str(tools)}).train[0].tools
    assert found[0]["function"]["parameters"] == {"properties": {"a": {}}}


@pytest.mark.parametrize("written", [["One.", "Two."], '["One.", "Two."]', "['One.', 'Two.']"])
def test_a_context_of_several_texts(tmp_path: Path, written: Any) -> None:
    row = {"question": "Which?", "context": written, "answer": "Two."}
    assert read(tmp_path, row).train[0].prompt == "Which?\n\nOne.\n\nTwo."


def test_a_late_system_column_comes_with_a_fix_that_works(tmp_path: Path) -> None:
    rows = [{"prompt": f"{number}?", "completion": "Here."} for number in range(1001)]
    rows.append({"prompt": "Where?", "completion": "Here.", "system": "Be brief."})
    with pytest.raises(ConfigError) as error:
        read(tmp_path, *rows)
    assert "set data.kind: chat, which uses it" in (error.value.hint or "")
    assert read(tmp_path, *rows, kind="chat").train[-1].messages[0]["role"] == "system"


def test_a_broken_list_of_messages_as_text_is_not_trained_as_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="completion: the text is not valid JSON"):
        read(tmp_path, {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])[:-4]})


@pytest.mark.parametrize("key", ["train", "training", "loss", "weight"])
def test_what_others_say_of_weights(tmp_path: Path, key: str) -> None:
    """SlimOrca gives every message a weight, axolotl calls it train or training, XTuner loss."""
    no, yes = (0, 1) if key == "weight" else (False, True)
    rows = [{**USER, key: no}, {**OTHER, key: no}, {**USER, key: no}, {**ANSWER, key: yes}]
    messages = read(tmp_path, {"messages": rows}).train[0].messages
    assert [message.get("weight") for message in messages if message["role"] == "assistant"] == [0, 1]


def test_a_users_words_that_should_be_trained_are_a_problem(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only assistant messages are trained"):
        read(tmp_path, {"messages": [{**USER, "train": True}, ANSWER]})


def test_keys_of_messages_can_be_left_aside(tmp_path: Path) -> None:
    row = {"messages": [{**USER, "toxic": False}, {**ANSWER, "language": "English"}]}
    with pytest.raises(
        DataError, match=r"language: unknown key → leave it aside with data\.ignore_columns: \[language\]"
    ):
        read(tmp_path, row)
    data = read(tmp_path, row, ignore_columns=("language", "toxic"))
    assert said(data.train[0].messages) == TALK
    assert data.columns_ignored == {"language": 1, "toxic": 1}
    with pytest.raises(ConfigError, match="no column 'langauge'"):
        read(tmp_path, row, ignore_columns=("language", "toxic", "langauge"))


def test_pairs_stand_beside_what_they_were_made_of(tmp_path: Path) -> None:
    whole = {"prompt": "Where?", "messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
    factory = {"conversations": [{"from": "human", "value": "Where?"}], "chosen": ANSWER, "rejected": OTHER}
    repeated = {"messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
    text = {"chosen": "\n\nHuman: Where?\n\nAssistant: Here.", "rejected": "\n\nHuman: Where?\n\nAssistant: There."}
    for row in (whole, factory, repeated, text):
        data = read(tmp_path, row)
        assert data.kind == "preference"
        pair = data.train[0]
        assert (said(pair.messages), said(pair.chosen), said(pair.rejected)) == (
            [("user", "Where?")],
            [("assistant", "Here.")],
            [("assistant", "There.")],
        )


def test_a_transcript_keeps_its_earlier_turns(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Where?\n\nAssistant:"
    pair = read(tmp_path, {"chosen": f"{start} Here.", "rejected": f"{start} There."}).train[0]
    assert said(pair.messages) == [("user", "Hi"), ("assistant", "Hello."), ("user", "Where?")]


def test_a_verdict_of_llama_factory_is_one(tmp_path: Path) -> None:
    rows = [{"messages": [USER, ANSWER], "kto_tag": True}, {"messages": [USER, OTHER], "kto_tag": False}]
    data = read(tmp_path, *rows)
    assert data.kind == "feedback"
    assert [bool(row.rejected) for row in data.train] == [False, True]


# --------------------------------------------------------------------------- tools

CALL = {"name": "track", "arguments": {"id": 1}}
WANTED = ["track", {"id": 1}]


def calls(tmp_path: Path, row: dict[str, Any]) -> list[list[Any]]:
    messages = read(tmp_path, row).train[0].messages
    found = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    return [[function["name"], json.loads(function["arguments"])] for function in found]


@pytest.mark.parametrize("key", ["args", "parameters", "input", "params"])
def test_arguments_under_another_key_are_not_lost(tmp_path: Path, key: str) -> None:
    for call in (
        {"name": "track", key: {"id": 1}},
        {"type": "function", "function": {"name": "track", key: {"id": 1}}},
    ):
        assert calls(tmp_path, {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}) == [WANTED]
    twice = {"name": "track", "arguments": {"id": 1}, key: {"id": 2}}
    with pytest.raises(DataError, match="under two keys"):
        read(tmp_path, {"messages": [USER, {"role": "assistant", "tool_calls": [twice]}]})


@pytest.mark.parametrize("block", [json.dumps(CALL), str(CALL)])
def test_calls_in_hermes_blocks(tmp_path: Path, block: str) -> None:
    turns = [("user", "Where?"), ("assistant", f"<tool_call>\n{block}\n</tool_call>")]
    turns += [("tool", "<tool_response>\nOslo\n</tool_response>"), ("assistant", "In Oslo.")]
    names = {"user": "human", "assistant": "gpt", "tool": "tool"}
    ours = {"messages": [{"role": role, "content": content} for role, content in turns]}
    theirs = {"conversations": [{"from": names[role], "value": content} for role, content in turns]}
    for row in (ours, theirs):
        assert calls(tmp_path, row) == [WANTED]
        assert read(tmp_path, row).train[0].messages[2]["content"] == "Oslo"


def test_answers_to_calls_in_words_of_their_own(tmp_path: Path) -> None:
    """ToolACE writes calls as [track(id=1)]."""
    turns = [("user", "Where?"), ("assistant", "[track(id=1)]"), ("tool", "Oslo"), ("assistant", "In Oslo.")]
    row = {"conversations": [{"from": role, "value": content} for role, content in turns]}
    assert said(read(tmp_path, row).train[0].messages) == turns


@pytest.mark.parametrize(
    "tools",
    [
        [{"name": "track", "description": "d", "inputSchema": {"type": "object"}}],
        [json.dumps({"name": "track", "description": "d", "parameters": {"type": "object"}})],
        {"name": "track", "description": "d", "parameters": {"type": "object"}},
    ],
)
def test_tools_of_others_keep_what_they_take(tmp_path: Path, tools: Any) -> None:
    function = {"name": "track", "description": "d", "parameters": {"type": "object"}}
    found = read(tmp_path, {"messages": [USER, ANSWER], "tools": tools}).train[0].tools
    assert [tool["function"] for tool in found] == [function]


def test_what_a_tool_takes_and_gives_is_kept(tmp_path: Path) -> None:
    tool = {"name": "track", "description": "d", "parameters": {}, "returns": {"type": "string"}}
    assert read(tmp_path, {"messages": [USER, ANSWER], "tools": [tool]}).train[0].tools[0]["function"] == tool


def test_answers_that_are_calls(tmp_path: Path) -> None:
    """xLAM's rows: query, answers and tools, the last two as text."""
    tools = [{"name": "track", "description": "d", "parameters": {"id": {"type": "int"}}}]
    for answers in ([CALL], json.dumps([CALL])):
        assert calls(tmp_path, {"query": "Where?", "answers": answers, "tools": json.dumps(tools)}) == [WANTED]
    row = {"prompt": "Where?", "completion": "Here.", "tools": tools}
    assert read(tmp_path, row).train[0].messages[-1]["content"] == "Here."


def test_a_tools_answer_as_an_object(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "track", "arguments": "{}"}}
    answered = {"role": "tool", "tool_call_id": "c1", "content": {"city": "Oslo"}}
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}, answered, ANSWER]}
    assert read(tmp_path, row).train[0].messages[2]["content"] == '{"city": "Oslo"}'


def test_thoughts_in_parts(tmp_path: Path) -> None:
    """Mistral's thinking part holds text parts."""
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Here."}]
    answer = read(tmp_path, {"messages": [USER, {"role": "assistant", "content": parts}]}).train[0].messages[-1]
    assert (answer["reasoning_content"], answer["content"]) == ("Hm.", "Here.")


# --------------------------------------------------------------------------- columns


def test_a_whole_prompt_beside_its_parts_says_nothing_new(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1+1", "output": "2"}
    text = "Below is a task.\n\n### Instruction:\nAdd.\n\n### Input:\n1+1\n\n### Response:\n2"
    assert read(tmp_path, {**row, "text": text}).train[0].prompt == "Add.\n\n1+1"
    with pytest.raises(ConfigError, match="no use for text"):
        read(tmp_path, {**row, "text": "Quite another thing."})


def test_a_reference_answer_is_one_where_the_answer_holds_it(tmp_path: Path) -> None:
    assert said(read(tmp_path, {"messages": [USER, ANSWER], "answer": "Here"}).train[0].messages) == TALK
    with pytest.raises(DataError, match=r"this is another → keep one of them, or .*ignore_columns: \[answer\]"):
        read(tmp_path, {"messages": [USER, ANSWER], "answer": "Nowhere"})


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"text": "a", "role": "prompter"}, "role"),
        ({"text": "a", "intent": "ask"}, "intent"),
        ({"prompt": "a", "completion": "b", "suffix": "c"}, "suffix"),
        ({"prompt": "a", "completion": "b", "loss_mask": [1]}, "loss_mask"),
        ({"prompt": "a", "completion": "b", "retrieved_documents": ["c"]}, "retrieved_documents"),
        ({"prompt": "a", "completion": "b", "tool_calls": [CALL]}, "tool_calls"),
        ({"prompt": "a", "completion": "b", "is_correct": False}, "is_correct"),
        ({"text": "a", "label": "x", "title": "b"}, "title"),
        ({"text": "a", "label": "x", "aspect": "b"}, "aspect"),
    ],
)
def test_more_columns_that_carry_meaning(tmp_path: Path, row: dict[str, Any], column: str) -> None:
    rows = [row, {**row, "label": "y"}] if "label" in row else [row]
    with pytest.raises(ConfigError, match=f"has no use for {column}"):
        read(tmp_path, *rows)
    assert column in read(tmp_path, *rows, ignore_columns=(column,)).columns_ignored


# --------------------------------------------------------------------------- messages that are true


def test_a_picture_beside_a_text_is_one_problem(tmp_path: Path) -> None:
    for part in ({"image": {"format": "png"}}, {"type": "image_url", "image_url": {"url": "x"}}):
        content = [{"text": "What is it?", **({"type": "text"} if "type" in part else {})}, part]
        with pytest.raises(DataError, match=r"1 problem in 1 of 1 rows:\n.*content\[1\]: parts of type image"):
            read(tmp_path, {"messages": [{"role": "user", "content": content}, ANSWER]})


CALLED = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "track", "input": {}}]}
PICTURE = {"type": "image", "source": {"data": "AAAA"}}


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (
            [CALLED, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [PICTURE]}]}],
            r"messages\[1\]\.content\[0\]: parts of type image",
        ),
        (
            [CALLED, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1"}, PICTURE]}],
            r"messages\[1\]\.content\[1\]: parts of type image",
        ),
        ([USER, {"type": "web_search_call", "id": "w"}], r"messages\[1\].*parts of type web_search_call"),
        (
            [{"from": "human", "value": "Where?"}, {"from": "function_call", "value": "track(1)"}],
            r"messages\[1\]\.tool_calls: the text is not valid JSON",
        ),
        (
            [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": '<tool_call>{"name": "a"</tool_call>'}],
            r"messages\[1\]\.tool_calls: the text is not valid JSON",
        ),
    ],
)
def test_what_cannot_be_read_is_one_problem_at_its_place(tmp_path: Path, messages: list[Any], problem: str) -> None:
    with pytest.raises(DataError, match=rf"1 problem in 1 of 1 rows:\n.*{problem}"):
        read(tmp_path, {"messages": [*messages, ANSWER]})


def test_an_answer_about_calls_is_not_one(tmp_path: Path) -> None:
    text = 'Write <tool_call>{"name": "x", "arguments": {}}</tool_call>, like this.'
    assert read(tmp_path, {"messages": [USER, {**ANSWER, "content": text}]}).train[0].messages[-1]["content"] == text


def test_ids_that_are_numbers(tmp_path: Path) -> None:
    call = {"id": 5, "type": "function", "function": {"name": "track", "arguments": "{}"}}
    row = [
        USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": 5, "content": "x"},
        ANSWER,
    ]
    assert read(tmp_path, {"messages": row}).train[0].messages[2]["tool_call_id"] == "5"


@pytest.mark.parametrize("name", ["validation", "val", "dev"])
def test_the_split_that_a_file_is_read_for(tmp_path: Path, name: str) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"text": "c", "split": name}) + "\n", encoding="utf-8")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "a", "split": "train"}) + "\n", encoding="utf-8")
    assert len(read_data(DataConfig(train=str(file), validation=str(held)), 0).validation) == 1
    with pytest.raises(ConfigError, match="no use for split"):
        read_data(DataConfig(train=str(held), validation=None), 0)


def test_how_tools_are_called_is_not_a_tool(tmp_path: Path) -> None:
    contents = [{"role": "user", "parts": [{"text": "Where?"}]}, {"role": "model", "parts": [{"text": "Here."}]}]
    row = {"contents": contents, "toolConfig": {"functionCallingConfig": {"mode": "AUTO"}}}
    assert read(tmp_path, row).train[0].tools == ()
    row["tools"] = [{"functionDeclarations": [{"name": "track"}]}]
    assert [tool["function"]["name"] for tool in read(tmp_path, row).train[0].tools] == ["track"]


def test_a_label_of_several_kinds_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a list → a row has one label"):
        read(tmp_path, {"text": "a", "label": ["x", "y"]})
    pq.write_table(pa.table({"text": ["a"], "label": [float("nan")]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="not NaN"):
        read_data(DataConfig(train=str(tmp_path / "rows.parquet"), validation=None), 0)


def test_doubt_names_all_kinds_that_fit(tmp_path: Path) -> None:
    row = {"conversations": [USER, ANSWER], "instruction": "Where?", "response": "Here."}
    with pytest.raises(TuneryError) as error:
        read(tmp_path, row)
    assert error.value.hint == "say which with data.kind: chat or completion"
