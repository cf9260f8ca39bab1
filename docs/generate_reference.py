"""docs/reference.md from the settings in tunery.config, the commands in tunery.cli and the records in tunery.records.

python docs/generate_reference.py            write it
python docs/generate_reference.py --check    exit 1 if it is not what would be written
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import click
from pydantic import BaseModel

from tunery.cli import cli
from tunery.config import Task, all_settings
from tunery.config_help import describe_default, describe_type
from tunery.records.check_report import VERSION as CHECK_VERSION
from tunery.records.check_report import CheckReport, HostedCheckReport
from tunery.records.doctor_report import DoctorReport
from tunery.records.evaluation_record import VERSION as EVALUATION_VERSION
from tunery.records.evaluation_record import Evaluation
from tunery.records.prediction_record import HeldOutPrediction, Prediction, PredictionSummary
from tunery.records.run_receipt import VERSION as RECEIPT_VERSION
from tunery.records.run_receipt import HostedReceipt, Receipt
from tunery.records.run_summary import Pruning, RunComparison, RunSummary

TARGET = Path(__file__).with_name("reference.md")

HEAD = """\
# Reference

<!-- Written by docs/generate_reference.py from config.py, cli.py and records/ in src/tunery. Change them, run it. -->

A task file is YAML. A setting that does not exist, or stands twice, is an error that names its line. Paths in the file
are relative to the file; paths given with `--set` are relative to the current folder. Each run directory holds a
`task.yaml` with every default written out.
"""


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of the task file with its path ("" for the top)."""
    yield path, model
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from sections(info.annotation, f"{path}.{name}".lstrip("."))


def written_default(info: Any) -> str:
    """The default, as code where it can be written."""
    words = describe_default(info)
    plain = words in ("left out", "true", "false")
    return "*needed*" if info.is_required() else words if plain else f"`{words}`"


def settings_part() -> Iterator[str]:
    """The settings, one table a section."""
    described: Mapping[str, Any] = dict(all_settings())
    yield "\n## Settings\n"
    for path, section in sections(Task):
        names = [name for name in described if name.rpartition(".")[0] == path]
        yield f"\n### {f'`{path}`' if path else 'The top'}\n\n{' '.join((section.__doc__ or '').split())}\n"
        yield "\n| setting | values | default | meaning |\n| --- | --- | --- | --- |\n"
        for name in names:
            info = described[name]
            values = describe_type(info.annotation, info.metadata)
            cells = (f"`{name}`", values, written_default(info), info.description)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def all_commands(group: click.Group, at: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command by its name, those of groups after these: ("runs", …), ("runs list", …)."""
    for name, command in group.commands.items():
        yield f"{at}{name}", command
        if isinstance(command, click.Group):
            yield from all_commands(command, f"{at}{name} ")


def commands_part() -> Iterator[str]:
    """The commands with their options."""
    yield "\n## Commands\n"
    for name, command in all_commands(cli):
        context = click.Context(command, info_name=name)
        usage = " ".join(["tunery", name, *command.collect_usage_pieces(context)])
        yield f"\n### `{usage}`\n\n{' '.join((command.help or '').split())}\n\n"
        records = [record for parameter in command.params if (record := parameter.get_help_record(context))]
        options = ((option, " ".join(text.split())) for option, text in records if option.startswith("-"))
        yield "".join(f"- `{option}`" + (f": {text}" if text else "") + "\n" for option, text in options)


def runs_part() -> Iterator[str]:
    """The fields of what `tunery runs` prints as JSON."""
    yield "\n## Lists of runs\n\nWhat `tunery runs --json` prints is a list of:\n\n"
    yield record_table(record_fields(RunSummary))
    yield "\nWhat `tunery runs compare --json` prints:\n\n"
    yield record_table((path, info) for path, info in record_fields(RunComparison) if not path.startswith("runs"))
    yield "\nWhat `tunery runs prune --json` prints:\n\n"
    yield record_table(record_fields(Pruning))


def doctor_part() -> Iterator[str]:
    """The fields of what `tunery doctor` prints as JSON."""
    yield "\n## The machine\n\nWhat `tunery doctor --json` prints:\n\n"
    yield record_table(record_fields(DoctorReport))


def exit_codes_part() -> Iterator[str]:
    """The exit codes, which scripts rely on."""
    yield "\n## Exit codes\n\n| code | meaning |\n| --- | --- |\n"
    for code, meaning in (
        (0, "done"),
        (1, "a bug in tunery"),
        (2, "usage or configuration"),
        (3, "data"),
        (4, "checkpoint or adapter"),
        (5, "training diverged"),
        (69, "a hosted service refuses what was asked, or its job failed"),
        (75, "can be resumed (a full disk, say)"),
        (130, "interrupted (Ctrl-C), after a checkpoint"),
        (143, "terminated, after a checkpoint"),
    ):
        yield f"| {code} | {meaning} |\n"


def receipt_part() -> Iterator[str]:
    """The fields of receipt.json."""
    yield "\n## The receipt\n\n"
    yield (
        f"`receipt.json` in a run directory, format {RECEIPT_VERSION}. In Python they are attributes too: "
        "`run.receipt.training.steps`. A field that a run lacks was not known to the version that trained it.\n"
    )
    yield from record_tables(Receipt, "A run that was trained here", HostedReceipt, "A hosted run: what differs")


def evaluation_part() -> Iterator[str]:
    """The fields of evaluation.json."""
    yield "\n## The evaluation\n\n"
    yield (
        f"`evaluation.json` in a run directory, and what `tunery eval --json` prints, format {EVALUATION_VERSION}. In "
        "Python: `run.evaluation.tuned.loss`. `base` and `tuned` have the same metrics.\n\n"
    )
    yield record_table((path, info) for path, info in record_fields(Evaluation) if not path.startswith("tuned."))


def predictions_part() -> Iterator[str]:
    """The fields of predictions.jsonl, and of what `tunery predict` adds to a row."""
    yield "\n## Predictions\n\n"
    yield (
        "`predictions.jsonl` in a run directory has a line for each held-out row of `evaluation.json`; "
        "`tunery eval RUN --data FILE` writes `predictions-FILE.jsonl`. Answers are generated for the first "
        "`evaluate.generate_rows` rows only; labels are predicted for all.\n\n"
    )
    yield record_table(record_fields(HeldOutPrediction))
    yield "\nThe columns that `tunery predict` adds to a row (in CSV each probability has its own):\n\n"
    yield record_table(record_fields(Prediction))
    yield "\nWhat `tunery predict --json` prints:\n\n"
    yield record_table(record_fields(PredictionSummary))


def check_part() -> Iterator[str]:
    """The fields of the check report."""
    yield "\n## The check report\n\n"
    yield (
        f"What `tunery check --json` prints, format {CHECK_VERSION}. In Python: "
        "`tunery.check(task).training.steps`. The lists `samples…` go together. With `--for` and `--lr-test` the "
        "program adds `destinations` and `learning_rate_test`.\n"
    )
    yield from record_tables(
        CheckReport, "A model that is trained here", HostedCheckReport, "A hosted model: what differs"
    )


def record_tables(local: type[BaseModel], title: str, hosted: type[BaseModel], hosted_title: str) -> Iterator[str]:
    """The fields of a record, and those that its hosted form has besides."""
    known = dict(record_fields(local))
    yield f"\n### {title}\n\n{record_table(known.items())}"
    more = [(path, info) for path, info in record_fields(hosted) if path not in known]
    yield f"\n### {hosted_title}\n\n{record_table(more)}"


def record_table(fields: Iterable[tuple[str, Any]]) -> str:
    """Fields of a record as a table."""
    rows = ["| field | values | meaning |", "| --- | --- | --- |"]
    for path, info in fields:
        cells = (f"`{path}`", describe_type(info.annotation), info.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "".join(f"{row}\n" for row in rows)


def record_fields(model: type[BaseModel], at: str = "") -> Iterator[tuple[str, Any]]:
    """Every field with its path: `a.b` in a section, `a[].b` in a list's entries, `a.*.b` in a map's."""
    for name, info in model.model_fields.items():
        section, entry = section_in(info.annotation)
        if section is None or info.description:
            yield f"{at}{name}", info
        if section is not None:
            yield from record_fields(section, f"{at}{name}{entry}.")


_ENTRIES = {list: "[]", dict: ".*"}


def section_in(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The record that a field holds, and how its path says that it is the list's or the map's entry."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    for argument in get_args(annotation):
        section, entry = section_in(argument)
        if section is not None:
            return section, _ENTRIES.get(get_origin(annotation), "") + entry
    return None, ""


def reference() -> str:
    """The whole page."""
    return HEAD + "".join(
        [
            *settings_part(),
            *commands_part(),
            *check_part(),
            *receipt_part(),
            *evaluation_part(),
            *predictions_part(),
            *runs_part(),
            *doctor_part(),
            *exit_codes_part(),
        ]
    )


def main(arguments: list[str]) -> int:
    """Write the page, or with --check compare it."""
    if arguments == ["--check"]:
        if TARGET.exists() and TARGET.read_text(encoding="utf-8") == reference():
            return 0
        print(f"{TARGET} is out of date: run python docs/generate_reference.py", file=sys.stderr)
        return 1
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    TARGET.write_text(reference(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
