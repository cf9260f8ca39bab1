"""Which settings of a task mean something to a server that speaks OpenAI's API, and what they become there.

| task | job |
| --- | --- |
| `train.epochs` | `n_epochs`, a whole number from 1 to 50 |
| `train.batch_size` | `batch_size`, at most 256 |
| `train.learning_rate_multiplier` | `learning_rate_multiplier`; left out, "auto" |
| `train.objective` | `method`: sft is supervised, dpo is dpo |
| `train.beta` (objective dpo) | `beta`; left out, "auto" |
| `seed` | `seed` |
| `hosted.suffix`, else `name` | `suffix` |

Everything under `data` but the length limit, `evaluate` and `hosted` count as they do for a model trained here. Any
other setting that a person wrote down is an error.
"""

from __future__ import annotations

import yaml
from pydantic import BaseModel

from tunery.config import KindName, Task, all_settings
from tunery.data.kinds import KINDS
from tunery.errors import ConfigError
from tunery.jsonl import JsonObject
from tunery.openai_api.methods import LARGEST_BATCH, LARGEST_EPOCHS, LONGEST_SUFFIX, method_of

LARGEST_SEED = 2**31 - 1

_MEANING = (
    "name",
    "model",
    "output",
    "seed",
    "data",
    "train.epochs",
    "train.batch_size",
    "train.objective",
    "train.beta",
    "train.learning_rate",
    "train.learning_rate_multiplier",
    "train.report_to",
    "evaluate",
    "hosted",
)
_NO_MEANING = ("data.max_length", "data.too_long")


def has_meaning(setting: str) -> bool:
    """Whether a setting ("lora.rank") says something to a hosted model."""
    inside = any(setting == name or setting.startswith(f"{name}.") for name in _MEANING)
    return inside and setting not in _NO_MEANING


def given(settings: BaseModel, at: str = "") -> list[str]:
    """The settings that a person set, by their names, even where they set the default."""
    return [
        name
        for key in type(settings).model_fields
        if key in settings.model_fields_set
        for value in [getattr(settings, key)]
        for name in (given(value, f"{at}{key}.") if isinstance(value, BaseModel) else [f"{at}{key}"])
    ]


def require_meaning(task: Task) -> None:
    """Refuse settings that nobody would follow.

    Raises:
        ConfigError: a setting without a meaning for hosted models was set, or one is outside what they take.
    """
    if not task.hosted_model:
        raise ConfigError(f"model: {task.model} names no model", "for example openai:gpt-4.1-mini")
    if ignored := [name for name in given(task) if not has_meaning(name)]:
        some = ignored[:10]
        more = f" and {len(ignored) - 10} more" if len(ignored) > 10 else ""
        raise ConfigError(
            f"{', '.join(some)}{more}: no meaning for the hosted model {task.model}, whose server decides that itself",
            "remove what is named from the task, or train a model here",
        )
    train = task.train
    if train.learning_rate != "auto":
        raise ConfigError(
            "train.learning_rate: a hosted model takes no rate, only a multiple of its own",
            "set train.learning_rate_multiplier instead, e.g. 0.5",
        )
    if train.epochs != int(train.epochs) or not 1 <= train.epochs <= LARGEST_EPOCHS:
        raise ConfigError(
            f"train.epochs: {train.epochs:g}; a hosted model takes a whole number from 1 to {LARGEST_EPOCHS}"
        )
    if train.batch_size > LARGEST_BATCH:
        raise ConfigError(f"train.batch_size: {train.batch_size}; a hosted model takes at most {LARGEST_BATCH}")
    if task.seed > LARGEST_SEED:
        raise ConfigError(f"seed: {task.seed}; a hosted model takes at most {LARGEST_SEED}")


def method(task: Task, kind: KindName) -> JsonObject:
    """The job's `method`: how it trains, with all hyperparameters.

    Raises:
        ConfigError: a setting that belongs to another kind.
    """
    try:
        objective = task.objective_for(kind)
    except ValueError as error:
        raise ConfigError(str(error), "remove it, or set train.objective") from None
    if (how := method_of(objective)) is None or KINDS[kind].sent_as not in how.kinds:
        raise ConfigError(
            f"train.objective: hosted models do not train with {objective} on rows of kind {kind}",
            "leave train.objective out, or train a model here",
        )
    train = task.train
    multiplier_set = "learning_rate_multiplier" in train.model_fields_set
    hyperparameters: JsonObject = {
        "n_epochs": int(train.epochs),
        "batch_size": train.batch_size,
        "learning_rate_multiplier": train.learning_rate_multiplier if multiplier_set else "auto",
    }
    for name in how.extra:
        value = getattr(train, name)
        hyperparameters[name] = "auto" if value is None else value
    return {"type": how.name, how.name: {"hyperparameters": hyperparameters}}


def suffix(task: Task) -> str:
    """What stands in the tuned model's name."""
    return (task.hosted.suffix or task.name)[:LONGEST_SUFFIX]


def to_yaml(task: Task) -> str:
    """The task with the defaults of every setting that has a meaning written out."""
    values = task.model_dump(mode="json")
    left_out = [name for name, _ in all_settings() if not has_meaning(name)]
    if "learning_rate_multiplier" not in task.train.model_fields_set:
        left_out.append("train.learning_rate_multiplier")  # written down it would be sent, in place of "auto"
    for name in left_out:
        section = values
        *path, last = name.split(".")
        for part in path:
            section = section[part]
        section.pop(last, None)
    kept = {key: value for key, value in values.items() if value != {}}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=100)
