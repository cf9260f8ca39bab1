"""Pairs of answers in every form people write them, what is wrong with them, and the tokens they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import tiny_tokenizer
from tunery.config import Columns, DataConfig
from tunery.data.detect import Shape, detect
from tunery.data.example import Example, Problem
from tunery.data.kinds import KINDS
from tunery.data.prepare import tokenize
from tunery.data.read import read_data, read_more
from tunery.data.render import Renderer
from tunery.data.rows import check_row
from tunery.data.source import RawRow
from tunery.errors import ConfigError, DataError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is this?"}
GOOD = {"role": "assistant", "content": "a film"}
BAD = {"role": "assistant", "content": "no idea"}
CALL: dict[str, Any] = {
    "role": "assistant",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "a film"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def shape_of(row: dict[str, Any]) -> Shape:
    return detect([row], DataConfig(train="rows.jsonl"))


def read(row: dict[str, Any], shape: Shape | None = None) -> Example:
    result = check_row("rows.jsonl", RawRow(3, row), shape or shape_of(row))
    assert isinstance(result, Example), result
    return result


def problems(row: dict[str, Any], shape: Shape | None = None) -> list[Problem]:
    result = check_row("rows.jsonl", RawRow(3, row), shape or shape_of(row))
    assert isinstance(result, list), result
    return result


FORMS = {
    "openai": {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    "openai, older": {"input": {"messages": [USER]}, "preferred_completion": [GOOD], "non_preferred_completion": [BAD]},
    "openai, parallel": {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": False},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    },
    "texts": {"prompt": "What is this?", "chosen": "a film", "rejected": "no idea"},
    "question": {"question": "What is this?", "chosen": "a film", "rejected": "no idea"},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "text and messages": {"prompt": "What is this?", "chosen": [GOOD], "rejected": [BAD]},
    "whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "whole conversations and their prompt": {
        "prompt": "What is this?",
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
    },
    "prompt null": {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "sharegpt": {
        "prompt": [{"from": "human", "value": "What is this?"}],
        "chosen": [{"from": "gpt", "value": "a film"}],
        "rejected": [{"from": "gpt", "value": "no idea"}],
    },
    "content in parts": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "What is this?"}]}],
        "chosen": [GOOD],
        "rejected": [BAD],
    },
}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_is_found_by_itself_and_means_the_same(form: str) -> None:
    assert shape_of(FORMS[form]).kind == "preference"
    example = read(FORMS[form])
    assert example.kind == "preference"
    assert example.where == "rows.jsonl:3"
    assert list(example.messages) == [USER]
    assert (list(example.chosen), list(example.rejected)) == ([GOOD], [BAD])


def test_own_column_names() -> None:
    row = {"frage": "What is this?", "gut": "a film", "schlecht": "no idea"}
    columns = Columns(prompt="frage", chosen="gut", rejected="schlecht")
    shape = detect([row], DataConfig(train="rows.jsonl", columns=columns))
    assert shape.kind == "preference"
    assert read(row, shape).messages[0]["content"] == "What is this?"


def test_a_misspelt_column_is_answered_with_the_nearest() -> None:
    config = DataConfig(train="rows.jsonl", columns=Columns(chosen="choosen"))
    with pytest.raises(ConfigError, match="did you mean chosen"):
        detect([{"prompt": "q", "chosen": "a", "rejected": "b"}], config)


def test_alpacas_input_follows_its_instruction() -> None:
    example = read({"instruction": "Translate.", "input": "chat", "chosen": "cat", "rejected": "dog"})
    assert example.messages[0]["content"] == "Translate.\n\nchat"


def test_tools_and_answers_of_several_messages() -> None:
    row = {
        "input": {"messages": [USER], "tools": [TOOL]},
        "preferred_output": [CALL, RESULT, GOOD],
        "non_preferred_output": [BAD],
    }
    example = read(row)
    assert example.tools == (TOOL,)
    assert [m["role"] for m in example.chosen] == ["assistant", "tool", "assistant"]


def test_earlier_answers_that_both_conversations_share_are_part_of_the_prompt() -> None:
    beginning = [SYSTEM, USER, GOOD, {"role": "user", "content": "Is it good?"}]
    example = read({"chosen": [*beginning, GOOD], "rejected": [*beginning, BAD]})
    assert list(example.messages) == beginning
    assert list(example.chosen) == [GOOD]


@pytest.mark.parametrize(
    ("row", "field", "words"),
    [
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "rejected", "both answers are the same"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, "rejected", "both answers are the same"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "rejected", "both answers are the same"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt", "empty"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "chosen", "the answer is empty"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "chosen", "empty"),
        ({"prompt": "q", "chosen": 5, "rejected": "b"}, "chosen", "not a number"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "prompt", "not a number"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected", "missing"),
        ({"chosen": "a", "rejected": "b"}, "chosen", "there is no prompt"),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, "chosen", "begin differently"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "chosen", "continues where this one ends"),
        ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "prompt", "do not begin with"),
        ({"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]}, "chosen", "ends with an assistant"),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, SYSTEM, BAD]},
            "chosen",
            "begins with an assistant message, not with role user",
        ),
        ({"prompt": [USER], "chosen": [GOOD | {"weight": 0}], "rejected": [BAD]}, "chosen", "is compared"),
        (
            {"prompt": [USER, GOOD | {"weight": 1}, USER], "chosen": [GOOD], "rejected": [BAD]},
            "prompt",
            "is not trained",
        ),
        (
            {"prompt": [USER], "chosen": [{"role": "asistant", "content": "a"}], "rejected": [BAD]},
            "chosen[0].role",
            "unknown role",
        ),
        (
            {"input": {"message": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "input.message",
            "unknown key",
        ),
        (
            {"input": {"messages": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "input.messages",
            "empty",
        ),
        (
            {"input": {"messages": [USER], "tools": [{}]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "input.tools[0].type",
            "missing",
        ),
        (
            {
                "input": {"messages": [USER], "parallel_tool_calls": "no"},
                "preferred_output": [GOOD],
                "non_preferred_output": [BAD],
            },
            "input.parallel_tool_calls",
            "true or false is needed",
        ),
        (
            {"prompt": [USER, CALL], "chosen": [RESULT | {"tool_call_id": "c2"}, GOOD], "rejected": [BAD]},
            "chosen[0].tool_call_id",
            "no earlier message makes the tool call",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_field(row: dict[str, Any], field: str, words: str) -> None:
    found = problems(row)
    assert [p for p in found if p.field == field and words in p.message], found
    assert all(p.fix for p in found)
    assert str(found[0]).startswith("rows.jsonl:3:")


def test_all_problems_of_a_row_and_of_all_rows_are_told_at_once(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "", "chosen": "", "rejected": 3},
        {"promt": "q", "chosen": "a", "rejected": "b"},
        {"input": {"mesages": [USER]}, "chosen": [GOOD], "rejected": [GOOD]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(file), columns=Columns(prompt="prompt"))
    with pytest.raises(DataError) as error:
        read_data(config, 0)
    said = str(error.value)
    for place in (":2:prompt: empty", ":2:chosen:", ":2:rejected:", ":3:chosen: there is no prompt"):
        assert f"rows.jsonl{place}" in said


def test_an_input_with_a_misspelt_key_says_which_was_meant() -> None:
    row = {"input": {"mesages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}
    said = " ".join(map(str, problems(row)))
    assert "did you mean messages?" in said


# --------------------------------------------------------------------------- splitting


def write(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_the_same_prompt_is_never_on_both_sides(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i // 4}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    data = read_data(DataConfig(train=write(tmp_path, rows), validation=0.3), 0)
    asked = [{e.messages[-1]["content"] for e in part} for part in (data.train, data.validation)]
    assert len(data.train) + len(data.validation) == 40
    assert data.validation
    assert not asked[0] & asked[1]


def test_pairs_that_repeat_are_counted_and_another_answer_is_no_repetition(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [pair, pair, pair | {"rejected": "c"}, {"prompt": "r", "chosen": "a", "rejected": "b"}]
    data = read_data(DataConfig(train=write(tmp_path, rows), validation=None, duplicates="drop"), 0)
    assert (len(data.train), data.duplicates) == (3, 1)


def test_pairs_that_contradict_each_other_are_said(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "b", "rejected": "a"},
        {"prompt": "r", "chosen": "b", "rejected": "a"},
    ]
    data = read_data(DataConfig(train=write(tmp_path, rows), validation=None), 0)
    [remark] = KINDS["preference"].remarks(data.train)
    assert "contradicts" in remark
    assert remark.endswith(": 2")


def test_a_further_file_is_read_as_the_first_was(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    columns = {"chosen": "chosen", "rejected": "rejected", "prompt": "prompt"}
    more = read_more(path, DataConfig(train=path), "preference", (), columns)
    assert more.test[0].chosen[0]["content"] == "a"


# --------------------------------------------------------------------------- tokens

RENDERER = Renderer(tiny_tokenizer(), system="Be kind.")


def example(prompt: str, chosen: str, rejected: str) -> Example:
    return read({"prompt": prompt, "chosen": chosen, "rejected": rejected})


def texts(rows: list[Any]) -> list[tuple[str, str]]:
    """(the whole, the trained part) of each row."""
    decode = RENDERER.tokenizer.decode
    return [(str(decode(r.ids.tolist())), str(decode(r.ids[r.weights > 0].tolist()))) for r in rows]


def test_both_answers_are_rendered_after_one_prompt_and_only_they_are_trained() -> None:
    rows = tokenize(RENDERER, [example("hello", "good film", "bad")], 200, "cut")
    assert (rows.unit, rows.units) == (2, 1)
    start = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert texts(rows.rows) == [
        (f"{start}good film<|im_end|>\n", "good film<|im_end|>"),
        (f"{start}bad<|im_end|>\n", "bad<|im_end|>"),
    ]


def test_earlier_answers_in_the_prompt_are_not_trained() -> None:
    row = {"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]}
    rows = tokenize(RENDERER, [read(row)], 200, "cut").rows
    assert [trained for _, trained in texts(rows)] == ["a film<|im_end|>", "no idea<|im_end|>"]


def test_a_long_prompt_is_cut_at_the_front_alike_for_both_answers() -> None:
    whole = tokenize(RENDERER, [example("hello there " * 20, "a", "a very good film")], 500, "cut")
    limit = len(whole.rows[1].ids) - 15
    cut = tokenize(RENDERER, [example("hello there " * 20, "a", "a very good film")], limit, "cut")
    assert cut.truncated == ["rows.jsonl:3"]
    chosen, rejected = cut.rows
    assert len(rejected.ids) == limit
    prompt = int(np.flatnonzero(chosen.weights)[0])
    assert np.array_equal(chosen.ids[:prompt], rejected.ids[:prompt])
    for before, after in zip(whole.rows, cut.rows, strict=True):
        assert len(before.ids) - len(after.ids) == 15  # also from the one that would have fitted
        assert before.trained == after.trained
        assert after.ids[0] == before.ids[0]  # a row still starts with the first token of every row
        assert np.array_equal(after.ids[1:], before.ids[16:])


@pytest.mark.parametrize(
    ("too_long", "limit", "words"), [("drop", 60, "longer than 60 tokens"), ("cut", 20, "answers alone are longer")]
)
def test_pairs_that_do_not_fit_are_dropped_whole_and_counted(too_long: str, limit: int, words: str) -> None:
    long = "a film and a film, " * 10
    rows = tokenize(RENDERER, [example("q", "a", long)], limit, too_long)
    assert rows.rows == []
    assert [(where, words in reason) for where, reason in rows.dropped] == [("rows.jsonl:3", True)]


def test_answers_that_differ_only_where_the_template_does_not_look_are_dropped() -> None:
    stripping = tiny_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = tokenize(Renderer(stripping), [example("q", "a film", "a film ")], 100, "cut")
    assert rows.rows == []
    assert rows.dropped == [("rows.jsonl:3", "both answers are the same tokens")]
