"""Everything about a hosted task that is settled before anything is sent: rows, questions, hyperparameters, cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tunery.config import Task
from tunery.data.example import DataSet
from tunery.data.kinds import KINDS
from tunery.data.prompts import Prompts
from tunery.data.read import read_data
from tunery.hosted.client import base_url
from tunery.hosted.convert import lines, require_trainable
from tunery.hosted.estimate import Estimate, billed_tokens, estimate_answers, row_lengths
from tunery.hosted.evaluate import Exam, held_out, make_exam
from tunery.hosted.failures import Server
from tunery.hosted.prices import Price, load_prices
from tunery.hosted.settings import method, require_meaning, suffix
from tunery.hosted.state import HostedState
from tunery.hosted.tokens import LONGEST_ROW, TokenCounter
from tunery.paths import text_sha256


@dataclass(frozen=True)
class HostedPlan:
    """See the module.

    Attributes:
        address: of the server.
        files: "training" and, where there are held-out rows, "validation" → their lines.
        exam: what the evaluation asks; None if it is off or nothing is held out.
        lengths: tokens of each training row.
        too_long: places of training rows that are longer than OpenAI trains.
        remarks: what a person should know besides, in sentences.
    """

    task: Task
    address: str
    model: str
    data: DataSet
    prompts: Prompts
    files: dict[str, list[str]] = field(repr=False)
    method: dict[str, Any]
    exam: Exam | None
    lengths: list[int] = field(repr=False)
    counter: TokenCounter
    price: Price
    estimate: Estimate
    too_long: list[str]
    remarks: list[str]

    def content(self, name: str) -> str:
        """A file as it is sent."""
        return "".join(f"{line}\n" for line in self.files[name])

    def state(self) -> HostedState:
        """Of a run that has not begun."""
        return HostedState(
            address=self.address,
            model=self.model,
            method=self.method,
            seed=self.task.seed,
            suffix=suffix(self.task),
            files={name: text_sha256(self.content(name)) for name in self.files},
        )

    def names(self, tuned: str) -> dict[str, str]:
        """Side → the name by which it answers."""
        hosted = self.task.hosted
        return {"base": hosted.base_deployment or self.model, "tuned": hosted.tuned_deployment or tuned}


def make_plan(task: Task) -> HostedPlan:
    """Read and convert the rows, and reckon. Nothing is sent, and no server is asked.

    Raises:
        ConfigError: a setting without meaning for a hosted model, an address or list of prices that is none, rows of a
            kind that is not taken.
        DataError: bad rows, too few, or some that no hosted model takes.
    """
    require_meaning(task)
    model = task.hosted_model or ""
    address = base_url(task.hosted)
    # written down with the run, so that it finds its server whatever the environment then says
    task = task.model_copy(update={"hosted": task.hosted.model_copy(update={"base_url": address})})
    data = read_data(task.data, task.seed)
    require_trainable(data)
    how = method(task, data.kind)
    prompts = Prompts(labels=data.labels, instruction=task.data.instruction, system=task.data.system)
    files = {"training": lines(data.train, prompts)}
    if data.validation:
        files["validation"] = lines(data.validation, prompts)
    exam = _exam(task, data, prompts)
    counter = TokenCounter(model)
    prices = load_prices(task.hosted, Server(address, "").is_openais)
    price = prices.of(model)
    lengths = row_lengths(counter, files["training"])
    return HostedPlan(
        task=task,
        address=address,
        model=model,
        data=data,
        prompts=prompts,
        files=files,
        method=how,
        exam=exam,
        lengths=lengths,
        counter=counter,
        price=price,
        estimate=_estimate(task, files, lengths, exam, counter, price, prices.words),
        too_long=[row.where for row, length in zip(data.train, lengths, strict=True) if length > LONGEST_ROW],
        remarks=_remarks(data),
    )


def _exam(task: Task, data: DataSet, prompts: Prompts) -> Exam | None:
    split, examples = held_out(data)
    if not task.evaluate.enabled or not examples:
        return None
    exam = make_exam(data, split, examples, prompts, task.evaluate)
    return exam if exam.questions else None


def _estimate(
    task: Task,
    files: dict[str, list[str]],
    lengths: list[int],
    exam: Exam | None,
    counter: TokenCounter,
    price: Price,
    words: str,
) -> Estimate:
    model, epochs = task.hosted_model or "", int(task.train.epochs)
    tokens = billed_tokens(lengths, epochs)
    asked = [] if exam is None else exam.questions
    longest = task.evaluate.max_new_tokens
    answers = [
        estimate_answers(counter, name, asked, price, longest, tuned=tuned)
        for name, tuned in ((model, False), (f"the model tuned from {model}", True))
    ]
    return Estimate(
        exact=counter.exact,
        rows=len(lengths),
        validation_rows=len(files.get("validation", ())),
        epochs=epochs,
        training_tokens=tokens,
        training_cost=price.of_training(tokens),
        answers=answers if asked else [],
        prices=words,
    )


def _remarks(data: DataSet) -> list[str]:
    note = KINDS[data.kind].hosted_note
    return [note] if note else []
