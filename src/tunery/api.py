"""What a person can do, as functions. The command line and scripts call these; there is one engine behind them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.config import Task
from tunery.console import Console
from tunery.data.prepare import Prepared, prepare
from tunery.data.read import read_data, read_more
from tunery.errors import CheckpointError, ConfigError, StoppedError, TuneryError
from tunery.evaluation.compare import HeldOut, compare
from tunery.evaluation.report import write_report
from tunery.evaluation.tuned import TunedModel, load_run, read_receipt
from tunery.export.card import write_card
from tunery.models.flat import FlatModel
from tunery.models.load import load_base, load_config, load_tokenizer
from tunery.paths import RunPaths, lock, safe_name, write_json
from tunery.task_file import load_task
from tunery.training.check import check as check_prepared
from tunery.training.checkpoint import recorded_dtype, settings_that_matter
from tunery.training.fit import View, fit
from tunery.training.lr_test import RangeTest, range_test


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: the run directory.
        receipt: the content of receipt.json.
        evaluation: the content of evaluation.json; None if evaluation was off.
    """

    path: Path
    receipt: dict[str, Any]
    evaluation: dict[str, Any] | None

    def load(self) -> TunedModel:
        """The base with this run's adapter, ready to answer."""
        return load_run(self.path)


def _as_task(task: str | Path | Task, overrides: Sequence[str]) -> Task:
    if isinstance(task, Task):
        if overrides:
            raise ConfigError("overrides are for task files; change a Task with model_copy(update=…) instead")
        return task
    return load_task(task, overrides)


def _context(config: Any) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20)


def _prepare(task: Task, tokenizer: Any, config: Any) -> Prepared:
    return prepare(read_data(task.data, task.seed), task.data, tokenizer, _context(config))


def train(
    task: str | Path | Task, overrides: Sequence[str] = (), *, resume: str = "auto", view: View | None = None
) -> Run:
    """Train, evaluate and report.

    Args:
        task: a task file, or a Task.
        overrides: "key=value" settings over the file's.
        resume: "auto" goes on from the last checkpoint of the run directory, if there is one, and returns a finished
            run as it is; "never" starts over and keeps an earlier run under another name; else a checkpoint folder.
        view: shown the progress; the default prints to stderr.

    Raises:
        TuneryError: see tunery.errors; the message says what to do.
    """
    task = _as_task(task, overrides)
    view = view or Console()
    paths = RunPaths(task.run_dir)
    with lock(paths.root.with_name(f".{paths.root.name}.lock")):
        if resume == "never":
            _set_aside(paths, view)
        checkpoint = _checkpoint(paths, resume)
        if resume == "auto" and paths.receipt.exists():
            return _finish(_same_task(task, paths), paths, view)
        recorded = recorded_dtype(checkpoint) if checkpoint and task.train.precision == "auto" else None
        base = load_base(task.model, precision=recorded or task.train.precision, device=task.train.device)
        prepared = _prepare(task, base.tokenizer, base.model.config)
        for note in prepared.data.notes:
            view.note(note)
        fitted = fit(task, prepared, base, paths, view, checkpoint)
        evaluation = None
        if task.evaluate.enabled and prepared.held_out[2].rows:
            evaluation = _evaluate(task, fitted.model, _held_out(prepared), paths.evaluation, view)
        _write_pages(paths)
        return Run(paths.root, fitted.receipt, evaluation)


def _set_aside(paths: RunPaths, view: View) -> None:
    """Give an existing run directory another name."""
    if not paths.root.exists():
        return
    number = 1
    while (kept := paths.root.with_name(f"{paths.root.name}.old-{number}")).exists():
        number += 1
    paths.root.rename(kept)
    view.note(f"the earlier run is kept as {kept}")


def _checkpoint(paths: RunPaths, resume: str) -> Path | None:
    """The checkpoint to go on from."""
    if resume not in ("auto", "never"):
        path = Path(resume)
        if not (path / "state.json").is_file():
            raise CheckpointError(f"{path} is not a checkpoint", "name a folder such as runs/NAME/checkpoints/step-100")
        return path
    steps = sorted(paths.checkpoints.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    return steps[-1] if steps and resume == "auto" else None


def _same_task(task: Task, paths: RunPaths) -> Task:
    """The task, if the finished run in `paths` is its own.

    Raises:
        ConfigError: that run had other settings.
    """
    then = settings_that_matter(load_task(paths.task).model_dump(mode="json"))
    now = settings_that_matter(task.model_dump(mode="json"))
    changed = [f"{k}: {then.get(k)!r} → {now.get(k)!r}" for k in sorted({*then, *now}) if then.get(k) != now.get(k)]
    if changed:
        raise ConfigError(
            f"{paths.root} holds a finished run with other settings: {'; '.join(changed)}",
            "give this run its own name with --set name=NAME, or start over with --resume never "
            "(the earlier run is kept under another name)",
        )
    return task


def _finish(task: Task, paths: RunPaths, view: View) -> Run:
    """What is missing of a run whose training is complete."""
    receipt = read_receipt(paths)
    if task.evaluate.enabled and not paths.evaluation.exists() and receipt["data"]["validation_rows"]:
        view.note(f"{paths.root} is trained; evaluating it")
        return Run(paths.root, receipt, evaluate(paths.root, view=view))
    view.note(f"{paths.root} is already finished; to start over use --resume never")
    if not paths.report.exists():
        _write_pages(paths)
    evaluation = json.loads(paths.evaluation.read_text()) if paths.evaluation.exists() else None
    return Run(paths.root, receipt, evaluation)


def _held_out(prepared: Prepared) -> HeldOut:
    split, examples, rows = prepared.held_out
    return HeldOut(split, prepared.data.kind, examples, rows, prepared.renderer, prepared.max_length)


def _evaluate(task: Task, model: FlatModel, held_out: HeldOut, target: Path, view: View) -> dict[str, Any]:
    try:
        result = compare(model, held_out, task.evaluate, view.note)
    except KeyboardInterrupt:
        raise StoppedError(
            "interrupted while evaluating; the adapter is trained and saved",
            "run the same command again to evaluate it",
        ) from None
    write_json(target, result)
    return result


def _write_pages(paths: RunPaths) -> None:
    write_card(paths.root, paths.adapter)
    write_report(paths.root)


def load(run: str | Path, *, device: str = "auto") -> TunedModel:
    """Load a run directory: the base with its adapter, ready to `answer`, `stream` or `classify`."""
    return load_run(run, device=device)


def evaluate(run: str | Path, data: str | Path | None = None, *, view: View | None = None) -> dict[str, Any]:
    """Measure base against tuned.

    Args:
        run: a run directory.
        data: a file of further rows; its result is written to evaluation-FILE.json. Without it, the run's own held-out
            rows are measured again, evaluation.json is written and the report renewed.

    Returns:
        The content of the evaluation file.
    """
    from tunery.data.prepare import tokenize

    view = view or Console()
    tuned = load_run(run)
    paths = RunPaths(Path(run))
    if data is not None:
        kind, labels = tuned.receipt["data"]["kind"], tuple(tuned.receipt["data"]["labels"])
        more = read_more(str(data), tuned.task.data, kind, labels, tuned.receipt["data"]["columns"])
        for note in more.notes:
            view.note(note)
        rows = tokenize(tuned.renderer, more.test, tuned.limit, tuned.task.data.too_long)
        held_out = HeldOut(Path(data).name, kind, more.test, rows, tuned.renderer, tuned.limit)
        target = paths.root / f"evaluation-{safe_name(Path(data).stem)}.json"
        return _evaluate(tuned.task, tuned.flat, held_out, target, view)
    held_out = _held_out(_prepare(tuned.task, tuned.base.tokenizer, tuned.model.config))
    result = _evaluate(tuned.task, tuned.flat, held_out, paths.evaluation, view)
    _write_pages(paths)
    return result


def check(task: str | Path | Task, overrides: Sequence[str] = (), *, samples: int = 3) -> Mapping[str, Any]:
    """Everything about a task that can be known before any compute; see tunery.training.check."""
    task = _as_task(task, overrides)
    data = read_data(task.data, task.seed)
    prepared = prepare(data, task.data, load_tokenizer(task.model), _context(load_config(task.model)))
    return check_prepared(task, prepared, samples)


def learning_rate_test(
    task: str | Path | Task, overrides: Sequence[str] = (), *, steps: int = 40, view: View | None = None
) -> RangeTest:
    """A learning-rate range test on the task's own data; nothing is saved."""
    task = _as_task(task, overrides)
    view = view or Console()
    base = load_base(task.model, precision=task.train.precision, device=task.train.device)
    prepared = _prepare(task, base.tokenizer, base.model.config)
    result = range_test(task, prepared, base, steps, lambda step, of: view.note(f"step {step}/{of}"))
    if not result.rates:
        raise TuneryError("the loss was not finite from the start", "check the data with `tunery check`")
    return result
