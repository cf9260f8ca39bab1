"""From tokenised rows and a base model to a trained, saved and proven adapter in a run directory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from tunery.config import Task
from tunery.data.batching import step_rows
from tunery.data.prepare import Prepared
from tunery.errors import StoppedError
from tunery.fast.attention_gpu import refusals
from tunery.fast.compile import calls, compiles, compiling
from tunery.fast.packed_model import PackedModel, optimize_model
from tunery.jsonl import JsonMapping
from tunery.lora.adapter import adapter_config, write_adapter_files
from tunery.lora.attach import adapter_state, trainable_parameters
from tunery.lora.dropout import DropoutClock
from tunery.models.device import available_memory
from tunery.models.gguf import few_bits
from tunery.models.load import Base, BaseInfo
from tunery.models.portable import save_tokenizer
from tunery.paths import RunPaths, write_atomic, write_folder
from tunery.progress import Note, Progress
from tunery.records.run_receipt import Receipt
from tunery.startup import seconds_since_start
from tunery.text import gigabytes
from tunery.training.build_receipt import build_receipt
from tunery.training.checkpoint import Checkpoints, TrainerState
from tunery.training.data_parallel import Workers, start_workers
from tunery.training.decoder_layers import DecoderLayers, running_layers, try_compiling
from tunery.training.guard import MicroBatchLimit, stop_signals
from tunery.training.loop import Loop, Plan, make_optimizer
from tunery.training.metrics import RunLog, read_metrics
from tunery.training.plan import make_plan
from tunery.training.scoring import scoring_functions
from tunery.training.sizing import SAMPLED_STEPS, Sizing, size_up
from tunery.training.start import Attached, attach_adapter
from tunery.training.throughput import speed_check
from tunery.training.worker_pool import Function, can_fork, wanted_workers

_RECOMPUTE = "recompute"


class _TimedLog(RunLog):
    """A RunLog that tells how long the first step took to come.

    Attributes:
        first_step: seconds from the start of the process to the end of the first step that was logged.
    """

    first_step: float | None = None

    def log(self, line: JsonMapping) -> None:
        super().log(line)
        if self.first_step is None and "train_loss" in line:
            self.first_step = round(seconds_since_start(), 2)
            self.note(Note(f"the first step was done {self.first_step:.1f} s after the start of the program"))


@dataclass(frozen=True)
class FitResult:
    """A trained adapter, still in memory as the active adapter "default", and its receipt."""

    model: PackedModel
    receipt: Receipt


def fit(
    task: Task, prepared: Prepared, base: Base, paths: RunPaths, progress: Progress, resume: Path | None
) -> FitResult:
    """Train, save, read back, and write the receipt.

    Args:
        resume: a checkpoint folder to resume from; None begins at step 0.

    Raises:
        StoppedError, DivergedError, CheckpointError, AdapterError: see tunery.errors; the last checkpoint is sound.
    """
    with compiling(task.train.compile):
        return _fit(task, prepared, base, paths, progress, resume)


def _fit(
    task: Task, prepared: Prepared, base: Base, paths: RunPaths, progress: Progress, resume: Path | None
) -> FitResult:
    started = time.perf_counter()
    plan = make_plan(task, prepared, base.model.config)
    attached = attach_adapter(task, base.model, reference=plan.objective.has_reference)
    model = optimize_model(base.model)
    adapter = adapter_state(base.model)
    initial = {name: tensor.detach().cpu().clone() for name, tensor in adapter.items()}
    sizing = size_up(task, prepared, base.model, model, available_memory(base.model.device))
    _say_plan(progress, plan, attached, base.info, model, sizing)
    checkpoints = Checkpoints(
        paths.checkpoints,
        task.model_dump(mode="json"),
        _inputs(prepared, base, attached),
        adapter_config(base.model, base_model=base.info.name),
    )
    optimizer = make_optimizer(adapter, task.train)
    state = TrainerState(dtype=base.info.dtype)
    limit = MicroBatchLimit(sizing.micro_rows, sizing.micro_tokens, noun=plan.objective.noun)
    if resume is not None:
        state, limit = _take_up(
            checkpoints, resume, adapter, optimizer, limit, progress, fixed=task.train.micro_batch_size != "auto"
        )
    recompute = sizing.gradient_checkpointing or (
        state.recomputing and task.train.gradient_checkpointing == "auto"
    )  # a resumed run continues as it was
    write_atomic(paths.task, task.to_yaml())
    with (
        _TimedLog.open(
            task, task.model_dump(mode="json"), paths, progress, state.step, keep_until_step=state.step
        ) as log,
        running_layers(base.model, recompute) as layers,
        _workers(task, prepared, model, plan, attached.clock, layers, state) as workers,
        stop_signals(progress.note) as stop,
    ):
        log.start(plan.total_steps, state.step)
        loop = Loop(
            plan=plan,
            model=model,
            adapter=adapter,
            optimizer=optimizer,
            clock=attached.clock,
            train=prepared.train.rows,
            validation=prepared.validation.first(task.train.eval_rows),
            limit=limit,
            checkpoints=checkpoints,
            state=state,
            progress=log,
            stop=stop,
            history=read_metrics(paths.metrics),
            workers=workers,
            speed_check=speed_check(model, plan.objective.passes, chosen=task.train.precision == "auto"),
            ahead=1 if model.device.type == "cuda" else 0,
        )
        if workers is not None:
            progress.note(
                Note(f"{workers.count} processes compute the rows of a step side by side (train.cpu_workers)")
            )
        _set_up_layers(task, layers, model, adapter, loop, progress)
        compiled_calls = calls()
        loop.run()
        loop.compiled = calls() > compiled_calls
    _save_adapter(base, paths.adapter)
    receipt = build_receipt(task, prepared, base, loop, initial, attached, sizing.expected_bytes, paths.adapter)
    receipt.speed.startup_seconds = log.first_step
    receipt.speed.total_seconds = round(time.perf_counter() - started, 2)
    receipt.write(paths.receipt)
    if stop:
        raise StoppedError(
            "the adapter is trained and saved; stopped before its evaluation",
            "run the same command again to evaluate it",
            signal_number=stop.signal_number or 2,
        )
    return FitResult(model, receipt)


def _inputs(prepared: Prepared, base: Base, attached: Attached) -> dict[str, str]:
    """What must be the same to resume from a checkpoint, besides the settings."""
    start = {"the adapter to start from": " ".join(attached.start.hashes)} if attached.start else {}
    return {
        "the training rows": prepared.train.sha256(),
        "the validation rows": prepared.validation.sha256(),
        "the base model": base.info.sha256,
        "the kind of device": base.model.device.type,
        **start,
    }


def _take_up(
    checkpoints: Checkpoints,
    path: Path,
    adapter: Mapping[str, Tensor],
    optimizer: Optimizer,
    limit: MicroBatchLimit,
    progress: Progress,
    *,
    fixed: bool,
) -> tuple[TrainerState, MicroBatchLimit]:
    """Load a checkpoint. Its micro-batch limit is kept, since another one would add in another order, unless the task
    fixes one."""
    state = checkpoints.load(path, adapter, optimizer)
    state.resumed_from = (*state.resumed_from, state.step)
    if state.micro_rows is not None and not fixed:
        limit = MicroBatchLimit(state.micro_rows, state.micro_tokens, state.halvings, noun=limit.noun)
    progress.note(Note(f"resuming from step {state.step} ({path})"))
    return state, limit


@contextlib.contextmanager
def _workers(
    task: Task,
    prepared: Prepared,
    model: PackedModel,
    plan: Plan,
    clock: DropoutClock,
    layers: DecoderLayers,
    state: TrainerState,
) -> Generator[Workers | None]:
    """Processes that compute beside this one, where they make a run faster. A resumed run keeps their number, since
    another one would add in another order, unless the task fixes it."""
    train, objective = prepared.train, plan.objective
    count = task.train.cpu_workers
    if count == "auto":
        batches = [
            step_rows(train.rows, train.unit, task.seed, step, plan.config.batch_size) for step in range(SAMPLED_STEPS)
        ]
        count = state.cpu_workers or wanted_workers(model, batches, objective.unit, torch.get_num_threads())
    elif not can_fork(model):
        count = 1
    functions: dict[str, Function] = {_RECOMPUTE: lambda _: layers.recompute(), **scoring_functions(model)}
    workers = start_workers(model, trainable_parameters(model.model), clock, objective, count, functions)
    try:
        yield workers
    finally:
        if workers is not None:
            workers.close()


def _set_up_layers(
    task: Task, layers: DecoderLayers, model: PackedModel, adapter: Mapping[str, Tensor], loop: Loop, progress: Progress
) -> None:
    """Offer the last resort against running out of memory, and compile where that is asked for and works."""
    loop.limit.recomputing = layers.recomputing
    if task.train.gradient_checkpointing == "auto" and layers.layers and not layers.recomputing:
        loop.limit.recompute = partial(_recompute, layers, loop.workers)
    if compiles(model.device):
        for remark in try_compiling(model, list(adapter.values())):
            progress.note(Note(remark))


def _recompute(layers: DecoderLayers, workers: Workers | None) -> None:
    if workers is None:
        layers.recompute()
    else:
        workers.pool.call(_RECOMPUTE, [None] * workers.count)


def _say_plan(
    progress: Progress, plan: Plan, attached: Attached, base: BaseInfo, model: PackedModel, sizing: Sizing
) -> None:
    if remark := few_bits(base.name, base.file_type):
        progress.note(Note(remark))
    if start := attached.start:
        progress.note(Note(f"starting from the adapter {start.path}"))
        if remark := start.remark(base.name):
            progress.note(Note(remark))
        for said in attached.notes:
            progress.note(Note(said))
    progress.note(
        Note(
            f"training {len(attached.matched)} layers for {plan.total_steps:,} steps of {plan.config.batch_size} "
            f"{plan.objective.noun}s, "
            f"learning rate {plan.peak:g}, about {gigabytes(sizing.expected_bytes)} of memory"
        )
    )
    if not model.flattened:
        progress.note(Note("this model's layers mix rows in their own way, so rows run one at a time"))
    if sizing.gradient_checkpointing:
        progress.note(Note("activations are recomputed to fit in memory (train.gradient_checkpointing)"))
    for reason in refusals():
        progress.note(Note(reason))


def _save_adapter(base: Base, folder: Path) -> None:
    def fill(temporary: Path) -> None:
        write_adapter_files(base.model, temporary, base_model=base.info.name)
        save_tokenizer(base.tokenizer, temporary)

    write_folder(folder, fill)
