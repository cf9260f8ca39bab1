import json
from decimal import Decimal

import pytest

from tunery.data.detect import Shape
from tunery.data.example import Example, Place
from tunery.data.kinds.values import MOST_HINTS, label_map
from tunery.data.rows import check_row
from tunery.data.source import RawRow

CHAT = Shape("chat", {"messages": "messages"})
COMPLETION = Shape("completion", {"prompt": "prompt", "completion": "completion"})
ALPACA = Shape("completion", {"prompt": "instruction", "completion": "output"})
TEXT = Shape("text", {"text": "text"})
LABELLED = Shape("classification", {"text": "text", "label": "label"})

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


def good(shape, value, labels=None) -> Example:
    result = check_row("f.jsonl", RawRow(7, value), shape, labels)
    assert isinstance(result, Example), result
    return result


def bad(shape, value, labels=None) -> list[tuple[str, str, str]]:
    result = check_row("f.jsonl", RawRow(7, value), shape, labels)
    assert isinstance(result, list), result
    assert all((p.file, p.line) == ("f.jsonl", 7) and p.fix for p in result)
    return [(p.field, p.message, p.fix) for p in result]


def chat(*messages, **more):
    return {"messages": list(messages), **more}


class TestTexts:
    def test_a_text(self):
        assert good(TEXT, {"text": "a", "id": 3}) == Example("text", Place("f.jsonl", 7), text="a")
        assert good(TEXT, "plain").text == "plain"

    @pytest.mark.parametrize(
        ("value", "message"),
        [("", "empty"), (" \n", "empty"), (None, "not null"), (3, "not a number"), (["a"], "not a list")],
    )
    def test_a_text_must_say_something(self, value, message):
        [(field, words, _)] = bad(TEXT, {"text": value})
        assert field == "text"
        assert message in words

    def test_a_missing_key_suggests_a_near_one(self):
        assert bad(TEXT, {"tekst": "a"}) == [("text", "missing", "did you mean tekst?")]

    def test_prompt_and_completion(self):
        example = good(COMPLETION, {"prompt": "", "completion": " yes"})
        assert (example.prompt, example.completion) == ("", " yes")

    def test_every_problem_of_a_row_is_reported(self):
        found = bad(COMPLETION, {"prompt": [USER], "completion": " "})
        assert [field for field, _, _ in found] == ["prompt", "completion"]
        assert "messages" in found[0][2]

    @pytest.mark.parametrize(("extra", "prompt"), [("a, b", "Sort.\n\na, b"), ("", "Sort."), (None, "Sort.")])
    def test_alpaca_input_goes_under_the_instruction(self, extra, prompt):
        assert good(ALPACA, {"instruction": "Sort.", "input": extra, "output": "b, a"}).prompt == prompt
        assert good(ALPACA, {"instruction": "Sort.", "output": "b"}).prompt == "Sort."


class TestLabels:
    @pytest.mark.parametrize(
        ("value", "label"),
        [("x", "x"), (" x ", "x"), (1, "1"), (1.0, "1"), (0.5, "0.5"), (True, "true"), (Decimal("3"), "3")],
    )
    def test_labels_are_texts(self, value, label):
        assert good(LABELLED, {"text": "a", "label": value}).label == label

    @pytest.mark.parametrize("value", [1, "1", 1.0, "1.0", " 1 "])
    def test_a_map_renames_however_the_file_writes_the_number(self, value):
        labels = label_map({"0": "negative", "1": "positive"})
        assert good(LABELLED, {"text": "a", "label": value}, labels).label == "positive"

    def test_a_map_may_be_written_with_floats_or_booleans(self):
        assert good(LABELLED, {"text": "a", "label": 1}, label_map({"1.0": "yes"})).label == "yes"
        assert good(LABELLED, {"text": "a", "label": "True"}, label_map({"true": "yes"})).label == "yes"

    def test_classes_can_be_merged(self):
        labels = label_map({"1": "bad", "2": "bad", "3": "good"})
        assert good(LABELLED, {"text": "a", "label": 2}, labels).label == "bad"

    @pytest.mark.parametrize("value", [None, "", " ", ["x"], {"a": 1}, float("nan")])
    def test_what_is_no_label(self, value):
        [(field, _, _)] = bad(LABELLED, {"text": "a", "label": value})
        assert field == "label"

    def test_an_unknown_label_lists_the_known_ones(self):
        [(field, message, fix)] = bad(LABELLED, {"text": "a", "label": "postive"}, label_map(("negative", "positive")))
        assert (field, message) == ("label", "'postive' is not one of the labels")
        assert fix == "did you mean positive? known here: negative, positive; or add it to data.labels"

    def test_hints_for_unknown_labels_end_but_the_known_ones_are_always_named(self):
        labels = label_map(("negative", "positive"))
        fixes = [bad(LABELLED, {"text": "a", "label": f"postive {n}"}, labels)[0][2] for n in range(MOST_HINTS + 1)]
        assert all(fix.startswith("did you mean positive?") for fix in fixes[:-1])
        assert fixes[-1] == "known here: negative, positive; or add it to data.labels"


class TestConversations:
    def test_openai_form(self):
        tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
        value = chat(
            {"role": "system", "content": "Be brief."},
            {**USER, "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
            {**ANSWER, "weight": 1, "refusal": None},
            tools=tools,
        )
        example = good(CHAT, value)
        assert [m["role"] for m in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
        assert example.messages[2] == {"role": "assistant", "content": "", "tool_calls": [CALL], "weight": 0}
        assert example.messages[3]["tool_call_id"] == "c1"
        assert example.messages[4] == {**ANSWER, "weight": 1}
        assert example.tools == tuple(tools)

    def test_text_parts_are_joined(self):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
        assert good(CHAT, chat({"role": "user", "content": parts}, ANSWER)).messages[0]["content"] == "a b"

    def test_messages_after_the_last_trained_answer_are_left_out(self):
        value = chat(USER, ANSWER, USER, {**ANSWER, "weight": 0})
        assert len(good(CHAT, value).messages) == 2

    def test_sharegpt(self):
        shape = Shape("chat", {"messages": "conversations"})
        turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]
        example = good(shape, {"conversations": turns})
        assert [(m["role"], m["content"]) for m in example.messages] == [
            ("system", "s"),
            ("user", "h"),
            ("assistant", "g"),
        ]
        found = bad(shape, {"conversations": [{"from": "robot", "value": 3}, turns[2]]})
        assert [field for field, _, _ in found] == ["conversations[0].from", "conversations[0].value"]

    def test_a_table_may_hold_json_text_and_null_for_absent_keys(self):
        assert good(CHAT, {"messages": json.dumps([USER, ANSWER]), "tools": ""}).messages == (USER, ANSWER)
        padded = [
            {"role": m["role"], "content": m["content"], "weight": None, "tool_calls": None} for m in (USER, ANSWER)
        ]
        assert good(CHAT, {"messages": padded, "tools": None}).messages == (USER, ANSWER)
        assert good(CHAT, chat(USER, {**ANSWER, "weight": 1.0})).messages[1]["weight"] == 1

    def test_a_refusal_is_what_the_assistant_says(self):
        message = {"role": "assistant", "content": None, "refusal": "I cannot."}
        assert good(CHAT, chat(USER, message)).messages[1]["content"] == "I cannot."

    @pytest.mark.parametrize(
        ("value", "field", "words"),
        [
            ({}, "messages", "missing"),
            ({"messages": []}, "messages", "empty"),
            ({"messages": None}, "messages", "not null"),
            ({"messages": "not json"}, "messages", "not valid JSON"),
            ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, "messages", "half of a surrogate pair"),
            (chat("hello", ANSWER), "messages[0]", "not a text"),
            (chat(USER), "messages", "no assistant message"),
            (chat(USER, {**ANSWER, "weight": 0}), "messages", "weight 0"),
            (chat({"content": "x"}, ANSWER), "messages[0].role", "missing"),
            (chat({"role": "usr", "content": "x"}, ANSWER), "messages[0].role", "unknown role 'usr'"),
            (chat({"role": ["user"], "content": "x"}, ANSWER), "messages[0].role", "unknown role"),
            (chat({"role": "function", "name": "f", "content": "x"}, ANSWER), "messages[0].tool_call_id", "calls 'f'"),
            (chat({"role": "user"}, ANSWER), "messages[0].content", "missing"),
            (chat({"role": "user", "content": 5}, ANSWER), "messages[0].content", "not a number"),
            (chat(USER, {"role": "assistant", "content": " "}), "messages[1].content", "answer is empty"),
            (chat(USER, {**ANSWER, "refusal": "No."}), "messages[1].content", "both"),
            (chat({**USER, "weight": 1}, ANSWER), "messages[0].weight", "only assistant"),
            (chat(USER, {**ANSWER, "weight": 0.5}), "messages[1].weight", "0 or 1"),
            (chat(USER, {**ANSWER, "weight": True}), "messages[1].weight", "0 or 1"),
            (chat(USER, {**ANSWER, "wieght": 1}), "messages[1].wieght", "unknown key"),
            (chat(USER, {**ANSWER, "audio": {"id": "a"}}), "messages[1].audio", "not supported"),
            (chat(USER, {**ANSWER, "function_call": "f"}), "messages[1].function_call", "unknown key"),
            (chat({**USER, "name": 3}, ANSWER), "messages[0].name", "not a number"),
            (chat({**USER, "tool_calls": [CALL]}, ANSWER), "messages[0].tool_calls", "only the assistant"),
            (chat({"role": "tool", "content": "x"}, ANSWER), "messages[0].tool_call_id", "missing"),
            (chat({"role": "tool", "content": "x", "tool_call_id": "c1"}, ANSWER), "messages[0].tool_call_id", "'c1'"),
            (chat({"role": "tool", "content": "x", "tool_call_id": [1]}, ANSWER), "messages[0].tool_call_id", "[1]"),
            (chat({**USER, "tool_call_id": "c1"}, ANSWER), "messages[0].tool_call_id", "only tool"),
            (chat(USER, ANSWER, tools={"a": 1}), "tools", "not an object"),
            (chat(USER, ANSWER, tools=["weather"]), "tools[0]", "not a text"),
            (chat(USER, ANSWER, tools=[{"type": "function"}]), "tools[0].function", "not null"),
            (
                chat(USER, ANSWER, tools=[{"type": "function", "function": {"name": "x", "p": b"y"}}]),
                "tools",
                "only hold what JSON can",
            ),
        ],
    )
    def test_one_problem_with_its_path(self, value, field, words):
        found = bad(CHAT, value)
        assert found[0][0] == field, found
        assert words in found[0][1]

    def test_image_parts_are_named(self):
        parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
        [(field, message, _)] = bad(CHAT, chat({"role": "user", "content": parts}, ANSWER))
        assert field == "messages[0].content[1]"
        assert "image_url" in message

    def test_all_problems_of_tool_calls(self):
        calls = [{"id": "c1", "type": "function", "function": {"name": "", "arguments": 5}}, {"id": [3]}, 3]
        found = bad(CHAT, chat(USER, {"role": "assistant", "tool_calls": calls}))
        assert [field.removeprefix("messages[1].tool_calls") for field, _, _ in found] == [
            "[0].function.name",
            "[0].function.arguments",
            "[1].function",
            "[1].id",
            "[2]",
        ]

    def test_arguments_must_be_json(self):
        call = {**CALL, "function": {"name": "weather", "arguments": "{city: Oslo}"}}
        [(field, _, _)] = bad(CHAT, chat(USER, {"role": "assistant", "tool_calls": [call]}))
        assert field == "messages[1].tool_calls[0].function.arguments"

    def test_problems_of_several_messages_come_together(self):
        value = chat({"role": "usr", "content": "x"}, {"role": "user", "contents": "y"})
        assert [field for field, _, _ in bad(CHAT, value)] == [
            "messages[0].role",
            "messages[1].contents",
            "messages[1].content",
            "messages",
        ]
