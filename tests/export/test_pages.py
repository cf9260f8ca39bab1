"""The page with the limits says what tunery.export.targets.base says."""

from __future__ import annotations

from pathlib import Path

from tunery.export.targets.base import LIMITS

PAGE = Path(__file__).parents[2] / "docs" / "how-to.md"


def table() -> str:
    """The limits as Markdown."""
    rows = ["| export | mean difference | largest | KL | same first choice |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, limits in LIMITS.items():
        form, _, numbers = name.partition(" ")
        rows.append(
            f"| `{form}`{f' {numbers}' if numbers else ''} | {limits.mean:g} | {limits.maximum:g} | {limits.kl:g} "
            f"| {limits.agreement:.0%} |"
        )
    return "\n".join(rows)


def test_the_limits_on_the_page_are_those_of_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert table() in text, f"docs/how-to.md needs this table:\n\n{table()}"
    assert "LIMITS_TABLE" not in text
