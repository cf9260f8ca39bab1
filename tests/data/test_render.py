"""Which tokens are trained, and that prompts are tokenised as they will be when the model is asked."""

from __future__ import annotations

import json

import pytest

from tests.tiny import tiny_tokenizer
from tunery.data.example import Example
from tunery.data.prepare import tokenize
from tunery.data.render import Renderer
from tunery.errors import DataError

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
    return Example("chat", "chat.jsonl:3", messages=tuple(messages))


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
        ("user", "a"), {"role": "assistant", "content": "bad", "weight": 0}, ("user", "b"), ("assistant", "good"),
        ("user", "never answered"),
    )  # fmt: skip
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


def test_completion_trains_the_completion_and_the_end_token_even_where_a_token_would_straddle() -> None:
    tokenizer = tiny_tokenizer()
    renderer = Renderer(tokenizer)
    example = Example("completion", "c.jsonl:1", prompt="the answer is ", completion="hello")
    ids, trained = renderer.encode(renderer.render(example))[0]
    prompt = renderer.encode_prompt("the answer is ", begin=True)
    assert ids[: len(prompt)] == prompt
    assert trained == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    assert ids[-1] == tokenizer.eos_token_id


def test_text_is_trained_as_a_whole_and_long_text_goes_on_in_further_rows() -> None:
    renderer = Renderer(tiny_tokenizer())
    example = Example("text", "t.txt:1", text="hello there " * 60)
    whole = tokenize(renderer, [example], 10_000, "cut").rows[0]
    parts = tokenize(renderer, [example], 50, "cut")
    assert all(len(row.ids) <= 50 for row in parts.rows)
    assert len(parts.rows) > 2
    joined = [token for row in parts.rows for token in row.ids.tolist()]
    assert joined == whole.ids.tolist()[: len(joined)]
    assert parts.truncated == ([] if len(joined) == len(whole.ids) else ["t.txt:1"])


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
    example = Example("classification", "r.csv:9", text="what a film " * 100, label="good")
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
