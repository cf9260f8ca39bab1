"""How sure a measured share is, given so few rows."""

from __future__ import annotations

import math

from tunery.errors import DataError


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927): where the true accuracy plausibly lies, given so many rows.

    Unlike the usual mean ± 2 standard errors it stays within 0 and 1 and is sound for few rows and for 0 % or 100 %.

    Raises:
        DataError: no rows.
        ValueError: `correct` is not within 0 and `total`.
    """
    if total < 1:
        raise DataError("no rows to score", "give held-out rows with data.validation, data.test or --data")
    if not 0 <= correct <= total:
        raise ValueError(f"{correct} right answers out of {total}")
    z = 1.959963984540054  # the normal distribution's 97.5 % quantile
    share = correct / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # exactly 0 and 1 at the ends, where rounding leaves crumbs
    return (0.0 if correct == 0 else centre - half, 1.0 if correct == total else centre + half)
