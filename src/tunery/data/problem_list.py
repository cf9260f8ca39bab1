"""Problems of rows as lists for people: cause by cause, each with its first places and a count."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

from tunery.data.example import Problem
from tunery.data.source import printable
from tunery.errors import DataError
from tunery.text import plural

CAUSES_SHOWN = 20
SHOWN_OF_A_CAUSE = 5
_LINES_NAMED = 10

_OF_A_ROW = re.compile(r"'[^']*'|\"[^\"]*\"|[\d,]+")
"""What differs among messages of one cause: what a row says, in quotes, and numbers."""


def bad_rows(problems: Sequence[Problem], rows: int, of: int, hint: str) -> DataError:
    """The error that lists the problems of some rows.

    Args:
        rows, of: so many of all rows have them.
    """
    head = f"{plural(len(problems), 'problem')} in {rows:,} of {of:,} rows:"
    return DataError("\n".join([head, *by_cause(problems)]), hint)


def by_cause(problems: Sequence[Problem], say: Callable[[Problem], str] = str) -> list[str]:
    """The lines of a list of problems, those that one change would mend together, in the order of their first places.

    Args:
        say: a problem in words.
    """
    causes: dict[tuple[str, ...], list[Problem]] = {}
    for problem in problems:
        causes.setdefault(_cause(problem), []).append(problem)
    lines: list[str] = []
    for alike in itertools.islice(causes.values(), CAUSES_SHOWN):
        shown = len(alike) if len(alike) <= SHOWN_OF_A_CAUSE else SHOWN_OF_A_CAUSE - 2
        lines += [printable(say(problem), 500) for problem in alike[:shown]]
        if len(alike) > shown:
            where = ", ".join(f"{problem.line:,}" for problem in alike[shown : shown + _LINES_NAMED])
            more = ", …" if len(alike) > shown + _LINES_NAMED else ""
            lines.append(f"  … and {len(alike) - shown:,} more like these (lines {where}{more})")
    if len(causes) > CAUSES_SHOWN:
        left = sum(len(alike) for alike in itertools.islice(causes.values(), CAUSES_SHOWN, None))
        lines.append(f"… and {plural(left, 'problem')} of {plural(len(causes) - CAUSES_SHOWN, 'other cause')}")
    return lines


def _cause(problem: Problem) -> tuple[str, ...]:
    """What problems that one change would mend have in common."""
    return (problem.file, _OF_A_ROW.sub("", problem.field), _OF_A_ROW.sub("", problem.message))
