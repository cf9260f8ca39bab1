"""What a job and its answers cost, from a dated list of prices."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from tunery.config_hosted import HostedConfig
from tunery.errors import ConfigError
from tunery.evaluation.answers import Question
from tunery.openai_api.token_counter import LONGEST_ROW, TokenCounter
from tunery.records.hosted_state import AnswerEstimate
from tunery.text import plural

_MILLION = 1_000_000


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens; None where it is not known. See prices.toml."""

    training: float | None = None
    input: float | None = None
    output: float | None = None
    tuned_input: float | None = None
    tuned_output: float | None = None

    def of_training(self, tokens: int) -> float | None:
        """Of a job that is billed for so many tokens."""
        return None if self.training is None else tokens * self.training / _MILLION

    def of_answers(self, asked: int, answered: int, *, tuned: bool) -> float | None:
        """Of questions and answers of so many tokens."""
        into, out = (self.tuned_input, self.tuned_output) if tuned else (self.input, self.output)
        return None if into is None or out is None else (asked * into + answered * out) / _MILLION


@dataclass(frozen=True)
class PriceList:
    """Prices by model.

    Attributes:
        words: where they come from, for a person.
    """

    words: str
    models: Mapping[str, Price]

    def of(self, model: str) -> Price:
        """The price of a model, whatever its date ("gpt-4.1-mini-2025-04-14"), or of the one it was tuned from."""
        base = base_name(model)
        return self.models.get(base) or self.models.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", base)) or Price()


def base_name(model: str) -> str:
    """ "ft:gpt-4.1-mini:org::id" → "gpt-4.1-mini"; other names stay."""
    return model.split(":")[1] if model.startswith("ft:") and model.count(":") else model


def load_prices(config: HostedConfig, openais_own: bool) -> PriceList:
    """The prices to reckon with: hosted.prices, else $TUNERY_PRICES, else our own for OpenAI's address.

    Raises:
        ConfigError: the file named cannot be read, or is not of that form.
    """
    if named := config.prices or os.environ.get("TUNERY_PRICES"):
        path = Path(named).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the prices cannot be read from {path}: {error}", "check hosted.prices") from None
        return _read(text, str(path))
    if not openais_own:
        return PriceList("there is no list of prices for this server; hosted.prices can name one", {})
    return _read((files("tunery.hosted") / "prices.toml").read_text(encoding="utf-8"), "")


def _read(text: str, name: str) -> PriceList:
    """The list in a file; `name` is "" for our own."""
    where = name or "prices.toml"
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}", "see src/tunery/hosted/prices.toml") from None
    models = content.get("models")
    if not isinstance(models, dict):
        raise ConfigError(f"{where} has no [models.NAME]", "see src/tunery/hosted/prices.toml")
    prices = {model: _price(where, model, values) for model, values in models.items()}
    checked = f", of {content['checked']}" if "checked" in content else ""
    if name:
        return PriceList(f"by the prices in {name}{checked}", prices)
    return PriceList(f"by the prices that come with tunery{checked}; check them at {content.get('source')}", prices)


def _price(where: str, model: str, values: Any) -> Price:
    known = [field.name for field in fields(Price)]
    if not isinstance(values, dict) or set(values) - set(known):
        raise ConfigError(f"{where}: models.{model} holds more than prices", f"known here: {', '.join(known)}")
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ConfigError(f"{where}: models.{model}.{key} is not a price", "give US dollars for a million tokens")
    return Price(**values)


def dollars(amount: float) -> str:
    """An amount for reading; small ones are not rounded to nothing."""
    return f"${amount:,.2f}" if amount >= 0.995 else f"${amount:.2g}" if amount > 0 else "$0"


def answers_sentence(answers: AnswerEstimate, about: str = "about ") -> str:
    """What asking one model takes, for a person."""
    return (
        f"{plural(answers.questions, 'question')} to {answers.model}: {about}{answers.asked:,} "
        f"tokens asked, {about}{answers.answered:,} answered{cost_words(answers.cost)}"
    )


def cost_words(amount: float | None) -> str:
    """The cost as the end of a sentence; nothing where it is not known."""
    return "" if amount is None else f", {dollars(amount)}"


def billed_tokens(lengths: Sequence[int], epochs: int) -> int:
    """Tokens that a job is billed for: those of the training file, times the epochs. A row beyond the longest that is
    trained counts as cut."""
    return epochs * sum(min(length, LONGEST_ROW) for length in lengths)


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
    cost = price.of_answers(asked, answered, tuned=tuned)
    return AnswerEstimate(model=model, questions=len(questions), asked=asked, answered=answered, cost=cost)
