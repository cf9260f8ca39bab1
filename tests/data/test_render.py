"""Which tokens are trained, and that prompts are tokenised as they will be when the model is asked."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.tiny import tiny_tokenizer
from tunery.data.detect import Shape
from tunery.data.example import Example, Place
from tunery.data.prepare import tokenize, tokenize_once
from tunery.data.render import Renderer
from tunery.data.rows import check_row
from tunery.data.source import RawRow as RawRow
from tunery.errors import DataError

MESSAGES = {"messages": "messages"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # as Qwen3: reasoning is shown in the last turn only
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversation(*turns: tuple[str, str] | dict) -> Example:
    messages = [t if isinstance(t, dict) else {"role": t[0], "content": t[1]} for t in turns]
    return Example("chat", Place("chat.jsonl", 3), messages=tuple(messages))


def trained_text(renderer: Renderer, example: Example) -> list[str]:
    """The trained stretches of all rows of an example, decoded."""
    found = []
    for ids, on in renderer.encode(renderer.render(example)):
        stretch: list[int] = []
        for token, is_on in zip([*ids, 0], [*on, False], strict=True):
            if is_on:
                stretch.append(token)
            elif stretch:
                found.append(renderer.tokenizer.decode(stretch))
                stretch = []
    return found


def test_only_the_answers_and_their_end_tokens_are_trained() -> None:
    renderer = Renderer(tiny_tokenizer(CHATML))
    example = conversation(
        ("system", "be kind"), ("user", "hello"), ("assistant", "hi there"), ("user", "bye"), ("assistant", "see you")
    )
    assert trained_text(renderer, example) == ["hi there<|im_end|>", "see you<|im_end|>"]


def test_an_answer_that_repeats_the_question_is_found_by_place_not_by_text() -> None:
    renderer = Renderer(tiny_tokenizer(CHATML))
    example = conversation(("user", "echo: yes"), ("assistant", "yes"), ("user", "yes"), ("assistant", "echo: yes"))
    assert trained_text(renderer, example) == ["yes<|im_end|>", "echo: yes<|im_end|>"]


def test_weight_zero_is_not_trained_and_the_tail_after_the_last_answer_is_left_out() -> None:
    renderer = Renderer(tiny_tokenizer(CHATML))
    example = conversation(
        ("user", "a"),
        {"role": "assistant", "content": "bad", "weight": 0},
        ("user", "b"),
        ("assistant", "good"),
        ("user", "never answered"),
    )
    assert trained_text(renderer, example) == ["good<|im_end|>"]
    assert "never answered" not in renderer.render(example)[0].text


def test_a_template_that_rewrites_earlier_turns_gives_a_row_a_turn() -> None:
    renderer = Renderer(tiny_tokenizer(THINKING))
    example = conversation(("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second"))
    rows = renderer.render(example)
    assert len(rows) == 2
    assert rows[0].text.count("<think>") == rows[1].text.count("<think>") == 1
    answers = trained_text(renderer, example)
    assert [a.replace("<think>\n\n</think>\n\n", "") for a in answers] == ["first<|im_end|>", "second<|im_end|>"]


def test_the_prompt_is_tokenised_as_when_the_model_is_asked() -> None:
    renderer = Renderer(tiny_tokenizer(CHATML))
    for answer in ("\n\nspaced", " leading", "plain"):
        example = conversation(("user", "hello there"), ("assistant", answer))
        ids, trained = renderer.encode(renderer.render(example))[0]
        asked = renderer.encode_prompt(renderer.prompt(example.messages[:1]))
        assert ids[: len(asked)] == asked
        assert trained.index(True) == len(asked)


TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
WITH_TOOLS = (  # what a message holds is written out, so that a key more or less is another prompt
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if 'tool_calls' in m %}"
    "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.q }}){% endfor %}{% endif %}"
    " {{ m.keys() | sort | join }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def call(number: int) -> dict:
    return {"id": f"c{number}", "type": "function", "function": {"name": "look_up", "arguments": '{"q": "x"}'}}


CALLS = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"


@pytest.mark.parametrize("template", [CHATML, WITH_TOOLS, THINKING.replace("{{ m.content }}", CALLS)])
def test_a_request_gives_the_prompt_that_was_trained(template: str) -> None:
    """Messages as OpenAI's client sends them (nulls, parts, refusals, developer), and the row of the same messages."""
    nothing = {"refusal": None, "tool_calls": None, "name": None}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
        {"role": "user", "content": "find x", "name": None},
        {"role": "assistant", **nothing, "content": None, "tool_calls": [call(1), call(2)]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "a film"}]},
        {"role": "tool", "tool_call_id": "c2", "content": ""},
        {"role": "assistant", **nothing, "content": "a good film"},
        {"role": "user", "content": "and y?"},
        {"role": "assistant", "content": None, "refusal": "I cannot say"},
        {"role": "user", "content": "why?"},
        {"role": "assistant", **nothing, "content": "so it is"},
    ]
    example = check_row("chat.jsonl", RawRow(1, {"messages": messages, "tools": TOOLS}), Shape("chat", MESSAGES))
    assert isinstance(example, Example), example
    renderer = Renderer(tiny_tokenizer(template))
    for turn in (2, 5, 7, 9):
        shown = [
            {**m, "weight": int(i == turn)} if m["role"] == "assistant" else m for i, m in enumerate(example.messages)
        ]
        trained = dataclasses.replace(example, messages=tuple(shown[: turn + 1]))
        (row,) = tokenize(renderer, [trained], 2000, "cut").rows
        asked = renderer.encode_prompt(renderer.prompt(messages[:turn], TOOLS))
        assert row.ids[: int(row.weights.nonzero()[0][0])].tolist() == asked


def test_a_part_that_is_no_text_is_refused() -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(DataError, match="a content part of type image_url is not text"):
        Renderer(tiny_tokenizer()).prompt([image])


def test_rows_the_template_refuses_are_all_listed_or_dropped_and_counted() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    good = conversation(("user", "u"), ("assistant", "a"))
    bad = [
        Example("chat", Place("chat.jsonl", n), ({"role": "system", "content": "s"}, *good.messages)) for n in (7, 8)
    ]
    for _ in range(2):  # also after it was seen once
        with pytest.raises(
            DataError, match=r"(?s)2 problems in 2 of 3 rows.*chat\.jsonl:7:.*no system.*chat\.jsonl:8:"
        ):
            tokenize_once(Renderer(tiny_tokenizer(strict)), [bad[0], good, bad[1]], 100, "cut")
        rows = tokenize_once(Renderer(tiny_tokenizer(strict)), [bad[0], good, bad[1]], 100, "cut", "skip")
        assert [row.example for row in rows.rows] == [1]
        assert [where for where, _ in rows.dropped] == ["chat.jsonl:7", "chat.jsonl:8"]


def test_completion_trains_the_completion_and_the_end_token_even_where_a_token_would_straddle() -> None:
    tokenizer = tiny_tokenizer()
    renderer = Renderer(tokenizer)
    example = Example("completion", Place("c.jsonl", 1), prompt="the answer is ", completion="hello")
    ids, trained = renderer.encode(renderer.render(example))[0]
    prompt = renderer.encode_prompt("the answer is ", begin=True)
    assert ids[: len(prompt)] == prompt
    assert trained == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    assert ids[-1] == tokenizer.eos_token_id


def test_text_is_trained_as_a_whole_and_long_text_goes_on_in_further_rows() -> None:
    renderer = Renderer(tiny_tokenizer())
    example = Example("text", Place("t.txt", 1), text="hello there " * 60)
    whole = tokenize(renderer, [example], 10_000, "cut").rows[0]
    parts = tokenize(renderer, [example], 50, "cut")
    assert all(len(row.ids) <= 50 for row in parts.rows)
    assert len(parts.rows) > 2
    joined = [token for row in parts.rows for token in row.ids.tolist()]
    assert joined == whole.ids.tolist()[: len(joined)]
    assert parts.truncated == ([] if len(joined) == len(whole.ids) else [Place("t.txt", 1)])


def test_a_long_prompt_is_cut_from_its_front_and_the_answer_kept_whole() -> None:
    renderer = Renderer(tiny_tokenizer(CHATML))
    example = conversation(("user", "word " * 200), ("assistant", "the whole answer"))
    rows = tokenize(renderer, [example], 60, "cut")
    row = rows.rows[0]
    assert len(row.ids) == 60
    assert renderer.tokenizer.decode(row.ids[row.weights > 0].tolist()) == "the whole answer<|im_end|>"
    assert rows.truncated == ["chat.jsonl:3"]
    dropped = tokenize(renderer, [example], 60, "drop")
    assert dropped.rows == []
    assert "longer than 60 tokens" in dropped.dropped[0][1]


def test_an_earlier_answer_that_lost_its_beginning_is_no_longer_trained() -> None:
    renderer = Renderer(tiny_tokenizer(CHATML))
    example = conversation(("user", "hello"), ("assistant", "word " * 40), ("user", "and?"), ("assistant", "yes"))
    row = tokenize(renderer, [example], 60, "cut").rows[0]
    assert len(row.ids) == 60
    assert renderer.tokenizer.decode(row.ids[row.weights > 0].tolist()) == "yes<|im_end|>"


def test_an_answer_too_long_for_the_limit_is_dropped_and_said() -> None:
    renderer = Renderer(tiny_tokenizer(CHATML))
    example = conversation(("user", "hello"), ("assistant", "word " * 200))
    rows = tokenize(renderer, [example], 60, "cut")
    assert rows.rows == []
    assert rows.dropped == [("chat.jsonl:3", "its answer alone is longer than 60 tokens")]


def test_classification_cuts_the_text_and_keeps_instruction_and_label() -> None:
    renderer = Renderer(tiny_tokenizer(CHATML), labels=["good", "bad"], instruction="Good or bad?")
    example = Example("classification", Place("r.csv", 9), text="what a film " * 100, label="good")
    row = tokenize(renderer, [example], 80, "cut").rows[0]
    text = str(renderer.tokenizer.decode(row.ids.tolist()))
    assert len(row.ids) <= 80
    assert "Good or bad?" in text
    assert text.rstrip().endswith("assistant\ngood<|im_end|>")


def test_tool_calls_are_rendered_or_refused() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": json.dumps({"q": "x"})}}
    example = conversation(("user", "find x"), {"role": "assistant", "content": None, "tool_calls": [call]})
    assert "look_up" in trained_text(Renderer(tiny_tokenizer(CHATML)), example)[0]
    mute = CHATML.replace("{{ c.function.name }}", "")
    with pytest.raises(DataError, match=r"chat\.jsonl:3: .*leaves out the call of look_up"):
        Renderer(tiny_tokenizer(mute)).render(example)


def test_a_refusal_by_the_template_names_the_row() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"chat\.jsonl:3: .*no system role"):
        Renderer(tiny_tokenizer(strict)).render(conversation(("system", "s"), ("user", "u"), ("assistant", "a")))


def test_control_tokens_in_the_text_and_a_missing_end_token_are_remarked() -> None:
    renderer = Renderer(tiny_tokenizer(CHATML))
    renderer.render(conversation(("user", "evil <|im_end|> text"), ("assistant", "a")))
    assert "control tokens" in renderer.remarks.sentences()[0]
    endless = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    renderer = Renderer(tiny_tokenizer(endless))
    renderer.render(conversation(("user", "u"), ("assistant", "a")))
    assert any("no end-of-turn token" in remark for remark in renderer.remarks.sentences())
    assert renderer.end_of_turn is None
