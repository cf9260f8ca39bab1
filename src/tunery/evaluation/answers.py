"""Held-out rows as questions to a model, what it answers, and answers.jsonl, which keeps both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tunery.data.example import Example, Message
from tunery.data.kinds import KINDS
from tunery.data.kinds.base import last_text
from tunery.data.kinds.preference import unweighted
from tunery.data.prompts import Prompts
from tunery.errors import DataError
from tunery.jsonl import JsonObject, append_lines, read_lines

# --------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """What a model is asked, and what should follow.

    Attributes:
        where: the row it comes from, "file:line".
        messages: the conversation up to the answer; empty where `prompt` is asked as it stands.
        tools: offered in it.
        reference: the answer in the data; "" if it is not known.
        rejected: the worse of two answers; "" where there is none.
        shown: what a person sees of the question.
        prompt: a text to complete, for models without conversations.
    """

    where: str
    messages: tuple[Message, ...]
    tools: tuple[JsonObject, ...] = ()
    reference: str = ""
    rejected: str = ""
    shown: str = ""
    prompt: str = ""

    @property
    def key(self) -> str:
        """Hash of what is asked; the same question has the same one."""
        parts = [list(map(dict, self.messages)), list(self.tools), self.prompt]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def question(example: Example, prompts: Prompts) -> Question | None:
    """The question that an example puts; None where its answer is not text (a tool call)."""
    kind = KINDS[example.kind]
    reference = kind.answer(example)
    if not reference.strip():
        return None
    messages = tuple(map(unweighted, kind.question(prompts, example)))
    return Question(
        example.where,
        messages,
        tuple(map(dict, example.tools)),
        reference,
        last_text(example.rejected),
        kind.shown(example) or shown(messages),
    )


def questions(examples: Sequence[Example], prompts: Prompts) -> tuple[list[Question], int]:
    """(the questions of held-out examples in their order, how many examples put none)."""
    found = [question(example, prompts) for example in examples]
    asked = [one for one in found if one is not None]
    return asked, len(found) - len(asked)


def shown(messages: Sequence[Message]) -> str:
    """A conversation for reading; a single message of the user stands alone."""
    if len(messages) == 1:
        return str(messages[0].get("content") or "")
    return "\n\n".join(f"{message['role']}: {message.get('content') or '(a tool call)'}" for message in messages)


# --------------------------------------------------------------------------- answers, and answers.jsonl


@dataclass(frozen=True)
class Answer:
    """What a model said to a question; a line of answers.jsonl, which also holds the question.

    Attributes:
        text: "" where it called a tool or was refused.
        finish_reason: as the server says: stop, length (it was cut), tool_calls, content_filter.
        tool_calls: in OpenAI's form.
        logprobs: (token, log-probability) of the answer, where the server gives them.
        seconds: until it was there, network included.
        usage: tokens of the question and of the answer, where the server counts them.
        refused: why the server did not take the question; "" if it did.
    """

    text: str
    finish_reason: str = ""
    tool_calls: tuple[JsonObject, ...] = ()
    logprobs: tuple[tuple[str, float], ...] | None = None
    seconds: float = 0.0
    usage: dict[str, int] = field(default_factory=dict)
    refused: str = ""

    @property
    def is_text(self) -> bool:
        """Whether there is a text to compare."""
        return not self.refused and not self.tool_calls


class AnswerBook:
    """The answers in a file, by model, question, and the length after which an answer was cut.

    A question that was refused is one to be asked again by the next book on the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._answers: dict[tuple[str, str, int], Answer] = {}
        for line in read_lines(path):
            try:
                key, answer = (line["model"], line["key"], line["longest"]), answer_of(line)
            except (KeyError, TypeError, ValueError):  # of another program
                continue
            if not answer.refused:
                self._answers[key] = answer

    def get(self, model: str, question: Question, longest: int) -> Answer | None:
        """The answer, if that question was put to that model before."""
        return self._answers.get((model, question.key, longest))

    def missing(self, model: str, questions: Iterable[Question], longest: int) -> list[Question]:
        """Those that were not, each once."""
        unique = {question.key: question for question in questions}
        return [question for question in unique.values() if self.get(model, question, longest) is None]

    def add(self, model: str, question: Question, longest: int, answer: Answer) -> None:
        """Write an answer down."""
        self._answers[model, question.key, longest] = answer
        append_lines(self.path, [{**_line(model, question, answer), "longest": longest}])


def _line(model: str, question: Question, answer: Answer) -> JsonObject:
    asked = {"prompt": question.prompt} if question.prompt else {"messages": list(map(dict, question.messages))}
    said = asdict(answer)
    return {
        "key": question.key,
        "model": model,
        "where": question.where,
        **asked,
        **({"tools": list(question.tools)} if question.tools else {}),
        "reference": question.reference,
        "answer": said.pop("text"),
        **{name: value for name, value in said.items() if value not in (None, "", (), {})},
    }


def answer_of(line: JsonObject) -> Answer:
    """The answer in a line of answers.jsonl.

    Raises:
        KeyError, TypeError, ValueError: there is none.
    """
    logprobs = line.get("logprobs")
    return Answer(
        text=str(line["answer"]),
        finish_reason=str(line.get("finish_reason", "")),
        tool_calls=tuple(line.get("tool_calls", ())),
        logprobs=None if logprobs is None else tuple((str(token), float(value)) for token, value in logprobs),
        seconds=float(line.get("seconds", 0.0)),
        usage=dict(line.get("usage", {})),
        refused=str(line.get("refused", "")),
    )


Answered = tuple[Question, Answer]


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


def _question_of(line: JsonObject) -> Question:
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


# --------------------------------------------------------------------------- a person's own file of answers


def lines_from(path: Path, known: Sequence[Question]) -> list[JsonObject]:
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
            "\n".join(problems[:20]) or f"{path} holds no answers",
            'write a JSON line each: {"messages": […, {"role": "assistant", "content": "the answer"}]}',
        )
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text", "save it as UTF-8") from None


def _as_line(row: JsonObject) -> JsonObject:
    if "answer" in row:
        return dict(row)
    if "completion" in row:
        return {"prompt": row["prompt"], "answer": row["completion"]}
    *asked, last = row["messages"]
    if last["role"] != "assistant" or not isinstance(last["content"], str):
        raise KeyError("content")
    return {
        "messages": list(map(unweighted, asked)),
        "answer": last["content"],
        **({"tools": row["tools"]} if row.get("tools") else {}),
    }
