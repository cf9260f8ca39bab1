"""Rows as they are sent: every kind in OpenAI's form, and no row that would only fail there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_tokenizer
from tunery.config import DataConfig
from tunery.data.example import Example, Place
from tunery.data.prompts import Prompts
from tunery.data.read import read_data
from tunery.data.render import Renderer
from tunery.errors import ConfigError, DataError
from tunery.hosted.hosted_plan import require_trainable, training_file_lines


def rows(examples: list[Example], wording: Prompts | None = None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in training_file_lines(examples, wording or Prompts())]


def test_a_classification_asks_as_a_model_trained_here_is_asked() -> None:
    example = Example("classification", Place("f", 1), text="a fine film", label="good")
    wording = Prompts(labels=("bad", "good"), instruction="good or bad?", system="be brief")
    renderer = Renderer(tiny_tokenizer(), labels=("bad", "good"), instruction="good or bad?", system="be brief")
    (row,) = rows([example], wording)
    assert set(row) == {"messages"}
    assert renderer.render(example) == renderer.render_conversation(row["messages"])
    assert row["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "good or bad?\n\na fine film"},
        {"role": "assistant", "content": "good"},
    ]


def test_a_conversation_keeps_weights_tools_and_calls() -> None:
    tools = ({"type": "function", "function": {"name": "look_up", "parameters": {}}},)
    call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"x": 1}'}}
    messages = (
        {"role": "user", "content": "héllo"},
        {"role": "assistant", "content": "hm", "weight": 0},
        {"role": "user", "content": "look it up"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "assistant", "content": "it is 42"},
    )
    (row,) = rows([Example("chat", Place("f", 1), messages=messages, tools=tools)], Prompts(system="be kind"))
    assert row["tools"] == list(tools)
    assert row["messages"][0] == {"role": "system", "content": "be kind"}
    assert row["messages"][2] == {"role": "assistant", "content": "hm", "weight": 0}
    assert row["messages"][4] == {"role": "assistant", "content": None, "tool_calls": [call]}
    assert "é" in training_file_lines([Example("chat", Place("f", 1), messages=messages)], Prompts())[0]


def test_a_completion_becomes_a_conversation() -> None:
    example = Example("completion", Place("f", 1), prompt="Say hi", completion="hi")
    assert rows([example]) == [
        {"messages": [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi"}]}
    ]


def test_a_pair_is_written_as_openai_reads_it_and_reads_back_as_it_was(tmp_path: Path) -> None:
    example = Example(
        "preference",
        Place("f", 1),
        messages=({"role": "user", "content": "When?"},),
        chosen=({"role": "assistant", "content": "At ten."},),
        rejected=({"role": "assistant", "content": "Whatever."},),
    )
    (row,) = rows([example])
    assert row == {
        "input": {"messages": [{"role": "user", "content": "When?"}]},
        "preferred_output": [{"role": "assistant", "content": "At ten."}],
        "non_preferred_output": [{"role": "assistant", "content": "Whatever."}],
    }
    (tmp_path / "pairs.jsonl").write_text("".join(training_file_lines([example], Prompts()) * 1) + "\n")
    (again,) = read_data(DataConfig(train=str(tmp_path / "pairs.jsonl"), validation=None), 0).train
    assert (again.messages, again.chosen, again.rejected) == (example.messages, example.chosen, example.rejected)


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (Example("completion", Place("f", 3), prompt=" ", completion="x"), "f:3: the prompt is empty"),
        (
            Example("chat", Place("f", 4), messages=({"role": "assistant", "content": "a", "reasoning_content": "b"},)),
            "f:4: messages with reasoning_content",
        ),
        (
            Example(
                "preference", Place("f", 5), chosen=({"role": "assistant"},) * 3, rejected=({"role": "assistant"},)
            ),
            "f:5: the chosen answer has 3 messages",
        ),
    ],
)
def test_what_no_server_takes_is_named_with_its_place(example: Example, words: str) -> None:
    with pytest.raises(DataError, match=words):
        training_file_lines([example], Prompts())


def test_plain_text_and_too_few_rows_are_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "once upon a time"}\n' * 12)
    with pytest.raises(ConfigError, match=r"plain text.*\n.*kind: completion"):
        require_trainable(read_data(DataConfig(train=str(tmp_path / "text.jsonl"), validation=None), 0))
    (tmp_path / "few.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    with pytest.raises(DataError, match=r"9 training rows.*at least 10"):
        require_trainable(read_data(DataConfig(train=str(tmp_path / "few.jsonl"), validation=None), 0))
