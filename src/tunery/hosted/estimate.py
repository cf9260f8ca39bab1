"""What a task would send, how many tokens that is, and what it would cost, before anything is sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunery.hosted.prices import Price, dollars
from tunery.hosted.questions import Question
from tunery.hosted.token_counter import LONGEST_ROW, TokenCounter
from tunery.text import plural


@dataclass(frozen=True)
class AnswerEstimate:
    """Questions to one model.

    Attributes:
        model: whom they are put to.
        questions: how many are still to be asked.
        asked, answered: tokens of the questions, and of answers as long as those in the data.
        cost: in US dollars; None if not known.
    """

    model: str
    questions: int
    asked: int
    answered: int
    cost: float | None


@dataclass(frozen=True)
class Estimate:
    """Tokens and cost of a job and of its evaluation.

    Attributes:
        exact: tokens are counted with the model's vocabulary, not estimated.
        rows, validation_rows: lines of the two files.
        epochs: passes over the first.
        training_tokens: what the job is billed for.
        training_cost: in US dollars; None if not known.
        answers: what the evaluation asks of each side.
        prices: where the prices come from, in words.
    """

    exact: bool
    rows: int
    validation_rows: int
    epochs: int
    training_tokens: int
    training_cost: float | None
    answers: list[AnswerEstimate]
    prices: str

    @property
    def cost(self) -> float | None:
        """Of everything; None if a part is not known."""
        parts = [self.training_cost, *(one.cost for one in self.answers if one.questions)]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def sentences(self) -> list[str]:
        """For a person, a line each."""
        about = "" if self.exact else "about "
        training = (
            f"training: {about}{self.training_tokens:,} tokens ({self.rows:,} rows, "
            f"{plural(self.epochs, 'epoch')}){_cost(self.training_cost)}"
        )
        told = [training, *(answers_sentence(one, about) for one in self.answers if one.questions)]
        if self.cost is None:
            return [*told, f"what it costs together is not known ({self.prices})"]
        return [*told, f"together {dollars(self.cost)} ({self.prices})"]

    def as_json(self) -> dict[str, Any]:
        """For the receipt and `--json`."""
        return {
            "exact": self.exact,
            "rows": self.rows,
            "validation_rows": self.validation_rows,
            "training_tokens": self.training_tokens,
            "training_cost": self.training_cost,
            "answers": [asdict(one) for one in self.answers],
            "cost": self.cost,
            "currency": "USD",
            "prices": self.prices,
        }


def answers_sentence(answers: AnswerEstimate, about: str = "about ") -> str:
    """What asking one model takes, for a person."""
    return (
        f"{plural(answers.questions, 'question')} to {answers.model}: {about}{answers.asked:,} "
        f"tokens asked, {about}{answers.answered:,} answered{_cost(answers.cost)}"
    )


def _cost(amount: float | None) -> str:
    return "" if amount is None else f", {dollars(amount)}"


def billed_tokens(lengths: Sequence[int], epochs: int) -> int:
    """Tokens that a job is billed for: those of the training file, times the epochs. A row beyond the longest that is
    trained counts as cut."""
    return epochs * sum(min(length, LONGEST_ROW) for length in lengths)


def row_lengths(counter: TokenCounter, lines: Sequence[str]) -> list[int]:
    """Tokens of each line of a training file."""
    return [counter.row(json.loads(line)) for line in lines]


def estimate_answers(
    counter: TokenCounter, model: str, questions: Sequence[Question], price: Price, longest: int, *, tuned: bool
) -> AnswerEstimate:
    """What it takes to put questions to a model.

    Args:
        longest: an answer is cut after so many tokens; where the data hold no answer, it counts as that long.
    """
    asked = sum(
        counter.text(one.prompt) if one.prompt else counter.prompt(one.messages, one.tools) for one in questions
    )
    answered = sum(min(counter.text(one.reference), longest) if one.reference else longest for one in questions)
    return AnswerEstimate(model, len(questions), asked, answered, price.of_answers(asked, answered, tuned=tuned))
