"""Results for a person's eyes, on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunery.evaluation.cautions import baseline, cautions
from tunery.evaluation.record import headline, units
from tunery.evaluation.record import show as show_value
from tunery.jsonl import JsonMapping
from tunery.records.check_report import (
    AnyCheckReport,
    HostedCheckReport,
    HostedLengthsSection,
    PlannedJobSection,
    PlannedTrainingSection,
    TrainedLengthsSection,
)
from tunery.records.evaluation_record import Evaluation
from tunery.records.export_record import KeptUpdate
from tunery.records.prediction_record import STANDARD, PredictionSummary
from tunery.records.run_receipt import HostedReceipt, Receipt
from tunery.text import duration, duration_range, file_size, gigabytes, plural

if TYPE_CHECKING:
    from tunery.api import Run
    from tunery.export.destinations import Finding
    from tunery.export.export_run import Export
    from tunery.hosted.migrate import Migration

SCORES: dict[str, tuple[str, Callable[[float], str]]] = {
    "rewards_accuracy": ("reward accuracy", "{:.1%}".format),
    "rewards_margin": ("reward margin", "{:.3f}".format),
    "preference_accuracy": ("preferred is likelier", "{:.1%}".format),
    "preference_loss": ("preference loss", "{:.4f}".format),
    "accuracy": ("accuracy", "{:.1%}".format),
    "macro_f1": ("macro F1", "{:.3f}".format),
    "loss": ("loss", "{:.4f}".format),
    "rejected_loss": ("loss of rejected answers", "{:.4f}".format),
    "perplexity": ("perplexity", lambda value: show_value(value, "perplexity")),
    "token_accuracy": ("token accuracy", "{:.1%}".format),
    "chrf": ("chrF", "{:.1f}".format),
    "bleu": ("BLEU", "{:.1f}".format),
    "distinct_1": ("distinct-1", "{:.3f}".format),
    "distinct_2": ("distinct-2", "{:.3f}".format),
}
"""Scores shown, in this order: key → (name, format)."""


def _console() -> Console:
    """Wraps at words where a person reads; what goes to a file or another program stays whole."""
    return Console(soft_wrap=not sys.stdout.isatty(), highlight=False)


# --------------------------------------------------------------------------- check


def check(report: AnyCheckReport) -> None:
    """Print what `tunery check` found."""
    console = _console()
    for note in report.notes:
        console.print(Text(note))
    _check_rows(console, report)
    _check_tokens(console, report.tokens)
    if isinstance(report, HostedCheckReport):
        _planned_job(console, report.hosted)
    else:
        _end_of_turn(console, report.tokens)
        _planned_training(console, report.training)
    for remark in report.remarks:
        console.print(Text(f"note: {remark}", style="yellow"))
    if report.samples:
        console.print(Text("\nRows as the model sees them; what is trained is ⟦marked⟧:", style="bold"))
    for pieces, name in zip(report.samples, report.sample_names, strict=True):
        console.print(Text(f"── {name} {'─' * max(4, 36 - len(name))}", style="dim"))
        line = Text()
        for text, trained in pieces:
            line.append(f"⟦{text}⟧" if trained else text, style="bold green" if trained else "dim")
        console.print(line)


def _check_rows(console: Console, report: AnyCheckReport) -> None:
    data = report.data
    hosted = isinstance(report, HostedCheckReport)
    table = Table(title=f"\n{report.name}: {data.kind}", title_justify="left", title_style="bold")
    table.add_column(units(data.kind) if hosted else f"{report.training.unit}s")
    for split in ("train", "validation", "test"):
        table.add_column(split, justify="right")
    table.add_row("all", *(f"{rows:,}" for rows in (data.train_rows, data.validation_rows, data.test_rows)))
    for label, counts in report.labels.items():
        table.add_row(Text(label), *(f"{counts[split]:,}" for split in ("train", "validation", "test")))
    console.print(table)
    for count, words in (
        (data.rows_skipped, "bad and skipped"),
        (data.duplicates, "training rows that repeat an earlier one"),
        (data.overlap_removed, "training rows removed because their text is held out"),
        (data.dropped, "dropped"),
        (data.truncated, "longer than is trained" if hosted else f"cut to {report.data.limit:,} tokens"),
    ):
        console.print(f"{count:>8,}  {words}", style="yellow" if count else "dim")
    for place in [f"{row.where}: {row.reason}" for row in data.dropped_rows[:3]] + data.truncated_rows[:3]:
        console.print(Text(f"          {place}", style="dim"))


def _check_tokens(console: Console, tokens: TrainedLengthsSection | HostedLengthsSection) -> None:
    hosted = isinstance(tokens, HostedLengthsSection)
    trained = "" if hosted else f", of which {tokens.trained:,} are trained ({tokens.trained_share:.1%})"
    about = "about " if hosted and not tokens.exact else ""
    console.print(
        f"\nTokens: {about}{tokens.all:,}{trained}. "
        f"A row has {tokens.shortest:,} to {tokens.longest:,}, half of them at most {tokens.median:,.0f}."
    )
    most = max(bin_["rows"] for bin_ in tokens.histogram)
    for bin_ in tokens.histogram:
        bar = "█" * round(30 * bin_["rows"] / most)
        console.print(f"{bin_['from']:>6,} – {bin_['to']:>6,}  {bar} {bin_['rows']:,}", style="dim")


def _end_of_turn(console: Console, tokens: TrainedLengthsSection) -> None:
    """Of a hosted model nothing is said: its template is its server's."""
    if tokens.end_of_turn_trained:
        console.print(Text(f"The end-of-turn token {tokens.end_of_turn_token} is trained."))
    else:
        console.print("No end-of-turn token is trained: the model may not know when to stop.", style="bold yellow")


def _planned_job(console: Console, job: PlannedJobSection) -> None:
    method = job.method
    settings = method[method["type"]]["hyperparameters"]
    console.print(
        Text(
            f"\n{job.model} at {job.address}, {method['type']}: "
            + ", ".join(f"{name} {value}" for name, value in settings.items())
        )
    )
    for sentence in job.sentences:
        console.print(Text(sentence))


def _of_the_rate(share: float | None) -> str:
    """Nothing where the rate could not be measured beside other programs."""
    return "" if share is None else f"{'under 1%' if share < 0.005 else f'{share:.0%}'} of this machine's matmul rate "


def _stored(quantization: str | None) -> str:
    return f", base in {quantization}" if quantization else ""


def _planned_training(console: Console, training: PlannedTrainingSection) -> None:
    share = training.computed_share
    console.print(
        f"\n{training.model}: {training.trainable_parameters:,} adapter parameters "
        f"in {training.layers} layers on a base of {training.parameters:,} "
        f"({training.precision}{_stored(training.quantization)} on {training.device})."
    )
    console.print(
        f"{plural(training.steps, 'step')} of {plural(training.batch_size, training.unit)}, "
        f"learning rate {training.learning_rate:g}; shared beginnings leave {share:.0%} of the tokens to compute."
    )
    fits = training.memory_bytes <= training.available_bytes
    console.print(
        f"Memory: about {file_size(training.memory_bytes)}; {gigabytes(training.available_bytes)} are free.",
        style="" if fits else "yellow",
    )
    console.print(
        f"Time: {duration_range(training.seconds_low, training.seconds_high)} for the training steps "
        f"({training.seconds_basis}); validation and evaluation come on top."
    )


# --------------------------------------------------------------------------- results


def evaluation(result: Evaluation) -> None:
    """Print base vs. tuned."""
    console = _console()
    base, tuned, unit = result.base, result.tuned, units(result.kind, result.unit)
    table = Table(title=f"\n{result.rows:,} held-out {unit}", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("tuned", justify="right")
    for key, (name, form) in SCORES.items():
        if tuned.get(key) is not None:
            table.add_row(name, form(base[key]) if key in base else "–", form(tuned[key]))
    console.print(table)
    values = result.as_json()
    if common := baseline(values):
        console.print(Text(f"Answering {common[0]} every time would be right {common[1]:.1%} of the time."))
    if result.labels and tuned.confusion and len(result.labels) <= WIDEST_MATRIX:
        _confusion(console, result.labels, tuned.confusion)
    console.print(Text(f"\n{headline(values)}", style="bold"))
    for caution in cautions(values):
        console.print(Text(f"note: {caution}", style="yellow"))


WIDEST_MATRIX = 8
"""Labels up to which a confusion matrix is printed; the report has all."""


def _confusion(console: Console, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    console.print("\nWhat the tuned model says (to the right) of rows that are … (downwards)", style="bold")
    table = Table()
    table.add_column("")
    for label in labels:
        table.add_column(Text(label), justify="right", overflow="fold")
    for label, row in zip(labels, counts, strict=True):
        table.add_row(Text(label), *(f"{count:,}" for count in row))
    console.print(table)


def predictions(done: PredictionSummary) -> None:
    """Print what `tunery predict` wrote; nothing where the predictions themselves went to stdout."""
    if done.out == STANDARD:
        return
    console = _console()
    for label, count in (done.labels or {}).items():
        console.print(Text(f"{count:>8,}  {label} ({count / done.rows:.1%})"))
    if done.shortened:
        console.print(f"{plural(done.shortened, 'text')} did not fit and lost their end", style="yellow")
    if done.cut:
        console.print(f"{plural(done.cut, 'answer')} ended at --max-new-tokens, perhaps too early", style="yellow")
    console.print(Text(f"{plural(done.rows, 'row')} predicted in {duration(done.seconds)}: {done.out}"))


def run(finished: Run) -> None:
    """Print what `tunery train` gave: the evaluation, the receipt in short, and where things lie."""
    console = _console()
    if finished.evaluation is not None:
        evaluation(finished.evaluation)
    if isinstance(finished.receipt, HostedReceipt):
        _hosted_receipt(console, finished.receipt)
        console.print(f"\nReport:   {finished.path / 'report.html'}", soft_wrap=True)
        console.print(f"Model:    {finished.receipt.hosted.tuned_model}", soft_wrap=True)
        return
    _receipt(console, finished.receipt)
    console.print(f"\nReport:   {finished.path / 'report.html'}", soft_wrap=True)
    console.print(f"Adapter:  {finished.path / 'adapter'}", soft_wrap=True)
    console.print(f"Try it:   tunery chat {finished.path}", soft_wrap=True)
    console.print(f"Use it:   tunery predict {finished.path} --data FILE --out FILE", soft_wrap=True)


def _hosted_receipt(console: Console, receipt: HostedReceipt) -> None:
    data, training, hosted = receipt.data, receipt.training, receipt.hosted
    billed, cost, seconds = hosted.billed_tokens, hosted.cost, receipt.speed.total_seconds
    lines = [
        f"rows      {data.train_rows:,} trained, {data.validation_rows:,} for validation",
        f"job       {hosted.job} at {hosted.address}" + ("" if seconds is None else f", {duration(seconds)}"),
    ]
    if billed is not None:
        lines.append(f"billed    {billed:,} tokens" + ("" if cost is None else f", about ${cost:,.2f}"))
    if training.first_loss is not None and training.steps is not None:
        lines.append(
            f"training  {plural(training.steps, 'step')}, loss {training.first_loss:.4f} → {training.final_loss:.4f}"
        )
    _say_receipt(console, lines, receipt.warnings)


_NAMES = 12
"""Columns for the names of a receipt's lines."""


def _say_receipt(console: Console, lines: Sequence[str], warnings: Sequence[str]) -> None:
    console.print("\nReceipt", style="bold")
    for line in lines:
        if console.soft_wrap:
            console.print(Text(f"  {line}"))
        else:
            row = Table.grid()
            row.add_column(width=_NAMES)
            row.add_row(Text(f"  {line[: _NAMES - 2]}"), Text(line[_NAMES - 2 :]))
            console.print(row)
    for warning in warnings:
        console.print(Text(f"  warning: {warning}", style="yellow"))


def migration(done: Migration) -> None:
    """Print what `tunery migrate` gave: both models side by side, and where things lie."""
    console = _console()
    if done.run is None:
        console.print(
            f"\nCaptured: {done.folder / 'capture'}, with {plural(done.answers, 'answer')} of the tuned model"
        )
        console.print(f"Train:    tunery migrate {done.folder} --to MODEL", soft_wrap=True)
        return
    if done.result is not None:
        _side_by_side(console, done.result)
        console.print(f"\nSide by side: {done.run.path / 'side-by-side.html'}", soft_wrap=True)
    else:
        console.print("\nSide by side: nothing, because no answer of the tuned model was captured", soft_wrap=True)
    console.print(f"Report:       {done.run.path / 'report.html'}", soft_wrap=True)
    console.print(f"Adapter:      {done.run.path / 'adapter'}", soft_wrap=True)


def _side_by_side(console: Console, result: JsonMapping) -> None:
    table = Table(title=f"\n{result['rows']:,} questions to both", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("hosted", justify="right")
    table.add_column("local", justify="right")
    for key, (name, form) in ({"exact": ("same as the reference", "{:.1%}".format)} | SCORES).items():
        values = [result[side].get(key) for side in ("hosted", "local")]
        if any(value is not None for value in values):
            table.add_row(name, *("–" if value is None else form(value) for value in values))
    console.print(table)
    agreement = result["agreement"]
    label = f"the same label {agreement['label']['share']:.1%}, " if "label" in agreement else ""
    console.print(
        f"They give {label}the same answer {agreement['exact']['share']:.1%} of the time; overlap of their answers "
        f"{agreement['chrf']:.1f} of 100 (chrF)."
    )
    for warning in result["warnings"]:
        console.print(Text(f"  warning: {warning}", style="yellow"))


def _receipt(console: Console, receipt: Receipt) -> None:
    tokens, lora, training = receipt.tokens, receipt.lora, receipt.training
    moved = sum(tensor.moved > 0 for tensor in lora.tensors.values())
    speed, memory, reload = receipt.speed, receipt.memory, receipt.reload
    end = f"{tokens.end_of_turn_token} is trained" if tokens.end_of_turn_trained else "no end-of-turn token is trained"
    lines = [
        f"{training.unit + 's':<10}{_trained_rows(receipt)}, {receipt.data.validation_rows:,} for validation",
        f"tokens    {tokens.data:,} in the data, {tokens.computed:,} computed "
        f"({tokens.computed / max(tokens.data, 1):.0%}), {tokens.trained:,} trained "
        f"at {tokens.predicting_positions or tokens.trained:,} predicting positions; {end}",
        f"adapter   {moved} of {plural(len(lora.tensors), 'tensor')} moved, "
        f"{lora.trainable_parameters:,} parameters, rank {lora.rank}; sha256 {receipt.adapter.sha256[:12]}",
        f"training  {plural(training.steps, 'step')} ({training.stopped}), loss {training.first_loss:.4f} → "
        f"{training.final_loss:.4f}",
        f"reloaded  the saved adapter gives loss {reload.loss_from_disk:.6f}, in memory {reload.loss_in_memory:.6f}",
        f"speed     {speed.data_tokens_per_second:,.0f} data tokens/s, "
        f"{_of_the_rate(speed.matmul_share)}({receipt.precision.dtype}"
        f"{_stored(receipt.model.quantization)}); "
        f"{duration(speed.train_seconds)} of training",
        f"memory    {gigabytes(memory.peak_bytes)} at the peak, {gigabytes(memory.estimated_bytes)} estimated",
    ]
    _say_receipt(console, lines, receipt.warnings)


def _trained_rows(receipt: Receipt) -> str:
    rows, seen = receipt.data.train_rows, receipt.training.rows_seen
    return f"{rows:,} trained" if seen in (None, rows) else f"{seen:,} trained of {rows:,}"


# --------------------------------------------------------------------------- exports


def destinations(asked: Sequence[str], findings: Sequence[Finding]) -> None:
    """Print what destinations refuse."""
    console = _console()
    console.print()
    for name in asked:
        own = [finding for finding in findings if finding.destination == name]
        if not own:
            console.print(Text(f"{name}: nothing against it"))
        for finding in own:
            console.print(Text(f"{name}: {finding.message}", style="bold yellow" if finding.refused else ""))


def export(done: Export) -> None:
    """Print what `tunery export` wrote, and how far it is from the adapter."""
    console = _console()
    record, comparison = done.record, done.record.comparison
    difference, limits = comparison.difference, comparison.limits
    console.print(
        Text(
            f"\n{record.format} ({record.numbers}), loaded back in {comparison.runtime} and compared on "
            f"{plural(difference.positions, 'answer token')} of "
            f"{plural(record.rows.count, 'row')} ({record.rows.origin})",
            style="bold",
        )
    )
    for name, key, form in (
        ("mean difference of log-probabilities", "mean_difference", ".2g"),
        ("largest difference", "max_difference", ".2g"),
        ("KL(tuned ‖ exported)", "kl", ".2g"),
        ("same first choice", "same_choice", ".1%"),
        ("the same, near ties counted", "agreement", ".1%"),
    ):
        limit = f"   limit {format(limits[key], form)}" if key in limits else ""
        console.print(f"  {name:<38}{format(difference[key], form):>10}{limit}")
    console.print(
        f"  {plural(comparison.identical_prompts, 'prompt')} and "
        f"{plural(comparison.identical_texts, 'text')} give the same tokens; "
        f"{_found(comparison.update)}"
    )
    for name, file in record.files.items():
        console.print(Text(f"  {file_size(file.bytes):>10}  {name}", style="dim"))
    console.print(Text(f"Export:   {done.path}"), soft_wrap=True)
    if done.upload:
        _upload(console, done.upload)


def _found(update: KeptUpdate) -> str:
    """In how many layers the update was found, and how much of it."""
    words = f"the update is found in {update.measured} of {plural(update.layers, 'layer')}"
    if not update.measured:
        return f"{words}: it is smaller than what rounding does"
    words += f", {update.mean_share:.0%} of it on average"
    return f"{words}, least {update.least_share:.0%} in {update.least_in}"


def _upload(console: Console, upload: JsonMapping) -> None:
    if upload["sent"]:
        console.print(Text(f"Hub:      {upload['address']}"), soft_wrap=True)
        return
    console.print(
        Text(
            f"\n{plural(len(upload['files']), 'file')}, {file_size(upload['bytes'])}, would go to "
            f"{upload['repository']}:"
        )
    )
    for name, size in upload["files"].items():
        console.print(Text(f"  {file_size(size):>10}  {name}"))
    console.print(f"Files of other formats would be removed there: {', '.join(upload['removes'])}", markup=False)
    console.print(Text(f"\n{upload['card']}", style="dim"))
