"""What `tunery runs`, `settings` and `doctor` print, on stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tunery.config_help import SettingHelp, section_help
from tunery.evaluation.proof import last_part
from tunery.records.doctor_report import DoctorReport
from tunery.records.run_summary import Pruning, RunComparison, RunSummary
from tunery.show import SCORES
from tunery.text import file_size, gigabytes, plural


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False)


# --------------------------------------------------------------------------- runs


_WIDE = 110
"""Columns of a terminal from which on runs are listed with kind and state."""


def _pair(base: float | None, tuned: float | None, form: Callable[[float], str]) -> str:
    """ "0.71 → 0.89"; a dash where the tuned model's is not known."""
    if tuned is None:
        return "–"
    return form(tuned) if base is None else f"{form(base)} → {form(tuned)}"


def runs(found: Sequence[RunSummary], folder: Path) -> None:
    """Print the runs of a folder."""
    console = _console()
    if not found:
        console.print(Text(f"no runs in {folder}"))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    wide = console.width >= _WIDE
    for heading in ("run", "base", *(("kind", "state") if wide else ())):
        table.add_column(heading, overflow="fold")
    for heading in ("when", "rows", "loss", "accuracy", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in found:
        texts = (run.name, last_part(run.base or "–"), *((run.kind or "–", run.state) if wide else ()))
        rows = "–" if run.train_rows is None else f"{run.train_rows:,}"
        loss = _pair(run.base_loss, run.tuned_loss, "{:.3g}".format)
        accuracy = _pair(run.base_accuracy, run.tuned_accuracy, "{:.1%}".format)
        table.add_row(*map(Text, texts), (run.created or "–")[:10], rows, loss, accuracy, file_size(run.bytes))
    console.print(table)
    for run in found:
        if run.detail:
            console.print(Text(f"{run.name}: {run.state}, {run.detail}", style="yellow"))
    console.print(
        Text(
            f"{plural(len(found), 'run')}, {file_size(sum(run.bytes for run in found))}, of which checkpoints "
            f"{file_size(sum(run.checkpoint_bytes for run in found))}. Loss and accuracy: base → tuned",
            style="dim",
        )
    )


def compared_runs(result: RunComparison) -> None:
    """Print what differs between runs."""
    console = _console()
    names = [run.name for run in result.runs]
    settings = _columns("settings that differ", names)
    for name, values in result.settings.items():
        settings.add_row(name, *(Text("–" if value is None else str(value)) for value in values))
    if result.settings:
        console.print(settings)
    else:
        console.print("\nNo setting differs.")
    results = _columns("held-out rows, base → tuned", names)
    for key, (name, form) in SCORES.items():
        if key in result.results:
            metric = result.results[key]
            results.add_row(name, *(_pair(*pair, form) for pair in zip(metric.base, metric.tuned, strict=True)))
    results.add_row("size", *(file_size(run.bytes) for run in result.runs))
    results.add_row("state", *(run.state for run in result.runs))
    console.print(results)
    for remark in result.remarks:
        console.print(Text(f"note: {remark}", style="yellow"))


def _columns(title: str, names: Sequence[str]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    return table


def pruning(result: Pruning, *, stderr: bool = False) -> None:
    """Print what is removed, or would be; to stderr ahead of a question."""
    console = Console(soft_wrap=True, highlight=False, stderr=stderr)
    for removed in result.removed:
        console.print(Text(f"{file_size(removed.bytes):>10}  {removed.path}  ({removed.what})"))
    for kept in result.kept:
        console.print(Text(f"      kept  {kept.path}: {kept.reason}", style="dim"))
    if not result.removed:
        console.print("nothing to remove")
    elif stderr:
        console.print(f"{file_size(result.bytes)} in all. Adapters, receipts and reports stay.")
    elif result.dry_run:
        console.print(f"{file_size(result.bytes)} would be freed; nothing was removed. --yes removes it.")
    else:
        console.print(f"{file_size(result.bytes)} freed")


# --------------------------------------------------------------------------- settings


def settings(found: Sequence[SettingHelp]) -> None:
    """Print settings: one with all that there is to say, several in a line each (in full where it goes to a file)."""
    console = Console(highlight=False, soft_wrap=True)
    if len(found) == 1:
        _setting(Console(highlight=False), found[0])
        return
    name_width, default_width = (
        max(len(text) for text in texts) for texts in zip(*map(_columns_of, found), strict=True)
    )
    section = None
    for setting in found:
        if setting.section != section:
            section = setting.section
            console.print(Text(f"\n{section or 'the top of the file'}: {section_help(section)}", style="bold"))
        name, default = _columns_of(setting)
        line = Text(f"  {name:<{name_width}}  {default:<{default_width}}  {setting.description}")
        if console.is_terminal:
            line.truncate(console.width, overflow="ellipsis")
        line.stylize("cyan", 2, 2 + name_width)
        console.print(line)
    console.print("\n`tunery settings NAME` says all about one.", style="dim")


def _columns_of(setting: SettingHelp) -> tuple[str, str]:
    """Name and default, in a list."""
    return setting.name, setting.default


def _setting(console: Console, setting: SettingHelp) -> None:
    console.print(Text(setting.name, style="bold"))
    console.print(Padding(Text(setting.description), (0, 0, 0, 2), expand=False))
    console.print(Padding(Text(f"values:   {setting.values}"), (0, 0, 0, 2), expand=False))
    console.print(Padding(Text(f"default:  {setting.default}"), (0, 0, 0, 2), expand=False))
    console.print("\nIn a task file:")
    console.print(Text("".join(f"    {line}\n" for line in setting.example().splitlines()), end=""))
    value = setting.example().rpartition(": ")[2]
    console.print(Text(f"On the command line:\n    --set {setting.name}={value}"))


# --------------------------------------------------------------------------- this machine


def machine(report: DoctorReport) -> None:
    """Print what `tunery doctor` found."""
    console = _console()
    lines: list[tuple[str, str]] = [
        ("tunery", f"{report.tunery}, Python {report.python} ({report.executable})"),
        ("system", report.platform),
        ("packages", ", ".join(f"{name} {version}" for name, version in report.versions.items() if version)),
        *_processor_lines(report),
        *_computing_lines(report),
        *_hub_lines(report),
    ]
    for name, text in lines:
        console.print(Text(f"{name:<11}{text}"))
    console.print("\nFolders", style="bold")
    for place in report.storage:
        size = "not there yet" if place.bytes is None else file_size(place.bytes)
        free = "" if place.free_bytes is None else f", {file_size(place.free_bytes)} free"
        console.print(Text(f"  {size:>13}  {place.path}  ({place.what}{free})"))
    console.print("\nOptional parts", style="bold")
    for part in report.optional:
        if part.missing:
            missing = ", ".join(part.missing)
            console.print(Text(f"  missing   {part.name}: {part.purpose} ({missing}) → {part.install}", style="yellow"))
        else:
            console.print(Text(f"  there     {part.name}: {part.purpose}"))
    if report.environment:
        console.print("\nEnvironment", style="bold")
        for name, value in report.environment.items():
            console.print(Text(f"  {name}={value}"))
    console.print()
    for problem in report.problems:
        console.print(Text(f"problem: {problem}", style="bold yellow"))
    if not report.problems:
        console.print("No problem found.")


def _processor_lines(report: DoctorReport) -> Iterator[tuple[str, str]]:
    found = report.processor
    if found is None:
        return
    features = ", ".join(found.features) or "none listed"
    yield "processor", f"{found.name}; {found.cores or '?'} cores, {found.available or '?'} processors for this process"
    yield "", f"instructions: {features}"
    if found.threads is not None:
        yield "", f"PyTorch computes with {plural(found.threads, 'thread')}"


def _computing_lines(report: DoctorReport) -> Iterator[tuple[str, str]]:
    if report.memory_bytes is not None:
        yield "memory", gigabytes(report.memory_bytes)
    found = report.computing
    if found is not None:
        yield "device", f"{found.device} ({found.name}), {gigabytes(found.available_bytes)} free"
        yield "precision", f"{found.dtype}: {found.reason}"


def _hub_lines(report: DoctorReport) -> Iterator[tuple[str, str]]:
    found = report.hub
    if found is None:
        return
    if found.offline:
        yield "hub", f"{found.address} is not asked: {', '.join(found.offline)} is set"
    elif found.reachable is None:
        yield "hub", f"{found.address} was not asked"
    else:
        yield "hub", f"{found.address} {'answers' if found.reachable else f'cannot be reached: {found.detail}'}"
