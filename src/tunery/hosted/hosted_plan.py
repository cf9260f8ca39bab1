"""Everything about a hosted task that is known before anything is sent: rows, questions, hyperparameters, cost.

`tunery check` shows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tunery.config import Task
from tunery.data.example import ROW, DataSet, Example, Problem
from tunery.data.kinds import KINDS
from tunery.data.problem_list import by_cause
from tunery.data.prompts import Prompts
from tunery.data.read import read_data
from tunery.errors import ConfigError, DataError
from tunery.hosted.client import HostedServer, base_url
from tunery.hosted.costs import (
    Price,
    answers_sentence,
    billed_tokens,
    cost_words,
    dollars,
    estimate_answers,
    load_prices,
)
from tunery.hosted.hosted_evaluation import Exam, make_exam
from tunery.hosted.job_settings import method, require_meaning, suffix
from tunery.jsonl import JsonMapping, JsonObject
from tunery.openai_api.methods import FEWEST_ROWS
from tunery.openai_api.token_counter import LONGEST_ROW, TokenCounter
from tunery.paths import text_sha256
from tunery.records.check_report import VERSION, HostedCheckReport, HostedLengthsSection, PlannedJobSection
from tunery.records.hosted_state import Estimate, HostedState
from tunery.records.run_receipt import RowsSection
from tunery.text import plural
from tunery.training.build_receipt import LISTED, read_section
from tunery.training.check import histogram, label_counts


def require_trainable(data: DataSet) -> None:
    """Refuse rows that no server takes.

    Raises:
        ConfigError: the rows are plain text.
        DataError: there are too few.
    """
    if refusal := KINDS[data.kind].hosted_refusal():
        raise ConfigError(*refusal)
    if len(data.train) < FEWEST_ROWS:
        raise DataError(
            f"there are {len(data.train)} training rows, and a hosted model needs at least {FEWEST_ROWS}",
            "add rows, or hold out fewer (data.validation)",
        )


def training_file_lines(examples: Sequence[Example], prompts: Prompts) -> list[str]:
    """One JSON object an example, in order.

    Raises:
        DataError: rows that a hosted model does not take, each with its place.
    """
    problems = [
        Problem(example.where.file, example.where.line, ROW, problem, "")
        for example in examples
        for problem in KINDS[example.kind].hosted_problems(example)
    ]
    if problems:
        lines = by_cause(problems, lambda problem: f"{problem.file}:{problem.line}: {problem.message}")
        raise DataError("\n".join(["a hosted model does not take these rows:", *lines]), "change or remove them")
    return [json.dumps(KINDS[example.kind].to_openai(prompts, example), ensure_ascii=False) for example in examples]


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
    method: JsonObject
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

    def rows_section(self) -> JsonObject:
        """What was read and left out; of receipt and check report."""
        return {
            **read_section(self.data, self.prompts.instruction),
            "train_rows": len(self.data.train),
            "validation_rows": len(self.data.validation),
            "test_rows": len(self.data.test),
            "dropped": 0,
            "dropped_rows": [],
            "truncated": len(self.too_long),
            "truncated_rows": self.too_long[:LISTED],
        }

    def cost_sentences(self) -> list[str]:
        """What the job and its evaluation take, for a person, a line each."""
        estimate, epochs = self.estimate, int(self.task.train.epochs)
        about = "" if estimate.exact else "about "
        told = [
            f"training: {about}{estimate.training_tokens:,} tokens ({estimate.rows:,} rows, "
            f"{plural(epochs, 'epoch')}){cost_words(estimate.training_cost)}",
            *(answers_sentence(one, about) for one in estimate.answers if one.questions),
        ]
        if estimate.cost is None:
            return [*told, f"what it costs together is not known ({estimate.prices})"]
        return [*told, f"together {dollars(estimate.cost)} ({estimate.prices})"]

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
    files = {"training": training_file_lines(data.train, prompts)}
    if data.validation:
        files["validation"] = training_file_lines(data.validation, prompts)
    exam = make_exam(data, *data.held_out, prompts, task.evaluate) if task.evaluate.enabled else None
    exam = exam if exam is not None and exam.questions else None
    counter = TokenCounter(model)
    prices = load_prices(task.hosted, HostedServer(address, "").is_openais)
    price = prices.of(model)
    lengths = [counter.row(json.loads(line)) for line in files["training"]]
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
        remarks=[*filter(None, [KINDS[data.kind].hosted_note]), *KINDS[data.kind].remarks(data.train)],
    )


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
    answers = answers if asked else []
    training = price.of_training(tokens)
    parts = [training, *(one.cost for one in answers if one.questions)]
    known = [part for part in parts if part is not None]
    return Estimate(
        exact=counter.exact,
        rows=len(lengths),
        validation_rows=len(files.get("validation", ())),
        training_tokens=tokens,
        training_cost=training,
        answers=answers,
        cost=sum(known) if len(known) == len(parts) else None,
        currency="USD",
        prices=words,
    )


# --------------------------------------------------------------------------- the check


def check_hosted(task: Task, samples: int) -> HostedCheckReport:
    """As tunery.training.check.check, for a hosted model.

    Raises:
        ConfigError, DataError: as make_plan.
    """
    plan = make_plan(task)
    lengths, shown = np.asarray(plan.lengths), plan.data.train[:samples]
    return HostedCheckReport(
        version=VERSION,
        name=task.name,
        notes=plan.data.notes,
        labels=label_counts(plan.data),
        remarks=plan.remarks,
        samples=[_pieces(json.loads(line)) for line in plan.files["training"][:samples]],
        sample_names=[example.where for example in shown],
        sample_sides=[None for _ in shown],
        sample_lines=[example.where.line for example in shown],
        data=RowsSection.of(plan.rows_section()),
        tokens=HostedLengthsSection(
            all=int(lengths.sum()),
            exact=plan.counter.exact,
            shortest=int(lengths.min()),
            median=float(np.median(lengths)),
            mean=float(lengths.mean()),
            longest=int(lengths.max()),
            histogram=histogram(lengths),
        ),
        hosted=PlannedJobSection(
            model=plan.model,
            address=plan.address,
            method=plan.method,
            estimate=plan.estimate,
            sentences=plan.cost_sentences(),
        ),
    )


def _pieces(row: JsonMapping) -> list[tuple[str, bool]]:
    """A row's text in stretches that are trained and that are not."""
    if "input" not in row:
        return list(_conversation(row["messages"]))
    answers = (("preferred", row["preferred_output"]), ("not preferred", row["non_preferred_output"]))
    prompt = [(text, False) for text, _ in _conversation(row["input"]["messages"])]
    return [*prompt, *(piece for name, answer in answers for piece in ((f"({name}) ", False), *_conversation(answer)))]


def _conversation(messages: Iterable[JsonMapping]) -> Iterable[tuple[str, bool]]:
    for message in messages:
        yield f"{message['role']}: ", False
        calls = "".join(json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ())
        yield f"{message.get('content') or ''}{calls}", message["role"] == "assistant" and message.get("weight", 1) != 0
        yield "\n", False
