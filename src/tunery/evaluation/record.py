"""What a run directory says, read leniently, and put into numbers and words for people.

The report and the model card are drawn from it. A key that is missing or null is shown as a dash, never an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.config import KindName
from tunery.data.kinds import KINDS
from tunery.errors import CheckpointError, ConfigError
from tunery.jsonl import JsonMapping, JsonObject, read_lines
from tunery.paths import RunPaths, file_sha256
from tunery.training.intervals import accuracy_interval
from tunery.training.metrics import read_metrics

NOTHING = "–"

MOST_PERPLEXITY = 1000
"""Above this the number says no more than that the model has no idea."""


@dataclass(frozen=True, slots=True)
class Metric:
    """How a number of evaluation.json is shown. `better` is "lower", "higher" or "" (neither is better as such)."""

    key: str
    name: str
    better: str
    form: str
    meaning: str


METRICS = (
    Metric(
        "rewards_accuracy",
        "Reward accuracy",
        "higher",
        "percent",
        "how often the training favours a preferred answer over a rejected one",
    ),
    Metric(
        "rewards_margin",
        "Reward margin",
        "higher",
        "loss",
        "how much likelier, times β, preferred answers became than rejected ones; the base has 0 by definition",
    ),
    Metric(
        "preference_accuracy",
        "Preferred is likelier",
        "higher",
        "percent",
        "fraction of pairs whose preferred answer, taken as a whole, is the likelier of the two",
    ),
    Metric(
        "preference_loss",
        "Preference loss",
        "lower",
        "loss",
        "what the training lowers, on held-out pairs; log 2 = 0.693 for the base by definition",
    ),
    Metric("accuracy", "Accuracy", "higher", "percent", "fraction of rows answered with the right label"),
    Metric("macro_f1", "Macro F1", "higher", "score", "F1 averaged over the labels, each counting the same"),
    Metric("weighted_f1", "Weighted F1", "higher", "score", "F1 averaged over the labels by their number of rows"),
    Metric("loss", "Loss", "lower", "loss", "mean surprise at each token of the answer, in nats"),
    Metric(
        "rejected_loss", "Loss of rejected answers", "", "loss", "mean surprise at each token of the rejected answer"
    ),
    Metric("perplexity", "Perplexity", "lower", "perplexity", "among how many tokens the model hesitates, on average"),
    Metric(
        "token_accuracy", "Token accuracy", "higher", "percent", "share of answer tokens that the model ranks first"
    ),
    Metric("chrf", "chrF", "higher", "points", "overlap of letters with the reference answer, 0 to 100"),
    Metric("bleu", "BLEU", "higher", "points", "overlap of word sequences with the reference answer, 0 to 100"),
    Metric("distinct_1", "Distinct-1", "", "score", "different words as a fraction of all words written"),
    Metric("distinct_2", "Distinct-2", "", "score", "different word pairs as a fraction of all words written"),
    Metric("mean_words", "Words per answer", "", "points", "mean length of a generated answer"),
)


# --------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run directory says, as read: {} or [] or "" for a file that is not there."""

    root: Path
    metrics: list[JsonObject]
    evaluation: JsonObject
    predictions: list[JsonObject]
    receipt: JsonObject
    task_yaml: str
    receipt_sha256: str

    @property
    def name(self) -> str:
        """The run's name: from the receipt, else the folder's."""
        return str(pick(self.receipt, "name") or self.root.resolve().name)


def read_run(run_dir: Path) -> RunRecord:
    """Read what a run left behind.

    Raises:
        ConfigError: `run_dir` is not a run directory (it has neither task.yaml, receipt.json nor metrics.jsonl).
        CheckpointError: a file in it is damaged.
    """
    paths = RunPaths(Path(run_dir))
    if not any(path.is_file() for path in (paths.task, paths.receipt, paths.metrics)):
        raise ConfigError(
            f"{run_dir} is not a run directory", "give the folder that `tunery train` named, e.g. runs/my-task"
        )
    return RunRecord(
        root=paths.root,
        metrics=read_metrics(paths.metrics),
        evaluation=_read_object(paths.evaluation),
        predictions=read_lines(paths.predictions),
        receipt=_read_object(paths.receipt),
        task_yaml=paths.task.read_text(encoding="utf-8", errors="replace") if paths.task.is_file() else "",
        receipt_sha256=file_sha256(paths.receipt) if paths.receipt.is_file() else "",
    )


def _read_object(path: Path) -> JsonObject:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not valid JSON: {error}", "make it anew with `tunery eval`, or remove it"
        ) from None
    return value if isinstance(value, dict) else {}


def pick(value: object, *keys: str) -> Any:
    """`value[key1][key2]…`, or None where a step is missing, null, or not an object."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def as_number(value: object) -> float | None:
    """`value` if it is a finite number (booleans are not), else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def items(value: object) -> list[tuple[str, Any]]:
    """The entries of an object; none if it is anything else."""
    return [(str(key), entry) for key, entry in value.items()] if isinstance(value, Mapping) else []


def listed(value: object) -> list[Any]:
    """The entries of a list; none if it is anything else."""
    return list(value) if isinstance(value, list | tuple) else []


# --------------------------------------------------------------------------- words and numbers


def show(value: object, form: str = "score") -> str:
    """A number for reading; a dash where there is none.

    Args:
        form: percent, loss (two or three decimals), score (three), points (one), count (thousands), rate (three
            digits), bytes, seconds, words (text, or yes and no).
    """
    if form == "words":
        return (
            NOTHING
            if value in (None, "")
            else {True: "yes", False: "no"}[value]
            if isinstance(value, bool)
            else str(value)
        )
    number = as_number(value)
    if number is None:
        return NOTHING
    if form == "bytes":
        return _bytes(number)
    if form == "seconds":
        return _seconds(number)
    if form == "perplexity" and number > MOST_PERPLEXITY:
        return f"over {MOST_PERPLEXITY:,}"
    forms = {"percent": ".1%", "points": ",.1f", "count": ",.0f", "rate": ",.3g", "score": ".3f"}
    return format(number, forms.get(form) or (",.2f" if abs(number) >= 1 else ".3f"))


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def _seconds(number: float) -> str:
    if number < 60:
        return f"{number:.1f} s"
    minutes, seconds = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One metric of base and tuned, ready to show. `verdict` is better, worse, same or "" (unknown)."""

    metric: Metric
    base: str
    tuned: str
    change: str
    verdict: str


def metric_rows(evaluation: JsonMapping) -> list[MetricRow]:
    """Every known metric that the evaluation has, in a fixed order."""
    rows = []
    for metric in METRICS:
        base, tuned = (as_number(pick(evaluation, side, metric.key)) for side in ("base", "tuned"))
        if base is None and tuned is None:
            continue
        change, verdict = NOTHING, ""
        if base is not None and tuned is not None:
            difference = tuned - base
            change = f"{difference * 100:+.1f} points" if metric.form == "percent" else f"{difference:+.3g}"
            change = change.replace("-", "−", 1)
            if metric.form == "perplexity" and max(base, tuned) > MOST_PERPLEXITY:
                change = ""
            if metric.better:
                improved = difference > 0 if metric.better == "higher" else difference < 0
                verdict = "same" if difference == 0 else "better" if improved else "worse"
        rows.append(MetricRow(metric, show(base, metric.form), show(tuned, metric.form), change, verdict))
    return rows


def units(kind: KindName, noun: str = "") -> str:
    """What rows of a kind are: "rows" or "pairs".

    Args:
        noun: "row" or "pair"; earlier runs do not say, and then it follows from the kind.
    """
    return f"{noun or KINDS[kind].noun}s"


def unit_of(evaluation: JsonMapping) -> str:
    """What the held-out rows are: "rows" or "pairs"."""
    noun, kind = pick(evaluation, "unit"), KINDS.get(pick(evaluation, "kind"))
    return units(kind.name, noun) if kind else f"{noun or 'row'}s"


def compares_answers(evaluation: JsonMapping) -> bool:
    """Whether answers were judged against each other."""
    return unit_of(evaluation) == "pairs"


def judges_answers(evaluation: JsonMapping) -> bool:
    """Whether answers have rewards: they were compared, or marked good and bad."""
    return compares_answers(evaluation) or pick(evaluation, "tuned", "rewards_accuracy") is not None


def interval_of(evaluation: JsonMapping, side: str) -> tuple[float, float, float] | None:
    """(accuracy, low, high) of "base" or "tuned", the range being Wilson's 95 %; None if it is not known. Of pairs,
    accuracy is the share in which the preferred answer is the likelier."""
    accuracy = as_number(pick(evaluation, side, "preference_accuracy" if compares_answers(evaluation) else "accuracy"))
    rows = as_number(pick(evaluation, "rows"))
    if accuracy is None or not 0 <= accuracy <= 1:
        return None
    if rows is None or rows < 1:
        return None
    low, high = accuracy_interval(round(accuracy * int(rows)), int(rows))
    return accuracy, low, high


def headline(evaluation: JsonMapping) -> str:
    """One plain sentence on what came of a run."""
    rows = show(pick(evaluation, "rows"), "count")
    if judges_answers(evaluation):
        return _preference_headline(evaluation, rows)
    base, tuned = interval_of(evaluation, "base"), interval_of(evaluation, "tuned")
    if base and tuned:
        said = f"The tuned model labels {tuned[0]:.1%} of {rows} held-out rows correctly; the base model {base[0]:.1%}."
        overlap = tuned[1] <= base[2] and base[1] <= tuned[2]
        if overlap:
            return f"{said} With this few rows, a difference could be chance (95 % intervals: {_between(base, tuned)})."
        return said if tuned[0] > base[0] else f"{said} The training made it worse."
    before, after = (as_number(pick(evaluation, side, "loss")) for side in ("base", "tuned"))
    if before is not None and after is not None:
        word = "fell" if after < before else "rose" if after > before else "stayed"
        range_ = f"from {show(before, 'loss')} to {show(after, 'loss')}"
        return f"On {rows} held-out rows the loss {word} {range_}" + (
            "." if after < before else ": the training did not help on new rows."
        )
    if evaluation:
        return _overlap_headline(evaluation, rows)
    return "This run has not been evaluated yet, so nothing can be said about its quality."


def _between(base: tuple[float, float, float], tuned: tuple[float, float, float]) -> str:
    return f"base {base[1]:.0%} to {base[2]:.0%}, tuned {tuned[1]:.0%} to {tuned[2]:.0%}"


def _overlap_headline(evaluation: JsonMapping, rows: str) -> str:
    """Of answers alone, as a model that lies elsewhere gives them."""
    before, after = (as_number(pick(evaluation, side, "chrf")) for side in ("base", "tuned"))
    if before is None or after is None:
        return "The evaluation holds no comparison of base and tuned model."
    said = (
        f"On {rows} held-out {unit_of(evaluation)} the tuned model's answers overlap with the reference by "
        f"{show(after, 'points')} of 100 points (chrF); the base model's by {show(before, 'points')}."
    )
    return said if after > before else f"{said} The training did not bring them closer."


def _preference_headline(evaluation: JsonMapping, count: str) -> str:
    favoured = as_number(pick(evaluation, "tuned", "rewards_accuracy"))
    interval = _favoured_interval(evaluation)
    if favoured is None or interval is None:
        return _overlap_headline(evaluation, count)
    unit = unit_of(evaluation)
    if compares_answers(evaluation):
        said = f"The training favours the preferred answer in {favoured:.1%} of {count} held-out {unit} (chance: 50%)."
    else:
        said = (
            f"Of a good and a bad answer among {count} held-out {unit}, the training favours the good one "
            f"{favoured:.1%} of the time (chance: 50%)."
        )
    if interval[0] <= 0.5 <= interval[1]:
        between = f"95 % interval: {interval[0]:.0%} to {interval[1]:.0%}"
        return f"{said} With this few {unit}, that could be chance ({between})."
    return said if favoured > 0.5 else f"{said} It made things worse."


def _favoured_interval(evaluation: JsonMapping) -> tuple[float, float] | None:
    """The 95 % interval of `rewards_accuracy`: as written, else that of a share of so many rows."""
    written = listed(pick(evaluation, "tuned", "rewards_accuracy_interval"))
    if len(written) == 2:
        return float(written[0]), float(written[1])
    favoured, rows = as_number(pick(evaluation, "tuned", "rewards_accuracy")), as_number(pick(evaluation, "rows"))
    return accuracy_interval(round(favoured * int(rows)), int(rows)) if favoured is not None and rows else None
