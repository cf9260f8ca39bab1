"""The task that trains a model here as a job trained one elsewhere.

| job | task |
| --- | --- |
| `n_epochs` | `train.epochs` |
| `batch_size` | `train.batch_size` |
| `learning_rate_multiplier` | `train.learning_rate_multiplier`: times the rate that suits the model here |
| `beta` (dpo) | `train.beta` |
| `seed` | `seed` |
| training and validation file | `data.train`, `data.validation`; without the latter a tenth of the rows is held out |
| system messages | stay in the rows |

What the server does not say is taken as three epochs and the defaults here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunery.config import EvaluateConfig, TrainConfig
from tunery.hosted.capture import TRAINING, VALIDATION, Capture
from tunery.hosted.receipt import settled_hyperparameters
from tunery.paths import safe_name

UNKNOWN_EPOCHS = 3
"""What such jobs mostly take, where they do not say."""

HELD_OUT = 0.1


@dataclass(frozen=True)
class Equivalent:
    """A task, and how it came about.

    Attributes:
        yaml: of the task file.
        mapping: (what, in the job, in the task), for a person.
    """

    yaml: str
    mapping: list[tuple[str, str, str]]


def target_name(to: str) -> str:
    """The name of a run on this model."""
    return safe_name(Path(to).name if to.startswith((".", "/", "~")) else to)


def equivalent(capture: Capture, to: str, output: Path, kind: str) -> Equivalent:
    """The task for a captured job.

    Args:
        to: the base to train here.
        output: the folder that the run directory goes into; the task file lies there too.
        kind: of the rows.
    """
    asked = settled_hyperparameters(capture.job)
    train: dict[str, Any] = {}
    mapping: list[tuple[str, str, str]] = [("Model", str(capture.job.get("model") or "not known"), to)]
    for theirs, ours, what, default in (
        ("n_epochs", "epochs", "Epochs", UNKNOWN_EPOCHS),
        ("batch_size", "batch_size", "Batch size", None),
        ("learning_rate_multiplier", "learning_rate_multiplier", "Learning-rate multiplier", None),
        *((("beta", "beta", "Beta", None),) if kind == "preference" else ()),
    ):
        value = asked.get(theirs, None)
        value = default if value is None else value
        if value is not None:
            train[ours] = value
        shown = getattr(TrainConfig(), "effective_beta" if ours == "beta" else ours) if value is None else value
        mapping.append((what, _said(asked.get(theirs)), f"{shown:g}"))
    seed = capture.job.get("seed")
    mapping.append(("Seed", _said(seed), str(seed or 0)))
    folder = capture.folder.name
    has_validation = capture.validation is not None
    mapping.append(
        ("Held-out rows", VALIDATION if has_validation else "none", VALIDATION if has_validation else "a tenth")
    )
    task = {
        "name": target_name(to),
        "model": to,
        "output": str(output),
        "seed": int(seed or 0),
        "data": {
            "train": f"{folder}/{TRAINING}",
            "validation": f"{folder}/{VALIDATION}" if has_validation else HELD_OUT,
            "kind": kind,
        },
        "train": train,
        "evaluate": {"max_new_tokens": 2 * EvaluateConfig().max_new_tokens},
    }
    return Equivalent(_head(capture) + yaml.safe_dump(task, sort_keys=False, allow_unicode=True), mapping)


def _said(value: Any) -> str:
    return "not known" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _head(capture: Capture) -> str:
    whence = f"{capture.job['id']} ({capture.job['model']})" if capture.job else "files"
    return (
        f"# What {whence} was trained with, for a model here; written by `tunery migrate`, and yours to change.\n"
        "# The learning rate is the one that suits the model, times the job's multiplier.\n\n"
    )
