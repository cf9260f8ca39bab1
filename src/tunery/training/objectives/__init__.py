"""What a run can minimise. A new objective is a file here, an entry below and a name in tunery.config."""

from __future__ import annotations

from collections.abc import Mapping

from tunery.config import ObjectiveName
from tunery.training.objectives.base import Objective
from tunery.training.objectives.dpo import DPO
from tunery.training.objectives.kto import KTO
from tunery.training.objectives.sft import CrossEntropy

OBJECTIVES: Mapping[ObjectiveName, type[Objective]] = {each.name: each for each in (CrossEntropy, DPO, KTO)}
