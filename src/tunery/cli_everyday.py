"""Commands beside the main line: `tunery runs`, `settings` and `doctor`. Thin, as tunery.cli is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tunery.startup import collector_paused

if TYPE_CHECKING:
    from tunery.records.run_summary import Pruning

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Of every command."""

JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def print_json(value: object) -> None:
    """A result for programs, on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


@click.command()
@JSON
def doctor(as_json: bool) -> None:
    """Show this machine as tunery sees it: versions, device, precision, memory, caches, and what is missing."""
    with collector_paused(freeze=True):
        from tunery import show_everyday as show
        from tunery.doctor import examine_machine

    report = examine_machine()
    if as_json:
        print_json(report.as_json())
    else:
        show.machine(report)


@click.command()
@click.argument("name", required=False)
@JSON
def settings(name: str | None, as_json: bool) -> None:
    """Describe a setting of a task file, or those of a section, by NAME; without one, list them all."""
    from tunery import show_everyday as show
    from tunery.config_help import setting_help

    found = setting_help(name)
    if as_json:
        print_json([setting.as_json() for setting in found])
    else:
        show.settings(found)


class _ListedByDefault(click.Group):
    """A group that lists where no command of it is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in CONTEXT["help_option_names"]):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_ListedByDefault)
def runs() -> None:
    """List the runs of a folder (`tunery runs FOLDER`), compare them, remove what they no longer need."""


@runs.command(name="list")
@click.argument("folder", required=False, default="runs", type=click.Path(path_type=Path))
@JSON
def list_(folder: Path, as_json: bool) -> None:
    """List the runs of a FOLDER (left out: runs): base, rows, loss and accuracy, size and state."""
    from tunery import show_everyday as show
    from tunery.evaluation.runs import list_runs

    found = list_runs(folder)
    if as_json:
        print_json([run.as_json() for run in found])
    else:
        show.runs(found, folder)


@runs.command()
@click.argument("runs", nargs=-1, required=True, metavar="A B …", type=click.Path(path_type=Path))
@JSON
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Show the settings that differ between runs A, B, …, and their results beside each other."""
    from tunery import show_everyday as show
    from tunery.evaluation.runs import compare_runs

    result = compare_runs(runs)
    if as_json:
        print_json(result.as_json())
    else:
        show.compared_runs(result)


@runs.command()
@click.argument("folder", required=False, default="runs", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only say what would be removed; so too where nobody can be asked.")
@click.option("-y", "--yes", is_flag=True, help="Remove it without asking.")
@JSON
def prune(folder: Path, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove the checkpoints of finished runs in a FOLDER, and what killed processes left there.

    Adapters, receipts, evaluations and reports are never removed.
    """
    from tunery import show_everyday as show
    from tunery.evaluation import pruning

    plan = pruning.plan_pruning(folder)
    if plan.removed and not dry_run and (yes or _agreed_to(plan)):
        plan = pruning.prune(plan)
    if as_json:
        print_json(plan.as_json())
    else:
        show.pruning(plan)


def _agreed_to(plan: Pruning) -> bool:
    """Whether a person wants that removed; no where nobody can be asked."""
    from tunery import show_everyday as show

    if not sys.stdin.isatty():
        return False
    show.pruning(plan, stderr=True)
    return click.confirm("Remove it?", err=True)
