"""What a person sees while a run goes on: notes and a progress bar, on stderr or below the cell of a notebook. Results
go to stdout, elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from tunery.jsonl import JsonMapping
from tunery.notebook_bar import BarState, open_bar
from tunery.progress import Note

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Console:
    """Notes and a progress bar; plain lines where stderr is neither a terminal nor shown by a notebook.

    Args:
        quiet: print nothing.
    """

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self._progress: RichProgress | None = None
        self._bar: TaskID | None = None
        self._notebook: Callable[[BarState], None] | None = None
        self._total = 0
        self._valid = ""

    def note(self, note: Note) -> None:
        """Something for the user."""
        if self.quiet:
            return
        text = str(note)
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def start(self, total: int, done: int) -> None:
        """Show the bar of a run of `total` steps, `done` of them behind us."""
        self._total = total
        if self.quiet:
            return
        self._notebook = open_bar(BarState(done, total, ""))
        if not sys.stderr.isatty():
            return
        from rich import progress
        from rich.console import Console as RichConsole

        self._progress = progress.Progress(
            progress.TextColumn("step {task.completed}/{task.total}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[words]}"),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("left"),
            console=RichConsole(stderr=True),
        )
        self._progress.start()
        self._bar = self._progress.add_task("train", total=total, completed=done, words="")

    def log(self, line: JsonMapping) -> None:
        """A line of metrics.jsonl."""
        if self.quiet:
            return
        if "valid_loss" in line:
            self._valid = f" · validation {line['valid_loss']:.4f}"
            if self._progress is None and self._notebook is None:
                self.note(Note(f"step {line['step']}/{self._total} · validation loss {line['valid_loss']:.4f}"))
            return
        speed = line.get("data_tokens_per_second")  # a hosted model's is not told
        words = f"loss {line['train_loss']:.4f}{self._valid}" + (f" · {speed:,.0f} tokens/s" if speed else "")
        if self._notebook is not None:
            self._notebook(BarState(line["step"], self._total, words))
        elif self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=line["step"], words=words)
        elif line["step"] in (1, self._total) or line["step"] % max(1, self._total // 20) == 0:
            self.note(Note(f"step {line['step']}/{self._total} · {words}"))

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
