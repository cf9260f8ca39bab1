"""What a person can do, as functions. The command line and scripts call these; there is one engine behind them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.config import Task
from tunery.console import Console
from tunery.data.dated_template import writes_date
from tunery.data.examine import Examined, examine_files
from tunery.data.example import Example
from tunery.data.kinds import KINDS
from tunery.data.prepare import Prepared, dated, prepare, tokenize_once
from tunery.data.read import read_data, read_more
from tunery.data.split import text_key
from tunery.errors import CheckpointError, ConfigError, DataError, StoppedError, TuneryError
from tunery.evaluation.compare import HeldOut, compare
from tunery.evaluation.notebook import run_html, run_words
from tunery.evaluation.predict_file import PredictedFile
from tunery.evaluation.report import write_report
from tunery.evaluation.tuned import TunedModel, load_run, read_evaluation, read_local_receipt, read_receipt
from tunery.export.hub import write_card
from tunery.fast.packed_model import PackedModel
from tunery.hosted.client import Consent
from tunery.hosted.earlier_run import require_local
from tunery.hosted.hosted_plan import check_hosted
from tunery.hosted.hosted_run import cancel_hosted, evaluate_hosted, train_hosted
from tunery.inference.generate import Sampling
from tunery.jsonl import read_lines
from tunery.models.load import Base, load_base, load_config, load_tokenizer
from tunery.models.windows import context_length
from tunery.paths import RunPaths, lock, run_lock, safe_name, write_atomic
from tunery.progress import Note, Progress, Say
from tunery.records.check_report import AnyCheckReport, CheckReport
from tunery.records.evaluation_record import Evaluation
from tunery.records.prediction_record import HeldOutPrediction, PredictionSummary
from tunery.records.run_receipt import AnyReceipt, HostedReceipt, Receipt
from tunery.startup import spinning_warning
from tunery.task_file import load_task, resolve_task
from tunery.training.check import check as check_prepared
from tunery.training.checkpoint import changed_settings, checkpoint_steps, recorded_dtype, settings_that_matter
from tunery.training.fit import fit
from tunery.training.lr_test import RangeTest, range_test
from tunery.training.plan import make_objective, select_rows
from tunery.training.scoring import scoring
from tunery.training.start import read_start

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: the run directory.
        receipt: of the run, as receipt.json holds it: `receipt.training.steps` or `receipt["training"]["steps"]`.
        evaluation: the content of evaluation.json; None if evaluation was off.
    """

    path: Path
    receipt: AnyReceipt
    evaluation: Evaluation | None

    @property
    def report(self) -> Path:
        """The page on the run, to open in a browser."""
        return RunPaths(self.path).report

    @property
    def predictions(self) -> list[HeldOutPrediction]:
        """What both models say of each held-out row; [] if evaluation was off."""
        return [HeldOutPrediction.of(line) for line in read_lines(RunPaths(self.path).predictions)]

    def load(self) -> TunedModel:
        """The base with this run's adapter, ready to answer."""
        return load_run(self.path)

    def __repr__(self) -> str:
        return run_words(self.path)

    def _repr_html_(self) -> str:
        return run_html(self.path)


def _prepare(
    task: Task, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, say: Say | None = None
) -> Prepared:
    data = read_data(task.data, task.seed, say)
    return select_rows(task, prepare(data, task.data, tokenizer, context_length(config), say))


def _dated(task: Task, tokenizer: PreTrainedTokenizerBase, paths: RunPaths | None = None) -> Task:
    """The task with the day that a chat template which writes the date is told: that of the run where one is begun,
    else today."""
    if not writes_date(tokenizer):
        return task
    begun = load_task(paths.task).data.date if paths is not None and paths.task.is_file() else None
    return task.model_copy(update={"data": dated(task.data, tokenizer, begun)})


def train(
    task: str | Path | Task | None = None,
    overrides: Sequence[str] = (),
    *,
    resume: str = "auto",
    progress: Progress | None = None,
    consent: Consent | None = None,
    **settings: Any,
) -> Run:
    """Train, evaluate and report.

        run = tunery.train("my-task/task.yaml", lora={"rank": 8}, seed=1)
        run = tunery.train(model="smollm2-135m-instruct", data="reviews.csv")

    Args:
        task: a task file, or a Task; None where `settings` say everything. The run directory then holds the task file
            that would do the same.
        overrides: "key=value" settings over the file's.
        settings: the same as values: top settings by name, sections as mappings; `data` may be the files alone.
        resume: "auto" resumes from the last checkpoint of the run directory, if there is one, and returns a finished
            run as it is; "never" starts over and keeps an earlier run under another name; else a checkpoint folder,
            or the job of a hosted run ("ftjob-…") whose hosted.json was lost.
        progress: shown the progress; the default prints to stderr.
        consent: of a hosted model: told what would be sent and what it would cost, says whether to continue.

    Raises:
        TuneryError: see tunery.errors; the message says what to do.
    """
    task = resolve_task(task, overrides, settings)
    progress = progress or Console()
    paths = RunPaths(task.run_dir)
    with lock(run_lock(paths.root)):
        if resume == "never":
            _set_aside(paths, progress)
        if task.hosted_model is not None:
            return Run(paths.root, *train_hosted(task, paths, resume, progress, consent))
        require_local(paths)
        checkpoint = _checkpoint(paths, resume)
        if resume == "auto" and paths.receipt.exists():
            return _finish(task, paths, progress)
        with _telling_what_is_kept(paths):
            return _train_here(task, paths, checkpoint, progress)


def _train_here(task: Task, paths: RunPaths, checkpoint: Path | None, progress: Progress) -> Run:
    recorded = recorded_dtype(checkpoint) if checkpoint and task.train.precision == "auto" else None
    base = _load_base(task, recorded or task.train.precision)
    task = _dated(task, base.tokenizer, paths)
    prepared = _prepare(task, base.tokenizer, base.model.config, progress.note)
    for note in (*map(Note, prepared.data.notes), *_about_computing(base)):
        progress.note(note)
    fitted = fit(task, prepared, base, paths, progress, checkpoint)
    evaluation = None
    if task.evaluate.enabled and prepared.held_out[2].rows:
        evaluation = _evaluate(task, fitted.model, _held_out(task, prepared), paths.evaluation, progress)
    _write_pages(paths)
    return Run(paths.root, fitted.receipt, evaluation)


@contextlib.contextmanager
def _telling_what_is_kept(paths: RunPaths) -> Iterator[None]:
    """A training that is interrupted at once says what is left of it."""
    try:
        yield
    except KeyboardInterrupt:
        again = "run the same command again to"
        if paths.receipt.exists():
            raise StoppedError("interrupted; the adapter is trained and saved", f"{again} evaluate it") from None
        if steps := checkpoint_steps(paths.checkpoints):
            kept = f"stopped at once; the checkpoint of step {steps[-1]} is kept, and later steps are not"
            raise StoppedError(kept, f"{again} resume from there") from None
        raise StoppedError("stopped before the first checkpoint: nothing is kept", f"{again} start over") from None


def _load_base(task: Task, precision: str) -> Base:
    return load_base(task.model, precision=precision, device=task.train.device, quantize=task.train.quantize)


def _about_computing(base: Base) -> list[Note]:
    precision = [Note(f"computing in {base.info.dtype}: {base.probe.reason}")] if base.probe else []
    warning = spinning_warning() if base.model.device.type == "cpu" else None
    return [*precision, *([warning] if warning else [])]


def _set_aside(paths: RunPaths, progress: Progress) -> None:
    """Give an existing run directory another name."""
    if not paths.root.exists():
        return
    number = 1
    while (kept := paths.root.with_name(f"{paths.root.name}.old-{number}")).exists():
        number += 1
    paths.root.rename(kept)
    progress.note(Note(f"the earlier run is kept as {kept}"))


def _checkpoint(paths: RunPaths, resume: str) -> Path | None:
    """The checkpoint to resume from."""
    if resume not in ("auto", "never"):
        path = Path(resume)
        if not (path / "state.json").is_file():
            raise CheckpointError(f"{path} is not a checkpoint", "name a folder such as runs/NAME/checkpoints/step-100")
        return path
    steps = checkpoint_steps(paths.checkpoints)
    return paths.checkpoints / f"step-{steps[-1]}" if steps and resume == "auto" else None


def _require_same_task(task: Task, then: Task, paths: RunPaths) -> None:
    """Refuse to take a finished run for that of a task with other settings."""
    before, now = (settings_that_matter(t.model_dump(mode="json")) for t in (then, task))
    if changed := changed_settings(before, now):
        raise ConfigError(
            f"{paths.root} holds a finished run with other settings: {'; '.join(changed)}",
            "give this run its own name with --set name=NAME, or start over with --resume never "
            "(the earlier run is kept under another name)",
        )


def _require_same_start(task: Task, receipt: Receipt, paths: RunPaths) -> None:
    """Refuse to take a finished run for one that starts from another adapter."""
    then, now = receipt.lora.start, read_start(task)
    if now is not None and (then is None or now.hashes != (then.sha256, then.config_sha256)):
        raise ConfigError(
            f"{paths.root} holds a finished run that started from another adapter than lies in {now.path} now",
            "give this run its own name with --set name=NAME, or start over with --resume never "
            "(the earlier run is kept under another name)",
        )


def _require_same_rows(prepared: Prepared, receipt: Receipt, paths: RunPaths) -> None:
    """Refuse to judge a run by rows that are not those it was trained and held out with."""
    changed = [name for name, rows in prepared.splits.items() if rows.sha256() != receipt.data.rows_sha256[name]]
    if changed:
        raise DataError(
            f"the {' and '.join(changed)} rows have changed since {paths.root} was trained",
            "restore the data, or train again with --resume never; to measure other rows, "
            "use `tunery eval RUN --data FILE`",
        )


def _finish(task: Task, paths: RunPaths, progress: Progress) -> Run:
    """A run whose training is complete: evaluated if that is missing or was asked for in another way."""
    receipt, then = read_local_receipt(paths), load_task(paths.task)
    tokenizer = load_tokenizer(task.model)
    task = _dated(task, tokenizer, paths)
    _require_same_task(task, then, paths)
    _require_same_start(task, receipt, paths)
    _require_same_rows(_prepare(task, tokenizer, load_config(task.model)), receipt, paths)
    held_out = receipt.data.validation_rows or receipt.data.test_rows
    if task.evaluate.enabled and held_out and (task.evaluate != then.evaluate or not paths.evaluation.exists()):
        write_atomic(paths.task, task.to_yaml())
        progress.note(Note(f"{paths.root} is trained; evaluating it"))
        return Run(paths.root, receipt, evaluate(paths.root, progress=progress))
    progress.note(Note(f"{paths.root} is already finished; to start over use --resume never"))
    if not paths.report.exists():
        _write_pages(paths)
    return Run(paths.root, receipt, read_evaluation(paths))


def _held_out(task: Task, prepared: Prepared) -> HeldOut:
    split, examples, rows = prepared.held_out
    return HeldOut(
        split,
        KINDS[prepared.data.kind],
        examples,
        rows,
        prepared.renderer,
        prepared.max_length,
        prepared.too_long,
        make_objective(task, prepared.data.kind, prepared.train),
    )


def _evaluate(task: Task, model: PackedModel, held_out: HeldOut, target: Path, progress: Progress) -> Evaluation:
    try:
        with scoring(model, held_out.rows.rows, task.train.cpu_workers, progress.note) as score:
            result = compare(score, held_out, task.evaluate, progress.note)
    except KeyboardInterrupt:
        raise StoppedError(
            "interrupted while evaluating; the adapter is trained and saved",
            "run the same command again to evaluate it",
        ) from None
    result.write(target)
    return result.evaluation


def _write_pages(paths: RunPaths) -> None:
    write_card(paths.root, paths.adapter)
    write_report(paths.root)


def load(run: str | Path, *, device: str = "auto") -> TunedModel:
    """Load a run directory: the base with its adapter, ready to `answer`, `stream` or `classify`."""
    return load_run(run, device=device)


def predict(
    run: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    max_new_tokens: int = Sampling.max_new_tokens,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> PredictionSummary:
    """The tuned model's answers for every row of a file. From Python, `load(run).predict(rows)` gives them as values.

    Args:
        run: a run directory.
        data: a file in the form of the task; its answers need not be there, and do not count. "-": standard input.
        out: a .jsonl or .csv file for the rows with their predictions, or "-" for standard output. The same call
            resumes where an interrupted one stopped.
        max_new_tokens: longest answer.
        overwrite: replace `out` if it is there.

    Raises:
        StoppedError: interrupted; the rows predicted so far are kept.
        DataError: rows cannot be read; or, after everything is written, some have no prediction.
    """
    progress = progress or Console()
    paths = RunPaths(Path(run))
    receipt = read_local_receipt(paths)
    encoding = load_task(paths.task).data.encoding
    sampling = Sampling(max_new_tokens=max_new_tokens)
    file = PredictedFile(str(data), str(out), receipt, sampling, overwrite, encoding)
    return file.predict(lambda: load_run(run, device=device), progress)


def cancel(
    task: str | Path | Task | None = None,
    overrides: Sequence[str] = (),
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> str:
    """Cancel the job of a hosted model's task; what became of it, in words."""
    task = resolve_task(task, overrides, settings)
    return cancel_hosted(task, RunPaths(task.run_dir), progress or Console())


def evaluate(
    run: str | Path, data: str | Path | None = None, *, progress: Progress | None = None, consent: Consent | None = None
) -> Evaluation:
    """Measure base vs. tuned.

    Args:
        run: a run directory.
        data: a file of further rows; its result is written to evaluation-FILE.json. Without it, the run's own held-out
            rows are measured again, evaluation.json is written and the report renewed.
        consent: as in `train`.

    Returns:
        The content of the evaluation file.
    """
    progress = progress or Console()
    paths = RunPaths(Path(run))
    if isinstance(read_receipt(paths), HostedReceipt):
        return evaluate_hosted(paths, None if data is None else Path(data), progress, consent)
    tuned = load_run(run)
    if data is not None:
        return _evaluate_more(tuned, paths, Path(data), progress)
    prepared = _prepare(tuned.task, tuned.base.tokenizer, tuned.model.config)
    _require_same_rows(prepared, tuned.receipt, paths)
    result = _evaluate(tuned.task, tuned.flat, _held_out(tuned.task, prepared), paths.evaluation, progress)
    _write_pages(paths)
    return result


def _evaluate_more(tuned: TunedModel, paths: RunPaths, data: Path, progress: Progress) -> Evaluation:
    facts, config = tuned.receipt.data, tuned.task.data
    more = read_more(str(data), config, facts.kind, tuple(facts.labels), facts.columns)
    for text in more.notes:
        progress.note(Note(text))
    _note_overlap(tuned.task, more.test, progress)
    rows = tokenize_once(tuned.renderer, more.test, tuned.limit, config.too_long, config.on_bad_row)
    objective = make_objective(tuned.task, facts.kind, rows, tuned.receipt.as_json())
    held_out = HeldOut(
        data.name,
        KINDS[facts.kind],
        more.test,
        objective.select(rows),
        tuned.renderer,
        tuned.limit,
        config.too_long,
        objective,
    )
    target = paths.root / f"evaluation-{safe_name(data.stem)}.json"
    return _evaluate(tuned.task, tuned.flat, held_out, target, progress)


def _note_overlap(task: Task, examples: Sequence[Example], progress: Progress) -> None:
    """Say how many of these rows the run may have been trained on."""
    try:
        trained = {text_key(example) for example in read_data(task.data, task.seed).train}
    except TuneryError:
        progress.note(
            Note("the training data are no longer there, so it was not checked whether these rows are among them")
        )
        return
    overlap = sum(text_key(example) in trained for example in examples)
    if overlap:
        progress.note(
            Note(f"{overlap:,} of these {len(examples):,} rows have a text that was trained: the result flatters")
        )


def check(
    task: str | Path | Task | None = None,
    overrides: Sequence[str] = (),
    *,
    samples: int = 3,
    progress: Progress | None = None,
    **settings: Any,
) -> AnyCheckReport:
    """Everything about a task that can be known before any compute; see tunery.training.check.

    Args:
        task, overrides, settings: as in `train`.
        samples: rows to show.
        progress: told how far it is, where reading lasts.

    Returns:
        What `tunery check --json` prints: `report.training.steps` or `report["training"]["steps"]`.
    """
    task = resolve_task(task, overrides, settings)
    if task.hosted_model is not None:
        return check_hosted(task, samples)
    return check_local(task, samples=samples, progress=progress, timed=True)


def check_local(task: Task, *, samples: int = 3, progress: Progress | None = None, timed: bool = False) -> CheckReport:
    """As `check`, of a task whose model is trained here; without timed steps, which would hold up what else computes in
    this process."""
    tokenizer = load_tokenizer(task.model)
    task = _dated(task, tokenizer)
    say = None if progress is None else progress.note
    return check_prepared(task, _prepare(task, tokenizer, load_config(task.model), say), samples, timed=timed)


def examine(task: str | Path | Task | None, overrides: Sequence[str] = (), **settings: Any) -> dict[str, Examined]:
    """Every problem of a task's files, as values: what `check` and `train` would stop at.

    Returns:
        What lies in "train" (several files one after another), and in "validation" and "test" where these are files.

    Raises:
        ConfigError: the task cannot be read, or the tokenizer of its model not be found. Nothing about the rows.
    """
    task = resolve_task(task, overrides, settings)
    data, tokenizer = task.data, load_tokenizer(task.model)
    found = {"train": examine_files(data.train_files, data, tokenizer)}
    for split, path in (("validation", data.validation), ("test", data.test)):
        if isinstance(path, str):
            found[split] = examine_files([path], data, tokenizer, split=split, like=found["train"])
    return found


def learning_rate_test(
    task: str | Path | Task | None = None,
    overrides: Sequence[str] = (),
    *,
    steps: int = 40,
    progress: Progress | None = None,
    **settings: Any,
) -> RangeTest:
    """A learning-rate range test on the task's own data; nothing is saved."""
    task = resolve_task(task, overrides, settings)
    if task.hosted_model is not None:
        raise ConfigError(
            "a hosted model's learning rate cannot be tried out here", "set train.learning_rate_multiplier"
        )
    progress = progress or Console()
    base = _load_base(task, task.train.precision)
    prepared = _prepare(_dated(task, base.tokenizer), base.tokenizer, base.model.config)
    if (multiplier := task.train.learning_rate_multiplier) != 1:
        progress.note(
            Note(f"the rate that is suggested goes with train.learning_rate_multiplier 1 (it is {multiplier:g})")
        )
    return range_test(task, prepared, base, steps, lambda step, of: progress.note(Note(f"step {step}/{of}")))
