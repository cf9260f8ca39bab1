"""In a notebook a run shows one bar that changes; elsewhere nothing of it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tunery.console import Console


class ZMQInteractiveShell:
    """The name of Jupyter's shell is what it is known by."""


class TerminalInteractiveShell:
    """IPython in a terminal."""


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a notebook displays in one output, one after another."""
    values: list[Any] = []

    def display(value: object, *, display_id: bool) -> SimpleNamespace:
        assert display_id
        values.append(value)
        return SimpleNamespace(update=values.append)

    module = SimpleNamespace(get_ipython=ZMQInteractiveShell, display=SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython", module)  # type: ignore[arg-type]
    return values


def steps(console: Console) -> None:
    console.start(2, 0)
    console.log({"step": 1, "train_loss": 1.5, "data_tokens_per_second": 1200.0})
    console.log({"step": 1, "valid_loss": 1.25})
    console.log({"step": 2, "train_loss": 1.0, "data_tokens_per_second": 1200.0})
    console.close()


def test_a_notebook_sees_one_bar_that_moves_and_no_lines(shown: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    steps(Console())
    assert [repr(state) for state in shown] == [
        "step 0/2",
        "step 1/2 · loss 1.5000 · 1,200 tokens/s",
        "step 2/2 · loss 1.0000 · validation 1.2500 · 1,200 tokens/s",
    ]
    assert '<progress value="2" max="2"' in shown[-1]._repr_html_()
    assert capsys.readouterr().err == ""


def test_in_a_terminal_of_ipython_and_without_it_lines_are_printed(
    shown: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", TerminalInteractiveShell)
    steps(Console())
    monkeypatch.delitem(sys.modules, "IPython")
    steps(Console())
    assert shown == []
    assert capsys.readouterr().err.count("step 2/2 · loss 1.0000") == 2


def test_quiet_is_quiet_in_a_notebook_too(shown: list[Any]) -> None:
    steps(Console(quiet=True))
    assert shown == []
