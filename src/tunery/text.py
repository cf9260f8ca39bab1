"""Words for people: the name that was meant, counts, sizes and durations."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

SIMILAR = 0.6
"""How alike two names are of which one may be meant for the other, from 0 to 1 (difflib's ratio)."""


def similar_names(name: str, known: Iterable[str], count: int = 1, cutoff: float = SIMILAR) -> list[str]:
    """The known names that are most like a name, the most similar first."""
    return difflib.get_close_matches(name, list(known), count, cutoff)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = SIMILAR) -> str | None:
    """ "did you mean X?" for the most similar of the known names; None where none is similar."""
    close = similar_names(name, known, 1, cutoff)
    return f"did you mean {close[0]}?" if close else None


def some_of(names: Sequence[str], most: int) -> str:
    """The first of some names, and how many more there are: "a, b and 3 more"."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def plural(count: int, noun: str) -> str:
    """ "1 row", "2,000 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def gigabytes(count: float) -> str:
    """Bytes of memory or of a model: "1.5 GB", in powers of ten."""
    return f"{count / 1e9:.1f} GB"


def file_size(count: float) -> str:
    """Bytes of a file, in the unit that suits them: "900 B", "12 kB", "35 MB", "1.5 GB", in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """About how long: "45 s", "12 min", "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def duration_range(low: float, high: float) -> str:
    """About how long, as a range: "20 to 45 s", "10 to 25 min"; one duration where the ends read the same."""
    if high < 1:
        return "less than 1 s"
    first, last = duration(low), duration(high)
    if first == last:
        return f"about {first}"
    return f"{first.partition(' ')[0] if first.split()[1] == last.split()[1] else first} to {last}"
