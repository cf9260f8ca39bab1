"""From a request for a fine-tuning job to a task.

What OpenAI's hyperparameters mean here:

| request | task |
| --- | --- |
| n_epochs | train.epochs |
| batch_size | train.batch_size, at most the number of examples |
| learning_rate_multiplier | train.learning_rate_multiplier: times the rate that tunery finds for the base |
| beta (dpo) | train.beta |

"auto" is settled when the files have been read, by this rule, for a training file of n examples:

- n_epochs: 3; for small files as many as show the model 100 examples in all, at most 10; for large ones as many as show
  it about 15,000 (so 2 from 6,000 examples on, 1 from 10,001 on);
- batch_size: 0.2 % of n, rounded, from 4 to 256, and never more than n;
- learning_rate_multiplier: 1;
- beta: 0.1.

Everything else about a job is tunery's default (LoRA of rank 16 on all linear layers), or what the server's owner set
for all jobs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from tunery.config import DEFAULT_BETA, KindName, Task
from tunery.errors import ConfigError
from tunery.jsonl import JsonMapping, JsonObject
from tunery.lora.variants import VARIANTS
from tunery.openai_api.methods import FEWEST_ROWS, LARGEST_BATCH, METHODS
from tunery.paths import read_json
from tunery.serve.api_errors import ApiError
from tunery.serve.jobs.job_folder import JobFolder

if TYPE_CHECKING:
    from tunery.serve.schemas import CreateJob

Use = Literal["training", "validation"]
"""What a job uses a file for."""

FEWEST_EXAMPLES = FEWEST_ROWS
CHECKPOINTS_KEPT = 3
SEEDS = 2**31

_USUAL_EPOCHS, _MOST_AUTO_EPOCHS = 3, 10
_FEW_SEEN, _MANY_SEEN = 100, 15_000
_BATCH_SHARE, _SMALLEST_AUTO_BATCH = 0.002, 4

_AUTO = {"beta": DEFAULT_BETA}
"""Hyperparameter of one method → what its "auto" means."""

_SECTIONS = ("lora", "train", "data", "evaluate")
"""Sections of a task that can be set for all jobs."""

_OF_THE_REQUEST = (
    "name",
    "model",
    "output",
    "seed",
    "data.train",
    "data.validation",
    "data.test",
    "data.kind",
    "data.columns",
    "lora.start",
    "train.epochs",
    "train.batch_size",
    "train.objective",
    "train.beta",
    "train.learning_rate_multiplier",
    "train.report_to",
)
"""Settings that each job decides for itself."""

_BESIDE_A_START = ("dropout",)
"""Settings of `lora` that an adapter to start from does not bring itself."""

_MODEST_EVALUATION = {"max_rows": 200, "generate_rows": 8, "max_new_tokens": 64}
"""Base vs. tuned at a job's end, on its validation file: enough for a report, and soon over."""


@dataclass(frozen=True)
class JobSpec:
    """What a job was asked for, complete: it lies in the job's folder and is all that its workers know.

    Attributes:
        base: what Task.model names.
        method: "supervised" or "dpo".
        asked: hyperparameters as asked for; those left out are "auto".
        has_validation: there is a validation file.
        goes_on: the job starts from the adapter in its folder.
        trackers: for train.report_to.
        environment: variables for the trackers.
        defaults: settings of the server's owner for all jobs, as at the job's creation.
    """

    base: str
    method: str
    seed: int
    asked: dict[str, float] = field(default_factory=dict)
    has_validation: bool = False
    goes_on: bool = False
    trackers: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    defaults: JsonObject = field(default_factory=dict)

    @classmethod
    def read(cls, folder: JobFolder) -> JobSpec:
        """The spec that lies in a job's folder."""
        return cls(**read_json(folder.request))

    @property
    def kinds(self) -> tuple[KindName, ...]:
        """The kinds of rows that the method takes."""
        return METHODS[self.method].kinds

    @property
    def params(self) -> tuple[str, ...]:
        """The request's fields that name a file."""
        return ("training_file", "validation_file") if self.has_validation else ("training_file",)


# --------------------------------------------------------------------------- the request


def asked_of(request: CreateJob) -> dict[str, float]:
    """The hyperparameters that a request does not leave to "auto"."""
    names = METHODS[request.kind].hyperparameters
    values = {name: getattr(request.hyperparameters, name) for name in names}
    return {name: value for name, value in values.items() if value != "auto"}


def trackers_of(request: CreateJob) -> tuple[list[str], dict[str, str]]:
    """(trackers, environment variables for them) of a request's integrations.

    Raises:
        ApiError: 400, wandb more than once, or a tag that it cannot have.
    """
    integrations = request.integrations or []
    if not integrations:
        return [], {}
    if len(integrations) > 1:
        raise ApiError(400, "Invalid 'integrations': wandb can stand there once.", param="integrations")
    wandb = integrations[0].wandb
    if any("," in tag for tag in wandb.tags):
        raise ApiError(400, "Invalid 'tags': a tag of wandb holds no comma.", param="integrations[0].wandb.tags")
    named = {"PROJECT": wandb.project, "ENTITY": wandb.entity, "NAME": wandb.name, "TAGS": ",".join(wandb.tags)}
    return ["wandb"], {f"WANDB_{key}": value for key, value in named.items() if value}


# --------------------------------------------------------------------------- the task


def settle(asked: Mapping[str, float], method: str, examples: int) -> dict[str, float]:
    """The hyperparameters of a job whose training file has so many examples: what was asked for, "auto" by the rule
    at the top of this module."""
    auto: dict[str, float] = {
        "n_epochs": _auto_epochs(examples),
        "batch_size": min(max(round(_BATCH_SHARE * examples), _SMALLEST_AUTO_BATCH), LARGEST_BATCH),
        "learning_rate_multiplier": 1.0,
        **{name: _AUTO[name] for name in METHODS[method].extra},
    }
    settled = auto | dict(asked)
    return settled | {"batch_size": min(settled["batch_size"], examples)}


def _auto_epochs(examples: int) -> int:
    if examples * _USUAL_EPOCHS < _FEW_SEEN:
        return min(math.ceil(_FEW_SEEN / examples), _MOST_AUTO_EPOCHS)
    return max(1, min(_USUAL_EPOCHS, round(_MANY_SEEN / examples)))


def check_defaults(defaults: JsonMapping) -> None:
    """Refuse settings for all jobs that are wrong, or that each job decides for itself.

    Args:
        defaults: sections of a task file: lora, train, data, evaluate.

    Raises:
        ConfigError: names the setting.
    """
    for section, values in defaults.items():
        if section not in _SECTIONS or not isinstance(values, Mapping):
            raise ConfigError(
                f"settings for all jobs: {section} is not a section of settings",
                "write lora:, train:, data: or evaluate:",
            )
        for name in values:
            if f"{section}.{name}" in _OF_THE_REQUEST:
                raise ConfigError(
                    f"settings for all jobs: {section}.{name} is decided by each job", "remove it from the settings"
                )
    variant = (defaults.get("lora") or {}).get("variant", "lora")
    if variant in VARIANTS and not VARIANTS[variant].additive:
        raise ConfigError(
            f"settings for all jobs: lora.variant: {variant} cannot be served: many adapters share one base here",
            "leave it out, or train with `tunery train` and serve the merged model",
        )
    usual = next(iter(METHODS.values()))
    spec = JobSpec("base", usual.name, 0, has_validation=True, defaults=dict(defaults))
    try:
        _assemble(spec, JobFolder(Path("job")), usual.kinds[0], settle({}, usual.name, 1000), "auto")
    except ValidationError as error:
        raise ConfigError(
            f"settings for all jobs: {_first(error)}", "`tunery settings` describes every setting"
        ) from None


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def make_task(spec: JobSpec, folder: JobFolder, kind: KindName, settled: Mapping[str, float], precision: str) -> Task:
    """The task of a job.

    Args:
        kind: of the rows in its files.
        settled: hyperparameters, from `settle`.
        precision: for train.precision, unless that is set for all jobs: chosen once, so that a run which is taken up
            again continues in the dtype it began with.

    Raises:
        ConfigError: the settings for all jobs do not go together with this job.
    """
    try:
        return _assemble(spec, folder, kind, settled, precision)
    except ValidationError as error:
        raise ConfigError(f"the server's settings for all jobs do not fit this one: {_first(error)}") from None


def _assemble(spec: JobSpec, folder: JobFolder, kind: KindName, settled: Mapping[str, float], precision: str) -> Task:
    own: dict[str, JsonObject] = {
        "data": {
            "train": str(folder.data("training_file")),
            "validation": str(folder.data("validation_file")) if spec.has_validation else None,
            "kind": kind,
        },
        "train": {
            "objective": METHODS[spec.method].objective,
            "epochs": settled["n_epochs"],
            "batch_size": settled["batch_size"],
            "learning_rate_multiplier": settled["learning_rate_multiplier"],
            **{name: settled[name] for name in METHODS[spec.method].extra},
            "report_to": spec.trackers,
        },
    }
    usual = {
        "train": {"save_limit": CHECKPOINTS_KEPT, "precision": precision},
        "evaluate": _MODEST_EVALUATION,
    }
    lora = dict(spec.defaults.get("lora") or {})
    if spec.goes_on:
        lora = {"start": str(folder.start), **{name: lora[name] for name in _BESIDE_A_START if name in lora}}
    sections = {
        name: {**usual.get(name, {}), **(spec.defaults.get(name) or {}), **own.get(name, {})}
        for name in dict.fromkeys((*usual, *own, *spec.defaults))
        if name != "lora"
    }
    return Task.model_validate(
        {
            "name": folder.run.root.name,
            "model": spec.base,
            "output": str(folder.root),
            "seed": spec.seed,
            "lora": lora,
            **sections,
        }
    )
