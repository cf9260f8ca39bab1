"""Questions put to a model on a server, several at a time; each answer is kept as it comes, and none is paid twice."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunery.evaluation.answers import Answer, AnswerBook, Question
from tunery.hosted import client as client_module
from tunery.hosted.client import Service, explain, is_about_question, said_by
from tunery.jsonl import JsonObject
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

    def _chat(self, client: OpenAI, question: Question) -> JsonObject:
        options: JsonObject = {self.length_name: self.longest, "temperature": 0}
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

    def _complete(self, client: OpenAI, question: Question) -> JsonObject:
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
