"""POST /v1/fine_tuning/jobs: what to train, on what, and how."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from tunery.serve.schemas.base import Request, kind_of, problem, shown

Auto = Literal["auto"]
Kind = Literal["supervised", "dpo"]

MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512


def _number(name: str, low: float, high: float | None, *, whole: bool, above: bool = False) -> BeforeValidator:
    """`"auto"`, or a number from `low` (with `above`: more than `low`) to `high`."""

    def check(value: object) -> object:
        if value == "auto":
            return value
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            kind = "an integer" if whole else "a number"
            raise problem(
                f"Invalid type for '{name}': expected 'auto' or {kind}, but got {kind_of(value)} instead.",
                code="invalid_type",
            )
        number = "integer" if whole else "decimal"
        if value < low or (above and value == low):
            raise problem(
                f"Invalid '{name}': {number} below minimum value. Expected a value {'>' if above else '>='} {low:g}, "
                f"but got {shown(value)} instead.",
                code=f"{number}_below_min_value",
            )
        if high is not None and value > high:
            raise problem(
                f"Invalid '{name}': {number} above maximum value. Expected a value <= {high:g}, but got {shown(value)} "
                "instead.",
                code=f"{number}_above_max_value",
            )
        return value if whole else float(value)

    return BeforeValidator(check)


class SupervisedHyperparameters(Request):
    """`method.supervised.hyperparameters`, and the older `hyperparameters` beside `method`."""

    n_epochs: Annotated[Auto | int, _number("n_epochs", 1, 50, whole=True)] = "auto"
    batch_size: Annotated[Auto | int, _number("batch_size", 1, 256, whole=True)] = "auto"
    learning_rate_multiplier: Annotated[
        Auto | float, _number("learning_rate_multiplier", 0, None, whole=False, above=True)
    ] = "auto"


class Hyperparameters(SupervisedHyperparameters):
    """Those of DPO, which has one more; supervised training leaves `beta` at auto."""

    beta: Annotated[Auto | float, _number("beta", 0, 2, whole=False, above=True)] = "auto"


class Supervised(Request):
    """`method.supervised`."""

    hyperparameters: SupervisedHyperparameters = Field(default_factory=SupervisedHyperparameters)


class Dpo(Request):
    """`method.dpo`."""

    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)


class Method(Request):
    """`method`."""

    type: Kind
    supervised: Supervised | None = None
    dpo: Dpo | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_reinforcement(cls, data: object) -> object:
        if isinstance(data, dict) and (data.get("type") == "reinforcement" or data.get("reinforcement") is not None):
            raise problem(
                "Unsupported value: 'method.type' reinforcement. This server trains with the methods supervised and "
                "dpo; a grader's best answers can be used as preferred answers of dpo.",
                code="unsupported_value",
                at="type",
            )
        return data

    @model_validator(mode="after")
    def _settings_of_the_type(self) -> Method:
        other = "dpo" if self.type == "supervised" else "supervised"
        if getattr(self, other) is not None:
            raise problem(f"'method.{other}' does not belong to method.type {self.type}.", at=other)
        return self


class Wandb(Request):
    """Where Weights & Biases shows the run."""

    project: Annotated[str, Field(min_length=1, max_length=128)]
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    entity: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    tags: Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=50)] = Field(
        default_factory=list
    )


class Integration(Request):
    """One of `integrations`."""

    type: Literal["wandb"]
    wandb: Wandb


def _suffix(value: object) -> object:
    """A part of the model's name: other characters than letters, digits, dot, dash and underscore become dashes."""
    if not isinstance(value, str):
        return value
    if len(value) > 64:
        raise problem("Invalid 'suffix': string too long: at most 64 characters.", code="string_above_max_length")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-.")
    if value and not name:
        raise problem("Invalid 'suffix': it holds no letter or digit.")
    return name


def _metadata(value: object) -> object:
    """Up to 16 pairs of texts, or an error."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_PAIRS:
        raise problem(f"Invalid 'metadata': at most {MAX_PAIRS} pairs.", code="object_above_max_properties")
    for key, text in value.items():
        if not isinstance(text, str):
            raise problem(f"Invalid 'metadata': values are texts, and one is {kind_of(text)}.", code="invalid_type")
        if len(key) > MAX_KEY or len(text) > MAX_VALUE:
            raise problem(
                f"Invalid 'metadata': a key has at most {MAX_KEY} characters, a value at most {MAX_VALUE}.",
                code="string_above_max_length",
            )
    return value


Text = Annotated[str, Field(min_length=1, max_length=512)]


class CreateJob(Request):
    """The body. `kind` and `hyperparameters` say how to train; they settle the two places that both may stand in.

    Attributes:
        suffix: fit to stand in a model's name.
        settings: the older `hyperparameters`, as given.
    """

    model: Text
    training_file: Text
    validation_file: Text | None = None
    suffix: Annotated[str, BeforeValidator(_suffix)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(_metadata)] | None = None
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None
    method: Method = Field(default_factory=lambda: Method(type="supervised"))
    settings: SupervisedHyperparameters = Field(default_factory=SupervisedHyperparameters, alias="hyperparameters")

    @model_validator(mode="after")
    def _one_place(self) -> CreateJob:
        """Refuse two different values for one hyperparameter."""
        inner = self._inner()
        for name in self.settings.model_fields_set & inner.model_fields_set:
            if getattr(self.settings, name) != getattr(inner, name):
                raise problem(
                    f"'{name}' stands in 'hyperparameters' and, with another value, in 'method': give it in 'method'.",
                    at=f"hyperparameters.{name}",
                )
        return self

    def _inner(self) -> SupervisedHyperparameters:
        section = self.method.dpo if self.kind == "dpo" else self.method.supervised
        return section.hyperparameters if section else SupervisedHyperparameters()

    @property
    def kind(self) -> Kind:
        """supervised or dpo."""
        return self.method.type

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Each hyperparameter as asked for, wherever it stood."""
        asked = [part.model_dump(exclude_unset=True) for part in (self.settings, self._inner())]
        return Hyperparameters(**asked[0], **{key: value for key, value in asked[1].items() if key not in asked[0]})
