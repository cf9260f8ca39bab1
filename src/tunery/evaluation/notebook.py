"""A run as a notebook shows it: what came of it, base vs. tuned, and where to read more."""

from __future__ import annotations

from html import escape
from pathlib import Path

from tunery.errors import TuneryError
from tunery.evaluation.proof import warnings_of
from tunery.evaluation.record import headline, metric_rows, pick, read_run, show, unit_of
from tunery.paths import RunPaths


def run_words(run: Path) -> str:
    """A run in a line; of one whose folder is not there (any more), its path alone."""
    try:
        return f"<Run {run}: {headline(read_run(run).evaluation)}>"
    except TuneryError:
        return f"<Run {run}>"


def run_html(run: Path) -> str:
    """A few lines of HTML; every text of the user's is escaped."""
    try:
        record = read_run(run)
    except TuneryError:
        return escape(run_words(run))
    lines = [f"<p><b>{escape(record.name)}</b>: {escape(headline(record.evaluation))}</p>"]
    if rows := metric_rows(record.evaluation):
        counted = f"{show(pick(record.evaluation, 'rows'), 'count')} held-out {unit_of(record.evaluation)}"
        lines.append(f"<table><thead><tr><th>{escape(counted)}</th><th>base</th><th>tuned</th></tr></thead><tbody>")
        for row in rows:
            cells = (row.metric.name, row.base, row.tuned)
            lines.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
        lines.append("</tbody></table>")
    if warnings := warnings_of(record.receipt):
        lines.append(f"<ul>{''.join(f'<li>{escape(warning)}</li>' for warning in warnings)}</ul>")
    lines.append(f"<p>Report: <code>{escape(str(RunPaths(run).report))}</code></p>")
    return "".join(lines)
