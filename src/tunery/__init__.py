"""LoRA fine-tuning of GPT-class language models on the machine you have, with proof of what was trained.

    run = tunery.train("task.yaml")            # train, evaluate, report → a run directory
    tuned = tunery.load("runs/my-task")        # the base with its adapter
    tuned.answer("…")
    tunery.export_run("runs/my-task", "gguf")  # a file for llama.cpp, compared with the adapter in llama.cpp

    model = tunery.apply_lora(model, rank=8)   # a LoRA layer in a notebook, under any trainer

Names are imported when first used, so `import tunery` needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tunery.startup import limit_openmp_spinning

if TYPE_CHECKING:
    from tunery.api import Run, check, evaluate, load, train
    from tunery.config import Task
    from tunery.errors import TuneryError
    from tunery.evaluation.tuned import TunedModel
    from tunery.export.destinations import check_destinations
    from tunery.export.run import Export, export_run
    from tunery.fast.adapters import apply_lora, load_adapter, merge
    from tunery.lora.adapter import save_adapter
    from tunery.lora.attach import disabled, set_active
    from tunery.moving import migrate
    from tunery.task_file import load_task

    __version__: str

_HOMES = {
    "Export": "tunery.export.run",
    "Run": "tunery.api",
    "Task": "tunery.config",
    "TunedModel": "tunery.evaluation.tuned",
    "TuneryError": "tunery.errors",
    "apply_lora": "tunery.fast.adapters",
    "check": "tunery.api",
    "check_destinations": "tunery.export.destinations",
    "disabled": "tunery.lora.attach",
    "evaluate": "tunery.api",
    "export_run": "tunery.export.run",
    "load": "tunery.api",
    "load_adapter": "tunery.fast.adapters",
    "load_task": "tunery.task_file",
    "merge": "tunery.fast.adapters",
    "migrate": "tunery.moving",
    "save_adapter": "tunery.lora.adapter",
    "set_active": "tunery.lora.attach",
    "train": "tunery.api",
}

__all__ = [
    "Export",
    "Run",
    "Task",
    "TunedModel",
    "TuneryError",
    "__version__",
    "apply_lora",
    "check",
    "check_destinations",
    "disabled",
    "evaluate",
    "export_run",
    "load",
    "load_adapter",
    "load_task",
    "merge",
    "migrate",
    "save_adapter",
    "set_active",
    "train",
]

limit_openmp_spinning()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from tunery.versions import version_of

        return version_of("tunery")
    if name not in _HOMES:
        raise AttributeError(f"module 'tunery' has no attribute {name!r}")
    from tunery.startup import collector_paused

    with collector_paused():
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
