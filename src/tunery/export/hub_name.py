"""What the Hub calls a run's base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tunery.config import BUILT_IN_MODELS
from tunery.evaluation.record import RunRecord, pick

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def hub_id(record: RunRecord) -> str | None:
    """The base model's id on the Hub, or None if it came from a folder or file."""
    task = task_of(record)
    for value in (pick(record.receipt, "model", "source"), pick(record.receipt, "model", "name"), pick(task, "model")):
        if not isinstance(value, str):
            continue
        value = BUILT_IN_MODELS.get(value, value)
        # a relative folder may look like owner/name: it exists here
        if _HUB_ID.fullmatch(value) and not value.endswith(".gguf") and not Path(value).exists():
            return value
    return None


def task_of(record: RunRecord) -> Mapping[str, Any]:
    """The run's task as written down; {} if it cannot be read."""
    try:
        task = yaml.safe_load(record.task_yaml)
    except yaml.YAMLError:
        return {}
    return task if isinstance(task, dict) else {}
