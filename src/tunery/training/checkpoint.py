"""Checkpoints: the complete state of training, in safetensors and JSON, whole or absent.

checkpoints/step-N/ holds the adapter as PEFT's folders do (adapter_config.json, adapter_model.safetensors), so that it
can be loaded, served or started from as it is; and optimizer.safetensors (AdamW's moments and step counts) and
state.json. There is no random state to keep: the order of rows follows from (seed, epoch, step) and dropout from
(seed, step). So on one machine's CPU resuming is bit-equal; on a GPU packed rows differ by rounding from run to run, as
the backward passes of its attention kernels add in any order (tunery.fast.attention_gpu).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from tunery.config import OF_THE_START, all_settings
from tunery.errors import CheckpointError
from tunery.jsonl import JsonMapping, JsonObject, is_mapping
from tunery.lora.adapter import CONFIG_FILE, WEIGHTS_FILE, keep_other_content
from tunery.models.typed import load_file
from tunery.paths import RunPaths, read_json, write_folder, write_json

NEUTRAL_SETTINGS = {
    "name",
    "output",
    "evaluate",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.compile",
    "train.cpu_workers",
    "train.logging_steps",
    "train.save_steps",
    "train.save_limit",
    "train.report_to",
    "hosted",
}
"""Settings that may change between a checkpoint and its resumption: they leave the update as it is."""

FILES = ("state.json", WEIGHTS_FILE, "optimizer.safetensors")
"""What training resumes from; adapter_config.json beside them is for others."""


@dataclass
class TrainerState:
    """How far training is, besides the tensors.

    Attributes:
        step: optimizer steps done.
        data_tokens, computed_tokens, trained_tokens, positions, pairs: sums over those steps
            (tunery.training.objectives.base.StepStats).
        seconds: time spent in those steps.
        best_step, best_loss: of the validation loss; None before the first validation.
        bad_validations: validations in a row without a better loss.
        micro_rows, micro_tokens, halvings: the micro-batch limit in force.
        recomputing: activations are recomputed.
        cpu_workers: processes that compute a step; None before the first one.
        resumed_from: the steps at which training was taken up again.
        dtype: dtype of the base, such as "bfloat16".
    """

    step: int = 0
    data_tokens: int = 0
    computed_tokens: int = 0
    trained_tokens: int = 0
    positions: int = 0
    pairs: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    valid_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    bad_validations: int = 0
    micro_rows: int | None = None
    micro_tokens: int | None = None
    halvings: int = 0
    recomputing: bool = False
    cpu_workers: int | None = None
    resumed_from: tuple[int, ...] = ()
    dtype: str | None = None


def settings_that_matter(task: JsonMapping) -> JsonObject:
    """The task's settings, flattened ("lora.rank" → 8), without the neutral ones and without paths of data
    files and of the adapter to start from, whose content counts."""
    flat: JsonObject = {}

    def walk(value: object, at: str) -> None:
        if at in NEUTRAL_SETTINGS:
            return
        if is_mapping(value) and value and at != "data.labels":
            for key, inner in value.items():
                walk(inner, f"{at}.{key}" if at else str(key))
        else:
            flat[at] = value

    walk(task, "")
    if flat.get("lora.start") is not None:
        flat["lora.start"] = "given"  # the adapter itself is among the inputs, wherever it lies
    return {key: value for key, value in flat.items() if key not in ("data.train", "data.validation", "data.test")}


def changed_settings(then: JsonMapping, now: JsonMapping) -> list[str]:
    """What differs between two results of `settings_that_matter`, each as "lora.rank: 4 → 8". A setting that one lacks,
    because it was written by another version, has its default."""
    defaults = {key: info.default for key, info in all_settings()}
    keys = sorted({*then, *now})

    def of(values: JsonMapping, key: str) -> object:
        brought = values.get("lora.start") is not None and key.removeprefix("lora.") in OF_THE_START
        return values.get(key, None if brought else defaults.get(key))

    pairs = [[of(values, key) for values in (then, now)] for key in keys]
    return [
        f"{key}: {before!r} → {after!r}"
        for key, (before, after) in zip(keys, pairs, strict=True)
        if json.dumps(before, sort_keys=True, default=str) != json.dumps(after, sort_keys=True, default=str)
    ]


def recorded_dtype(path: Path) -> str | None:
    """The dtype a checkpoint was computed in: going on in another one would not be the same run."""
    try:
        return read_json(path / "state.json")["progress"]["dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # `load` says what is wrong with it


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps with a checkpoint in `checkpoints/`, ascending."""
    found = (re.fullmatch(r"step-(\d+)", entry.name) for entry in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: `checkpoints/` of the run directory.
        task: the task's settings as JSON values.
        inputs: what else must be the same to resume, each by its name in words: {"the training rows": SHA-256, …}.
        adapter: the content of adapter_config.json (tunery.lora.adapter.adapter_config).
    """

    def __init__(self, folder: Path, task: JsonMapping, inputs: Mapping[str, str], adapter: JsonMapping):
        self.folder = folder
        self.settings = settings_that_matter(task)
        self.inputs = dict(inputs)
        self.adapter = dict(adapter)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        return checkpoint_steps(self.folder)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step-{step}"

    def save(self, adapter: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, state: TrainerState) -> Path:
        """Write the checkpoint of `state.step`; `adapter` maps names to the optimizer's parameters, in its order."""
        content = {"progress": asdict(state), "settings": self.settings, "inputs": self.inputs}

        def fill(folder: Path) -> None:
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
            (folder / WEIGHTS_FILE).write_bytes(save(weights, metadata={"format": "pt"}))
            write_json(folder / CONFIG_FILE, self.adapter)
            (folder / "optimizer.safetensors").write_bytes(save(_optimizer_tensors(adapter, optimizer)))
            write_json(folder / "state.json", content)

        write_folder(self.path(state.step), fill)
        return self.path(state.step)

    def prune(self, keep: int, best: int | None) -> None:
        """Remove all but the newest `keep` checkpoints and the best one."""
        for step in self.steps()[:-keep]:
            if step != best:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def load(self, path: Path, adapter: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None) -> TrainerState:
        """Put a checkpoint's tensors into the adapter and the optimizer (None: leave it), and return its state.

        Raises:
            CheckpointError: unreadable, or made by a task with other settings, rows or tensors.
        """
        missing = [name for name in FILES if not (path / name).is_file()]
        if missing:
            raise CheckpointError(f"{path} is not a checkpoint: {missing[0]} is missing")
        try:
            content = read_json(path / "state.json")
            tensors = load_file(path / WEIGHTS_FILE)
            moments = load_file(path / "optimizer.safetensors")
            progress: JsonObject = content["progress"]
            progress = {**progress, "resumed_from": tuple(progress["resumed_from"])}
            state = TrainerState(**progress)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint {path} cannot be read: {error}",
                "remove that folder to resume from an earlier one, or start over with --resume never",
            ) from None
        self._require_same_task(path, content)
        if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in adapter.items()}:
            raise CheckpointError(f"the checkpoint {path} holds an adapter of another shape", "use --resume never")
        with torch.no_grad():
            for name, parameter in adapter.items():
                parameter.copy_(tensors[name])
        if optimizer is not None:
            _restore_optimizer(adapter, optimizer, moments)
        return state

    def _require_same_task(self, path: Path, state: JsonMapping) -> None:
        if changed := changed_settings(state["settings"], self.settings):
            raise CheckpointError(
                f"{path.parent.parent} was trained with other settings: {'; '.join(changed)}",
                "to start over use --resume never (the old run is kept under another name), "
                "or give this run its own name with --set name=NAME",
            )
        other = [name for name in self.inputs if state["inputs"].get(name) != self.inputs[name]]
        if other:
            raise CheckpointError(
                f"changed since {path} was written: {', '.join(other)}",
                "to start over use --resume never (the old run is kept under another name)",
            )


def export_checkpoint(run: str | Path, step: int, target: str | Path) -> Path:
    """Copy the adapter of one step out of a run directory, as a folder in PEFT's format: whole or not at all.

    No model is loaded. A run keeps its last `train.save_limit` checkpoints and removes older ones while it trains.

    Args:
        run: the run directory.
        target: the new folder; an adapter that lies there is replaced.

    Returns:
        `target`.

    Raises:
        CheckpointError: the run has no checkpoint of that step (any more).
        AdapterError: `target` holds something else than an adapter.
    """
    checkpoints, target = RunPaths(Path(run)).checkpoints, Path(target)
    source = checkpoints / f"step-{step}"
    keep_other_content(target)

    def fill(folder: Path) -> None:
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            shutil.copyfile(source / name, folder / name)

    try:
        write_folder(target, fill)
    except FileNotFoundError:
        kept = ", ".join(map(str, checkpoint_steps(checkpoints))) or "none"
        raise CheckpointError(
            f"{run} has no checkpoint of step {step}", f"it has {kept}; train.save_limit says how many are kept"
        ) from None
    return target


def _optimizer_tensors(adapter: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for name, parameter in adapter.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(
    adapter: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    states: dict[str, dict[str, Tensor]] = {name: {} for name in adapter}
    for full, value in tensors.items():
        name, _, key = full.partition("|")
        if name not in states:
            raise CheckpointError(f"the optimizer's state names a tensor that is not trained: {name}")
        # AdamW's fused kernel on a GPU wants the count of steps there too, and in float32 (pytorch/pytorch#104767).
        states[name][key] = value.to(adapter[name].device, torch.float32 if key == "step" else adapter[name].dtype)
    for name, parameter in adapter.items():
        if states[name]:
            optimizer.state[parameter] = states[name]
