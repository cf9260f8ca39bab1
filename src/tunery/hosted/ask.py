"""Questions put to a model on a server, and its answers: each kept as it comes, so that none is asked or paid twice."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.hosted import client as client_module
from tunery.hosted.client import Service
from tunery.hosted.failures import explain, is_about_question, said_by
from tunery.hosted.questions import Question
from tunery.jsonl import append_lines, read_lines
from tunery.progress import Note, Say
from tunery.text import plural

if TYPE_CHECKING:
    from openai import OpenAI

ANSWERS_LONGEST = 512
"""Tokens after which the answers of a model that goes away are cut: they cannot be asked for again."""

NOTES = 4
"""How often in a long series of questions it is said how far it is."""
FEW = 20
"""Questions between two such remarks, at least."""


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
    tool_calls: tuple[dict[str, Any], ...] = ()
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


def _line(model: str, question: Question, answer: Answer) -> dict[str, Any]:
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


def answer_of(line: dict[str, Any]) -> Answer:
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


@dataclass
class Asker:
    """Puts questions to one model.

    Attributes:
        longest: an answer is cut after so many tokens.
        logprobs: ask for log-probabilities; turned off when the server gives none.
        fresh: the model was just made, and may not be known at once.
        length_name: what the server calls the longest answer; found out with the first question.
    """

    service: Service
    model: str
    longest: int
    logprobs: bool = False
    fresh: bool = False
    length_name: str = "max_tokens"

    def ask(self, question: Question) -> Answer:
        """The answer to one question.

        Raises:
            TuneryError: the key, the account or the model is refused, or the server fails for too long. A question that
            is refused for itself is an answer with `refused`.
        """
        import openai

        def request(client: OpenAI) -> Answer | openai.BadRequestError:
            started = time.perf_counter()
            try:
                patient = client.with_options(timeout=client_module.LONG_TIMEOUT)
                answer = self._complete(patient, question) if question.prompt else self._chat(patient, question)
            except openai.BadRequestError as error:
                return error
            return Answer(**answer, seconds=round(time.perf_counter() - started, 3))

        while True:
            answer = self.service.call(
                f"asking {self.model}", request, passing=(404,) if self.fresh else (), timeouts=1
            )
            if isinstance(answer, Answer):
                return answer
            said = said_by(answer, self.service.server)
            if self._give_way(answer.param or "", said):
                continue
            if not is_about_question(answer):
                raise explain(answer, self.service.server, f"asking {self.model}") from answer
            return Answer("", refused=said)

    def _give_way(self, param: str, said: str) -> bool:
        """Leave out what the server does not know; False if nothing of ours is in its way."""
        words = f"{param} {said}"
        if self.length_name == "max_tokens" and "max_completion_tokens" in words:
            self.length_name = "max_completion_tokens"
            return True
        if self.logprobs and "logprobs" in words:
            self.logprobs = False
            return True
        return False

    def _chat(self, client: OpenAI, question: Question) -> dict[str, Any]:
        options: dict[str, Any] = {self.length_name: self.longest, "temperature": 0}
        if self.logprobs:
            options["logprobs"] = True
        if question.tools:
            options["tools"] = list(question.tools)
        reply = client.chat.completions.create(model=self.model, messages=list(question.messages), **options)  # type: ignore[arg-type]
        choice = reply.choices[0]
        content = choice.logprobs.content if choice.logprobs is not None else None
        calls = choice.message.tool_calls or ()
        return {
            "text": choice.message.content or choice.message.refusal or "",
            "finish_reason": choice.finish_reason or "",
            "tool_calls": tuple(call.model_dump(mode="json", warnings=False) for call in calls),
            "logprobs": None if content is None else tuple((one.token, one.logprob) for one in content),
            "usage": _usage(reply.usage),
        }

    def _complete(self, client: OpenAI, question: Question) -> dict[str, Any]:
        reply = client.completions.create(
            model=self.model, prompt=question.prompt, max_tokens=self.longest, temperature=0
        )
        choice = reply.choices[0]
        return {"text": choice.text, "finish_reason": choice.finish_reason or "", "usage": _usage(reply.usage)}


def _usage(usage: Any) -> dict[str, int]:
    if usage is None:
        return {}
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}


def ask_all(asker: Asker, book: AnswerBook, questions: Sequence[Question], parallel: int, note: Say) -> list[Answer]:
    """The answers to all questions, in order; only those are asked that are not in the book.

    Args:
        parallel: questions asked at the same time, after a first one that is asked alone.

    Raises:
        TuneryError: as Asker.ask; what was answered before is in the book.
    """
    missing = book.missing(asker.model, questions, asker.longest)
    if missing:
        note(Note(f"asking {asker.model} {plural(len(missing), 'question')}"))
        book.add(asker.model, missing[0], asker.longest, asker.ask(missing[0]))
        _ask_in_parallel(asker, book, missing[1:], parallel, note)
    answers = [book.get(asker.model, question, asker.longest) for question in questions]
    return [answer for answer in answers if answer is not None]


def _ask_in_parallel(asker: Asker, book: AnswerBook, questions: Sequence[Question], parallel: int, note: Say) -> None:
    every = max(FEW, len(questions) // NOTES)
    waiting = iter(questions)
    running: dict[Future[Answer], Question] = {}
    done = 0
    with ThreadPoolExecutor(parallel, thread_name_prefix="ask") as pool:
        try:
            while True:
                for question in waiting:  # no more at once than run, so that little is asked after a failure
                    running[pool.submit(asker.ask, question)] = question
                    if len(running) >= parallel:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    book.add(asker.model, running.pop(future), asker.longest, future.result())
                    done += 1
                    if done % every == 0 and done < len(questions):
                        note(Note(f"{done:,} of {len(questions):,} answered"))
        finally:
            for future, question in running.items():  # under way, and paid for: kept, whatever went wrong with others
                if future.exception() is None:
                    book.add(asker.model, question, asker.longest, future.result())
