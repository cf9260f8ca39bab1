"""Settling everything that the task file left to "auto"."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from tunery.config import KindName, Task, TrainConfig
from tunery.data.batching import steps_per_epoch
from tunery.data.prepare import Prepared, Rows
from tunery.errors import ConfigError, DataError
from tunery.jsonl import JsonMapping
from tunery.models.typed import text_config
from tunery.training.loop import Plan
from tunery.training.objectives import OBJECTIVES
from tunery.training.objectives.base import Objective
from tunery.training.schedule import auto_learning_rate, warmup_steps

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VALIDATIONS = 10
"""How often a run is validated under `eval_steps: auto`."""


def _objective_type(task: Task, kind: KindName) -> type[Objective]:
    try:
        return OBJECTIVES[task.objective_for(kind)]
    except ValueError as error:
        raise ConfigError(str(error), "remove it, or set train.objective") from None


def make_objective(task: Task, kind: KindName, train: Rows, recorded: JsonMapping | None = None) -> Objective:
    """What a task minimises.

    Args:
        kind: of its rows, as found.
        train: those it is trained on, as `select_rows` leaves them.
        recorded: the receipt of a finished run; see Objective.build.

    Raises:
        ConfigError: a setting that this objective has no use for.
    """
    return _objective_type(task, kind).build(task, train, recorded)


def select_rows(task: Task, prepared: Prepared) -> Prepared:
    """The rows that the task's objective works on.

    Raises:
        ConfigError: it has no use for rows of this kind.
        DataError: none of the training rows is left.
    """
    select = _objective_type(task, prepared.data.kind).select
    selected = replace(prepared, **{name: select(rows) for name, rows in prepared.splits.items()})
    if not selected.train.rows:
        raise DataError(
            f"no row is left to train: {selected.train.dropped[-1][1]}", "add rows, or choose another train.objective"
        )
    return selected


def total_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of a run over `rows` training rows (or pairs)."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(config.epochs * steps_per_epoch(rows, config.batch_size) - 1e-9))


def peak_rate(config: TrainConfig, model_config: PreTrainedConfig, objective: Objective) -> float:
    """The highest learning rate: as set, or by the rule of `auto_learning_rate` times the objective's own scale; and
    times the multiplier."""
    if config.learning_rate != "auto":
        return config.learning_rate * config.learning_rate_multiplier
    rate = auto_learning_rate(text_config(model_config).hidden_size)
    return float(f"{rate * objective.lr_scale:.2g}") * config.learning_rate_multiplier


def validation_every(config: TrainConfig, total: int) -> int | None:
    """Steps between two validations in a run of `total` steps that has rows to validate on; None for never."""
    return _auto_every(total) if config.eval_steps == "auto" else config.eval_steps


def _auto_every(total: int) -> int:
    return max(1, round(total / VALIDATIONS))


def make_plan(task: Task, prepared: Prepared, model_config: PreTrainedConfig) -> Plan:
    """The plan of a run.

    Args:
        prepared: the tokenised rows (or pairs) of each split.
        model_config: transformers' config of the base.
    """
    config, objective = task.train, make_objective(task, prepared.data.kind, prepared.train)
    rows, validation_rows = prepared.train.units, prepared.validation.units
    total = total_steps(config, rows)
    eval_every = validation_every(config, total) if validation_rows else None
    save_every = (eval_every or _auto_every(total)) if config.save_steps == "auto" else config.save_steps
    restore = config.early_stopping_patience is not None if config.restore_best == "auto" else config.restore_best
    return Plan(
        config=config,
        seed=task.seed,
        objective=objective,
        total_steps=total,
        warmup_steps=warmup_steps(config.warmup, total),
        steps_per_epoch=steps_per_epoch(rows, config.batch_size),
        peak=peak_rate(config, model_config, objective),
        eval_every=eval_every,
        save_every=save_every,
        restore_best=restore and eval_every is not None,
    )
