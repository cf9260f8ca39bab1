"""The section about serving: ratios by round, goals, and no ratio where the programs disagree."""

from __future__ import annotations

from typing import Any

from bench.serve_report import serve_section


def results(**changes: Any) -> dict[str, Any]:
    rounds = [
        {"base": 500.0, "single": 400.0, "mixed": 360.0, "peft": 100.0, "mixed_lengths": 400.0, "peft_lengths": 80.0},
        {"base": 250.0, "single": 200.0, "mixed": 190.0, "peft": 50.0, "mixed_lengths": 200.0, "peft_lengths": 40.0},
        {"base": 500.0, "single": 400.0, "mixed": 320.0, "peft": 100.0, "mixed_lengths": 400.0, "peft_lengths": 80.0},
    ]
    return {
        "machine": {"name": "cpu", "threads": 2},
        "created": "today",
        "commit": "abc",
        "command": "make",
        "rows": 16,
        "prompt": 64,
        "answer": 32,
        "questions": 32,
        "lengths": (16, 112),
        "dtype": "bfloat16",
        "adapters": 4,
        "first_prompt": 256,
        "disagreement": 0.01,
        "rounds": rounds,
        "first_token_alone": [0.1, 0.2, 0.4],
        "first_token_loaded": [0.3, 0.3, 0.9],
        **changes,
    }


def test_goals_are_medians_of_neighbouring_speeds() -> None:
    text = "\n".join(serve_section(results()))
    assert "| mixed adapters against one                     | ≥ 0.85 × | 0.90 ×   | reached |" in text
    assert "| mixed adapters against PEFT, different lengths | ≥ 3 ×    | 5.0 ×    | reached |" in text
    assert "| mixed adapters against PEFT, equal lengths     | ≥ 3 ×    | 3.6 ×    | reached |" in text
    assert "| tunery, 4 adapters                    | 320      |" in text
    assert "| alone       | 200 ms | 100 to 400 ms |" in text
    assert "15 other rows" in text


def test_no_ratio_where_the_programs_computed_something_else() -> None:
    text = "\n".join(serve_section(results(disagreement=1.5)))
    assert "no ratio: log-probabilities differ by 1.50" in text
    assert "3.6 ×" not in text
