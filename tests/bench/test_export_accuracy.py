"""When the comparison of exports fails."""

from __future__ import annotations

from bench.export_accuracy import exit_code


def test_exit_code() -> None:
    assert exit_code(0.9, [{"accuracy": 0.895}, {"refused": "no"}]) == 0
    assert exit_code(0.9, [{"accuracy": 0.88}]) == 1
    assert exit_code(0.9, [{"refused": "no"}]) == 1
    assert exit_code(0.9, []) == 1
