"""What is said of rows that a template or a tokenizer treats in a way the user may not expect."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import CHATML, tiny_tokenizer
from tunery.config import DataConfig
from tunery.data.prepare import Prepared, dated, pieces, prepare
from tunery.data.read import read_data
from tunery.data.render import MOST_ANSWERS
from tunery.errors import ConfigError, DataError

ASK = {"role": "user", "content": "Where is the parcel?"}
SAY = {"role": "assistant", "content": "On its way."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "track", "arguments": "{}"}}
WITH_TOOLS = """{% for t in tools or [] %}{{ t | tojson }}
{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
OPENS_A_THOUGHT = CHATML.rstrip().removesuffix("{% endif %}") + "<think>\n{% endif %}"
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML


def ready(tmp_path: Path, rows: Sequence[dict[str, Any]], template: str = CHATML, **settings: Any) -> Prepared:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(train=str(file), validation=None, **settings)
    return prepare(read_data(config, 0), config, tiny_tokenizer(template), 4096)


def remarks(prepared: Prepared) -> str:
    return "\n".join(prepared.renderer.remarks.sentences())


def trained(prepared: Prepared, row: int = 0) -> list[str]:
    return [text for text, on in pieces(prepared.renderer, prepared.train.rows[row]) if on]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{**ASK, "name": "anna"}, SAY]}, "leaves out the name of a message of the user (1 row)"),
        ({"messages": [ASK, {**SAY, "reasoning_content": "It left on Monday."}]}, "leaves out reasoning_content"),
        ({"messages": [ASK, {**SAY, "content": "a<|im_end|>b"}]}, "holds control tokens"),
        ({"prompt": "a", "completion": "b<|im_end|>"}, "holds control tokens"),
        ({"text": "a<|im_end|>"}, "holds control tokens"),
        ({"prompt": "", "completion": "b"}, "the first token of an answer is not trained"),
    ],
)
def test_what_is_remarked(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    assert words in remarks(ready(tmp_path, [row]))


def test_rows_as_they_should_be_are_passed_over_in_silence(tmp_path: Path) -> None:
    answer = {"role": "tool", "tool_call_id": "c1", "content": '{"place": "Oslo \\u00e9"}'}
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    tools = [{"type": "function", "function": {"name": "track"}}]
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, ASK, SAY, ASK, SAY]},
        {"messages": [ASK, call, answer, SAY], "tools": tools},
    ]
    assert remarks(ready(tmp_path, rows, WITH_TOOLS)) == ""


def test_calls_that_do_not_fit(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    found = remarks(ready(tmp_path, [{"messages": [ASK, call, ASK, SAY], "tools": [TOOL]}] * 2, WITH_TOOLS))
    assert "a tool is called that the row does not offer: track (2 rows)" in found
    assert "a call of track is followed by something else than the tool's answer (2 rows)" in found


def test_what_a_role_says_may_be_left_out(tmp_path: Path) -> None:
    template = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'tool' %}"
    )
    template = template.replace("{{ message['content'] }}", "{{ message['content'] }}{{ message.tool_calls or '' }}")
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    answer = {"role": "tool", "tool_call_id": "c1", "content": "It reached Hammerfest."}
    found = remarks(ready(tmp_path, [{"messages": [ASK, call, answer, SAY]}], template))
    assert "leaves out what a message of the tool says (1 row)" in found


# --------------------------------------------------------------------------- thoughts


def test_a_template_that_writes_more_white_space_leaves_nothing_out(tmp_path: Path) -> None:
    template = CHATML.replace(
        "{{ message['content'] }}", "{{ message['content'] | replace('</think>\\n', '</think>\\n\\n') }}"
    )
    content = "<think>\nSix times seven.\n</think>\n42"
    prepared = ready(tmp_path, [{"messages": [ASK, {**SAY, "content": content}]}], template)
    assert trained(prepared) == ["<think>\nSix times seven.\n</think>\n\n42<|im_end|>"]
    assert remarks(prepared) == ""


@pytest.mark.parametrize("content", ["<think>\n42</think>\n42", "42</think>\n42"])
def test_what_the_generation_prompt_opens_is_not_trained(tmp_path: Path, content: str) -> None:
    prepared = ready(tmp_path, [{"messages": [ASK, {**SAY, "content": content}]}], OPENS_A_THOUGHT)
    assert trained(prepared) == ["42</think>\n42<|im_end|>"]
    assert remarks(prepared) == ""


def test_an_answer_without_the_thought_that_is_opened(tmp_path: Path) -> None:
    found = remarks(ready(tmp_path, [{"messages": [ASK, SAY]}], OPENS_A_THOUGHT))
    assert r"ends with '<think>\n', and this answer begins without it (1 row)" in found


def test_thoughts_that_the_template_drops(tmp_path: Path) -> None:
    template = CHATML.replace("{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] }}")
    content = "<think>\nThe parcel left on Monday, so it is near.\n</think>\nOn its way."
    found = remarks(ready(tmp_path, [{"messages": [ASK, {**SAY, "content": content}]}], template))
    assert "leaves out the beginning of an answer, such as its thoughts (1 row)" in found


# --------------------------------------------------------------------------- system messages and dates


def test_a_system_message_of_the_task_that_the_template_refuses(tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}" + CHATML
    with pytest.raises(ConfigError, match=r"data\.system: .*no system messages"):
        ready(tmp_path, [{"messages": [ASK, SAY]}], refusing, system="Be brief.")
    with pytest.raises(DataError, match=r"rows\.jsonl:1:\(row\): .*no system messages"):
        ready(tmp_path, [{"messages": [{"role": "system", "content": "s"}, ASK, SAY]}], refusing, system="Be brief.")


def test_a_date_in_the_template_is_the_task_s(tmp_path: Path) -> None:
    day = datetime.date(2024, 2, 29)
    rows = [{"messages": [ASK, SAY]}]
    prepared = ready(tmp_path, rows, DATED, date=day)
    text = prepared.renderer.tokenizer.decode(prepared.train.rows[0].ids.tolist())
    assert str(text).startswith("<|im_start|>system\nToday is 29 Feb 2024<|im_end|>\n<|im_start|>user")
    assert "writes a date, which is 2024-02-29 throughout (data.date) (1 row)" in remarks(prepared)
    other = ready(tmp_path, rows, DATED, date=datetime.date(2024, 3, 1))
    assert other.train.sha256() != prepared.train.sha256()
    assert ready(tmp_path, rows, DATED, date=day).train.sha256() == prepared.train.sha256()


def test_the_day_is_today_s_where_nothing_is_said_and_only_where_it_is_written() -> None:
    config = DataConfig(train="x")
    today = datetime.datetime.now().astimezone().date()
    assert dated(config, tiny_tokenizer(DATED)).date in (today, today + datetime.timedelta(days=1))
    assert dated(config, tiny_tokenizer(CHATML)).date is None
    begun = datetime.date(2024, 1, 2)
    assert dated(config, tiny_tokenizer(DATED), begun).date == begun
    assert dated(config.model_copy(update={"date": today}), tiny_tokenizer(DATED), begun).date == today


# --------------------------------------------------------------------------- long rows


def turns(count: int) -> list[dict[str, Any]]:
    return [
        message
        for number in range(count)
        for message in (
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}", **({"weight": 0} if number % 5 == 3 else {})},
        )
    ]


@pytest.mark.parametrize("head", [[], [{"role": "system", "content": "Be brief."}]])
def test_answers_of_a_long_conversation_are_found_as_those_of_short_ones(
    tmp_path: Path, head: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"messages": [*head, *turns(40)]}]
    quick = ready(tmp_path, rows, too_long="cut")
    monkeypatch.setattr("tunery.data.render.LONG_CONVERSATION", 1000)
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path / "other"))
    one_by_one = ready(tmp_path, rows)
    assert quick.train.sha256() == one_by_one.train.sha256()
    assert len(trained(quick)) == 32


def test_a_template_that_rewrites_earlier_turns_is_noticed_in_long_conversations_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewriting = CHATML.replace(
        "{{ message['content'] }}", "{{ message['content'] }}{% if loop.last %} (last){% endif %}"
    )
    rows = [{"messages": turns(20)}]
    quick = ready(tmp_path, rows, rewriting)
    monkeypatch.setattr("tunery.data.render.LONG_CONVERSATION", 1000)
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path / "other"))
    assert quick.train.sha256() == ready(tmp_path, rows, rewriting).train.sha256()
    assert len(quick.train.rows) == 16
    monkeypatch.setattr("tunery.data.render.LONG_CONVERSATION", 8)
    with pytest.raises(DataError, match="are too many for this model's chat template"):
        ready(tmp_path, [{"messages": turns(2 * MOST_ANSWERS)}], rewriting)
