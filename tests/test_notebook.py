"""The notebook of the examples, run cell by cell as it stands there."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "first-hour.ipynb"


def test_every_cell_runs_and_the_last_one_answers(
    tmp_path: Path, smollm2: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    names: dict[str, Any] = {}
    shown = [run(cell["source"], names) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    said = capsys.readouterr().out
    assert names["plan"].training.model == smollm2
    assert names["answer"] in names["what"]
    assert "trained tokens, 12 steps" in said
    assert "report: first-hour/runs/first-hour/report.html" in said
    assert names["run"].report.is_file()
    page = next(value for value in shown if value is not None)._repr_html_()
    assert "24 held-out rows" in page


def run(lines: list[str], names: dict[str, Any]) -> Any:
    """Run a cell; the value of its last line, if that is an expression, as a notebook shows it."""
    tree = ast.parse("".join(lines))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)
