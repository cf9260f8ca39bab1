"""Words for people."""

from __future__ import annotations

import pytest

from tunery.text import did_you_mean, duration, duration_range, file_size, gigabytes, plural, similar_names


def test_the_name_that_was_meant() -> None:
    known = ["learning_rate", "batch_size", "epochs"]
    assert did_you_mean("lerning_rate", known) == "did you mean learning_rate?"
    assert did_you_mean("zzz", known) is None
    assert similar_names("epoch", iter(known)) == ["epochs"]


@pytest.mark.parametrize(("count", "words"), [(0, "0 rows"), (1, "1 row"), (2000, "2,000 rows")])
def test_counts(count: int, words: str) -> None:
    assert plural(count, "row") == words


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (12_345, "12 kB"), (34.6e6, "35 MB"), (1.55e9, "1.6 GB")]
)
def test_sizes_of_files(count: float, words: str) -> None:
    assert file_size(count) == words
    assert gigabytes(1.55e9) == "1.6 GB"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (600, 1500, "10 to 25 min"),
        (50, 200, "50 s to 3 min"),
        (0.2, 0.9, "less than 1 s"),
        (0.4, 3, "0 to 3 s"),
        (3600, 3660, "60 to 61 min"),
        (7200, 7210, "about 2.0 h"),
    ],
)
def test_a_range_of_time_names_its_unit_once(low: float, high: float, words: str) -> None:
    assert duration_range(low, high) == words
