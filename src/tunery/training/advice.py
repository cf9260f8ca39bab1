"""What the curves of a run say, in plain words: a plateau, an overfit, a divergence.

Pure functions over the lines of metrics.jsonl. A single loss is noisy (each step sees other rows), so every rule
compares averages or fitted lines and asks for a change that is large beside the noise measured on the same curve.

The rules:

* **diverging**: the median of the last 10 training losses is above 1.5 times the median of the first 5, and above it by
  3 standard errors. Needs 20 lines.
* **plateau**: a straight line is fitted over a window: all lines after warm-up, or the last half of them, at least 80.
  It fires when the fall over the window is within its standard error of zero and below 5 % of the level even at the
  fit's upper 95 % bound; a noisier curve needs more lines. It keeps quiet when the loss is low (below 0.5 nats per
  token, or below a quarter of its start), which is convergence; when it rises by more than 10 %; and when the flat part
  is where the schedule has brought the rate below half its peak, unless the loss is still where it started.
* **overfit**: the last 3 validations all come after the best one and each is worse than the one before; their mean is
  worse than the best by more than 2 % and by more than 3 times the noise between validations; and the training loss is
  lower now than it was around the best.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from tunery.jsonl import JsonMapping
from tunery.progress import Note
from tunery.training.metrics import training_lines, validation_lines

History = Sequence[JsonMapping]

DIVERGED_RATIO = 1.5
START_LINES, RECENT_LINES = 5, 10
PLATEAU_LINES = 80
PLATEAU_FALL, PLATEAU_RISE = 0.05, 0.10
LOW_LOSS = 0.5
LOW_SHARE_OF_START = 0.25
SAME_AS_START = 0.95
OVERFIT_VALIDATIONS = 3
OVERFIT_RISE = 0.02
OVERFIT_NOISE = 3


def advise(history: History) -> list[Note]:
    """All findings on a run so far, the gravest first; empty when nothing is wrong. See the module for the rules.

    Their codes are diverging, plateau and overfit.

    Args:
        history: lines of metrics.jsonl. Lines without a loss, or with null, are passed over.
    """
    if found := diverging(history):
        return [found]  # the other two would describe the same thing less well
    return [found for found in (overfit(history), plateau(history)) if found]


def diverging(history: History) -> Note | None:
    """The training loss has climbed well above where it started."""
    losses = training_lines(history)
    if len(losses) < 2 * RECENT_LINES:
        return None
    values = [loss for _, loss in losses]
    start = statistics.median(values[:START_LINES])
    recent = statistics.median(values[-RECENT_LINES:])
    # the standard error of a median is about 1.25 sigma / sqrt(n)
    error = 1.25 * _noise(values) * math.sqrt(1 / START_LINES + 1 / RECENT_LINES)
    if recent <= DIVERGED_RATIO * start or recent - start <= 3 * error:
        return None
    rates = [line["learning_rate"] for line in history if _is_number(line.get("learning_rate"))]
    lowest = min(losses, key=lambda pair: pair[1])
    return Note(
        f"the training loss is diverging: it started at {start:.2f}, was lowest at step {lowest[0]} ({lowest[1]:.2f}), "
        f"and is now {recent:.2f}",
        hint=f"lower train.learning_rate{_peak_words(rates)} to a third or less, or lengthen train.warmup",
        level="warn",
        code="diverging",
    )


def plateau(history: History) -> Note | None:
    """The training loss is high and no longer falls, though the learning rate is not the reason."""
    losses = training_lines(history)
    rates = {
        line["step"]: line["learning_rate"]
        for line in history
        if _is_number(line.get("step")) and _is_number(line.get("learning_rate"))
    }
    warm = _warm_up_end(rates)
    after = [(step, loss) for step, loss in losses if step >= warm]
    if len(after) < PLATEAU_LINES:
        return None
    start = statistics.median(loss for _, loss in losses[:START_LINES])
    last_half = after[-max(PLATEAU_LINES, len(after) // 2) :]
    return _flat(after, start, rates) or _flat(last_half, start, rates)


def _flat(window: Sequence[tuple[int, float]], start: float, rates: Mapping[int, float]) -> Note | None:
    fall, error = _fitted_fall(window)
    level = statistics.fmean(loss for _, loss in window)
    if level < LOW_LOSS or level < LOW_SHARE_OF_START * start:
        return None
    if fall > error or fall + 2 * error >= PLATEAU_FALL * level or fall < -PLATEAU_RISE * level:
        return None
    still_at_start = level >= SAME_AS_START * start
    if not still_at_start and _mean_rate_share(window, rates) < 0.5:
        return None
    setting = f"train.learning_rate{_peak_words(rates.values())}"
    if still_at_start:
        hint = f"raise {setting} about threefold, and look with `tunery check` at what is trained"
    else:
        hint = (
            f"if that is too high for your task, try {setting} two or three times higher or lower, "
            "train.scheduler: cosine, or a larger lora.rank"
        )
    moved = f"fell by {fall / level:.1%}" if fall > 0 else f"rose by {-fall / level:.1%}"
    return Note(
        f"the training loss has stayed at about {level:.2f} from step {window[0][0]} to {window[-1][0]} (it {moved}; "
        f"at the start it was {start:.2f})",
        hint=hint,
        level="warn",
        code="plateau",
    )


def overfit(history: History) -> Note | None:
    """The validation loss rises while the training loss falls."""
    validations = validation_lines(history)
    if len(validations) < OVERFIT_VALIDATIONS + 1:
        return None
    best_index = min(range(len(validations)), key=lambda index: validations[index][1])
    if len(validations) - 1 - best_index < OVERFIT_VALIDATIONS:
        return None
    best_step, best = validations[best_index]
    values = [loss for _, loss in validations]
    recent = values[-OVERFIT_VALIDATIONS:]
    if recent != sorted(set(recent)):
        return None
    now = statistics.fmean(recent)
    if now - best <= max(OVERFIT_RISE * best, OVERFIT_NOISE * _noise_around_trend(values[best_index:])):
        return None
    before = validations[best_index - 1][0] if best_index else 0
    then = _mean_between(history, before, best_step)
    latest = _mean_between(history, validations[-2][0], validations[-1][0])
    if then is None or latest is None or latest >= then:
        return None
    return Note(
        f"the model is learning the training rows by heart: the validation loss was best at step {best_step} "
        f"({best:.2f}) and is now {values[-1]:.2f}, while the training loss went from {then:.2f} to {latest:.2f}",
        hint="stop there next time (train.early_stopping_patience: 2 also goes back to the best step), or use fewer "
        "train.epochs, lora.dropout: 0.1, or more rows",
        level="warn",
        code="overfit",
    )


# --------------------------------------------------------------------------- statistics


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _noise(values: Sequence[float]) -> float:
    """Standard deviation of the noise, from differences of neighbours (their median, so that jumps do not count)."""
    differences = [abs(right - left) for left, right in itertools.pairwise(values)]
    return 1.4826 * statistics.median(differences) / math.sqrt(2) if differences else 0.0


def _noise_around_trend(values: Sequence[float]) -> float:
    """Standard deviation of the noise of a short curve, from second differences: a straight rise is not noise.

    Their median, so that one turn does not count as noise; widened where there are few.
    """
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return 1.4826 * statistics.median(bends) / math.sqrt(6) * (1 + 3 / len(bends)) if bends else 0.0


def _fitted_fall(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """How far the least-squares line falls from the first point to the last, and the standard error of that."""
    count = len(points)
    x_mean = statistics.fmean(x for x, _ in points)
    y_mean = statistics.fmean(y for _, y in points)
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    length = points[-1][0] - points[0][0]
    if spread == 0:
        return 0.0, math.inf
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / spread
    residual = sum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in points) / (count - 2)
    return -slope * length, math.sqrt(residual / spread) * length


def _warm_up_end(rates: Mapping[int, float]) -> int:
    """The first step at the highest rate; while the rate still rises, that is the last step."""
    return max(rates, key=lambda step: (rates[step], -step)) if rates else 0


def _mean_rate_share(window: Sequence[tuple[int, float]], rates: Mapping[int, float]) -> float:
    """Mean learning rate over the window as a fraction of the peak; 1 when no rates are known."""
    seen = [rates[step] for step, _ in window if step in rates]
    peak = max(rates.values(), default=0.0)
    return statistics.fmean(seen) / peak if seen and peak > 0 else 1.0


def _peak_words(rates: Iterable[float]) -> str:
    peak = max(rates, default=None)
    return "" if peak is None else f" (it was {peak:.2g})"


def _mean_between(history: History, after: int, until: int) -> float | None:
    """Mean training loss of the steps in (after, until]; None if there are none."""
    losses = [loss for step, loss in training_lines(history) if after < step <= until]
    return statistics.fmean(losses) if losses else None
