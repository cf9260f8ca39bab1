"""The record of a run: metrics.jsonl, and the trackers that were asked for.

metrics.jsonl is the truth: one JSON object per line, each with "step"; training lines hold "train_loss", validation
lines "valid_loss". Plots, reports and trackers are drawn from it.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from tunery.config import Task
from tunery.errors import CheckpointError, ConfigError, NotInstalledError
from tunery.jsonl import JsonMapping, JsonObject, encode_line, parse_object
from tunery.paths import RunPaths, disk_errors, write_atomic
from tunery.progress import Note, Progress
from tunery.versions import install_command


def read_metrics(path: Path) -> list[JsonObject]:
    """The lines of a metrics file, in order; none if there is no file.

    A last line that a crash left unfinished is passed over.

    Raises:
        CheckpointError: another line is not a JSON object.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    pieces = raw.split(b"\n")
    lines: list[JsonObject] = []
    for number, piece in enumerate(pieces, start=1):
        if not piece.strip():
            continue
        if (line := parse_object(piece)) is not None:
            lines.append(line)
        elif number < len(pieces):  # only what follows the last newline can be unfinished
            raise CheckpointError(f"{path}:{number}: not a line of metrics", "delete that line; the others are kept")
    return lines


def training_lines(history: Sequence[JsonMapping]) -> list[tuple[int, float]]:
    """(step, training loss) of the lines that have both, in order."""
    return metric_lines(history, "train_loss")


def validation_lines(history: Sequence[JsonMapping]) -> list[tuple[int, float]]:
    """(step, validation loss) of the lines that have both, in order."""
    return metric_lines(history, "valid_loss")


def metric_lines(history: Sequence[JsonMapping], key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that have this number, in order."""
    pairs = [(line.get("step"), line.get(key)) for line in history]
    return [
        (int(step), float(value))
        for step, value in pairs
        if isinstance(step, int | float) and isinstance(value, int | float) and math.isfinite(value)
    ]


class MetricsWriter:
    """Append-only JSON lines, each one handed to the operating system as it is written.

    Args:
        path: the file; its folder is made.
        keep_until_step: lines already in the file with a later step are dropped (they come from a run that crashed
            after its last checkpoint). 0 starts afresh, None keeps all. The rewrite is atomic.
    """

    def __init__(self, path: Path, *, keep_until_step: int | None):
        kept = [
            line for line in read_metrics(path) if keep_until_step is None or line.get("step", 0) <= keep_until_step
        ]
        write_atomic(path, "".join(_encode(line) for line in kept))
        self._path = path
        with disk_errors(str(path)):
            self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by close)

    def write(self, line: JsonMapping) -> None:
        """Append one line.

        Raises:
            ValueError: a number is not finite (it has no place in JSON, and training stops before one is logged).
        """
        encoded = _encode(line)
        with disk_errors(str(self._path)):
            self._file.write(encoded)
            self._file.flush()

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_metrics(path: Path, lines: Iterable[JsonMapping]) -> None:
    """metrics.jsonl with just these lines."""
    with MetricsWriter(path, keep_until_step=0) as writer:
        for line in lines:
            writer.write(line)


def _encode(line: JsonMapping) -> str:
    for key, value in line.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"metric {key} at step {line.get('step')} is {value}: only finite numbers are logged")
    return encode_line(line)


# --------------------------------------------------------------------------- trackers


class Sink(Protocol):
    """Somewhere else that metrics go."""

    def log(self, step: int, metrics: JsonMapping) -> None:
        """Record the numbers among `metrics`."""
        ...

    def close(self) -> None:
        """Send what is left and let go."""
        ...


class _Scalars(Protocol):
    """The types of TensorBoard's writer."""

    def add_scalar(self, tag: str, value: object, step: int, /) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, run_dir: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what a crashed run logged after the checkpoint that this one resumes from
        self._writer: _Scalars = SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=first_step)

    def log(self, step: int, metrics: JsonMapping) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Run:
    """A run of Weights & Biases, or of Trackio, which has the same calls."""

    def __init__(self, run: Any):
        self._run = run

    def log(self, step: int, metrics: JsonMapping) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Guarded:
    """Keeps a tracker's failures away from the training: the first one is a warning, and the tracker is left alone."""

    def __init__(self, name: str, sink: Sink):
        self._name, self._sink, self._failed = name, sink, False

    def log(self, step: int, metrics: JsonMapping) -> None:
        numbers = {
            name: value
            for name, value in metrics.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._attempt(lambda: self._sink.log(step, numbers))

    def close(self) -> None:
        self._attempt(self._sink.close)

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results; trackers greet on it
                action()
        except Exception as error:  # any failure of a tracker: the run matters more
            self._failed = True
            warnings.warn(
                f"{self._name} failed ({type(error).__name__}: {error}); nothing more is sent there. "
                "Training continues, and metrics.jsonl has every number",
                RuntimeWarning,
                stacklevel=3,
            )


_NEEDS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def open_sinks(
    names: Iterable[str], run_name: str, config: JsonMapping, run_dir: Path, *, first_step: int = 1
) -> list[Sink]:
    """Open the trackers of `train.report_to`. Call it before training, so that what is missing is known early.

    A tracker that fails later warns once and is left alone; it never stops the run.

    Args:
        names: among tensorboard, wandb, trackio. The latter two take their project from WANDB_PROJECT or
            TRACKIO_PROJECT, else "tunery", and the run's name from WANDB_NAME or TRACKIO_NAME, else `run_name`.
        run_name: shown in the tracker.
        config: the task's settings, shown in the tracker.
        run_dir: TensorBoard's files go to `run_dir`/tensorboard, wandb's to `run_dir`/wandb.
        first_step: the step that this run starts with (more than 1 when it was resumed).

    Raises:
        ConfigError: a package is missing, or a tracker cannot be opened (not logged in, say).
    """
    names = list(names)
    for name in names:
        require_tracker(name)
    sinks: list[Sink] = []
    for name in names:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                sinks.append(_Guarded(name, _open(name, run_name, dict(config), run_dir, first_step)))
        except Exception as error:  # trackers raise classes of their own
            for sink in sinks:
                sink.close()
            raise ConfigError(
                f"train.report_to: {name} could not be opened: {error}",
                f"set it up ({name} login, network), or train without it: --set train.report_to=[]",
            ) from error
    return sinks


def require_tracker(name: str) -> None:
    """Make sure that a tracker can be used.

    Raises:
        ConfigError: it is unknown, or its package is missing.
    """
    if name not in _NEEDS:
        raise ConfigError(f"train.report_to: unknown tracker {name!r}", f"known: {', '.join(_NEEDS)}")
    try:
        importlib.import_module(_NEEDS[name])
    except ImportError:
        raise NotInstalledError(
            f"train.report_to: {name} is asked for but not installed", install_command(name)
        ) from None


def _open(name: str, run_name: str, config: JsonObject, run_dir: Path, first_step: int) -> Sink:
    if name == "tensorboard":
        return _TensorBoard(run_dir, first_step)
    module: Any = importlib.import_module(name)
    project = os.environ.get(f"{name.upper()}_PROJECT", "tunery")
    run_name = os.environ.get(f"{name.upper()}_NAME") or run_name
    where = {"dir": str(run_dir)} if name == "wandb" else {}
    return _Run(module.init(project=project, name=run_name, config=config, **where))


# --------------------------------------------------------------------------- a run's log


class RunLog:
    """A Progress that also writes each line of metrics to metrics.jsonl and to the trackers."""

    def __init__(self, writer: MetricsWriter, sinks: Sequence[Sink], progress: Progress):
        self._writer, self._sinks, self._progress = writer, sinks, progress

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        task: Task,
        settings: JsonMapping,
        paths: RunPaths,
        progress: Progress,
        done: int,
        *,
        keep_until_step: int | None,
    ) -> Generator[Self]:
        """For as long as a run is trained; closes `progress` at its end.

        Args:
            settings: of the task, for the trackers.
            done: steps that the run has behind it.
            keep_until_step: see MetricsWriter.
        """
        with contextlib.ExitStack() as stack:
            sinks = open_sinks(task.train.report_to, task.name, settings, paths.root, first_step=done + 1)
            for sink in sinks:
                stack.callback(sink.close)
            writer = stack.enter_context(MetricsWriter(paths.metrics, keep_until_step=keep_until_step))
            stack.callback(progress.close)
            yield cls(writer, sinks, progress)

    def note(self, note: Note) -> None:
        """See Progress."""
        self._progress.note(note)

    def start(self, total: int, done: int) -> None:
        """See Progress."""
        self._progress.start(total, done)

    def log(self, line: JsonMapping) -> None:
        """To the file, the trackers and the progress."""
        self._writer.write(line)
        for sink in self._sinks:
            sink.log(line["step"], line)
        self._progress.log(line)

    def close(self) -> None:
        """See Progress."""
        self._progress.close()
