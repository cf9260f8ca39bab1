"""The tuned model's answers: as it was asked for them, or as a person kept them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tunery.data.example import DataSet, Example
from tunery.data.kinds import KINDS
from tunery.data.prompts import Prompts
from tunery.errors import DataError
from tunery.hosted.ask import Answer, answer_of
from tunery.hosted.questions import Question, question, shown
from tunery.jsonl import read_lines

Answered = tuple[Question, Answer]


def held_out_questions(data: DataSet, limit: int | None = None) -> list[Question]:
    """The held-out rows of a job, at most `limit`, as its model is asked them; those with a tool call as answer not."""
    found = (_as_asked(example) for example in data.validation)
    return [one for one in found if one is not None][:limit]


def _as_asked(example: Example) -> Question | None:
    if KINDS[example.kind].templated:
        return question(example, Prompts())
    return Question(
        example.where, (), reference=example.completion, shown=example.prompt, prompt=example.prompt
    )  # such a model completes; it knows no conversations


def read_answers(path: Path) -> list[Answered]:
    """The questions and answers in an answers.jsonl; of one question the last."""
    found: dict[str, Answered] = {}
    for line in read_lines(path):
        try:
            answered = _question_of(line), answer_of(line)
        except (KeyError, TypeError, ValueError):
            continue
        found[answered[0].key] = answered
    return list(found.values())


def _question_of(line: dict[str, Any]) -> Question:
    messages = tuple(dict(message) for message in line.get("messages", ()))
    prompt = str(line.get("prompt", ""))
    if not messages and not prompt:
        raise KeyError("messages")
    return Question(
        where=str(line.get("where", "")),
        messages=messages,
        tools=tuple(line.get("tools", ())),
        reference=str(line.get("reference", "")),
        shown=prompt or shown(messages),
        prompt=prompt,
    )


def lines_from(path: Path, known: Sequence[Question]) -> list[dict[str, Any]]:
    """A person's own file of answers, as lines of answers.jsonl.

    A row is a conversation whose last message is what the tuned model answered, {"prompt", "completion"}, or a line of
    another answers.jsonl.

    Args:
        known: questions of held-out rows, whose references are taken for answers to the same.

    Raises:
        DataError: rows that are none of these, each with its place; or the file is no UTF-8 text.
    """
    references = {one.key: one.reference for one in known}
    problems, found = [], []
    for number, text in enumerate(_text(path).split("\n"), start=1):  # JSON may hold the other line ends
        if not text.strip():
            continue
        try:
            line = _as_line(json.loads(text))
            asked = _question_of(line)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            problems.append(
                f"{path}:{number}: neither a conversation that ends with an answer nor a line of answers.jsonl"
            )
            continue
        line |= {"key": asked.key, "where": line.get("where") or f"{path}:{number}"}
        line["reference"] = line.get("reference") or references.get(asked.key, "")
        found.append({"model": "given", "longest": 0, **line})
    if problems or not found:
        raise DataError(
            "\n".join(problems[:20]) or f"{path} holds no answers", "see docs/how-to.md, Migrate a model from OpenAI"
        )
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text", "save it as UTF-8") from None


def _as_line(row: dict[str, Any]) -> dict[str, Any]:
    if "answer" in row:
        return dict(row)
    if "completion" in row:
        return {"prompt": row["prompt"], "answer": row["completion"]}
    *asked, last = row["messages"]
    if last["role"] != "assistant" or not isinstance(last["content"], str):
        raise KeyError("content")
    unweighted = [{key: value for key, value in message.items() if key != "weight"} for message in asked]
    return {"messages": unweighted, "answer": last["content"], **({"tools": row["tools"]} if row.get("tools") else {})}


def common_labels(references: Iterable[str]) -> tuple[str, ...]:
    """The labels, where the answers of a set of rows are a few short texts again and again; else none.

    At most 20 different ones of up to 40 characters, five times each on average, and none only once.
    """
    counts: dict[str, int] = {}
    for reference in references:
        counts[reference.strip()] = counts.get(reference.strip(), 0) + 1
    total = sum(counts.values())
    few = 2 <= len(counts) <= 20 and total >= 5 * len(counts)
    short = all(0 < len(label) <= 40 and "\n" not in label for label in counts)
    if not few or not short or any(count < 2 for count in counts.values()):
        return ()
    return tuple(sorted(counts))
