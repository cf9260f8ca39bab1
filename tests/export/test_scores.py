"""The measures of an export, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tunery.export.targets import TARGETS
from tunery.export.targets.base import LIMITS, Limits
from tunery.export.token_scores import TokenScores, compare, make_probe


def scores(probabilities: np.ndarray, targets: list[int], ids: np.ndarray | None = None) -> TokenScores:
    logs = np.log(probabilities)
    ids = np.tile(np.arange(logs.shape[1]), (len(logs), 1)) if ids is None else ids
    return TokenScores(logs[np.arange(len(logs)), targets], logs.argmax(1), ids, np.take_along_axis(logs, ids, 1))


def random_distributions(rows: int, width: int, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(rows, width))
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_the_same_model_differs_by_nothing() -> None:
    p = random_distributions(5, 9, 0)
    found = compare(scores(p, [0, 1, 2, 3, 4]), scores(p, [0, 1, 2, 3, 4]))
    assert (found.mean, found.maximum, found.kl, found.kl_max, found.agreement) == (0.0, 0.0, 0.0, 0.0, 1.0)
    assert not found.beyond(Limits(0.0, 0.0, 0.0, 1.0))


def test_differences_and_divergence_by_hand() -> None:
    p, q = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]), np.array([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])
    found = compare(scores(p, [0, 2]), scores(q, [0, 2]))
    assert found.maximum == pytest.approx(np.log(2))
    assert found.mean == pytest.approx(np.log(2) / 2)
    assert found.kl_max == pytest.approx((p[0] * np.log(p[0] / q[0])).sum())
    assert found.kl == pytest.approx(found.kl_max / 2)
    assert found.agreement == 0.5
    words = found.beyond(Limits(mean=0.1, maximum=1.0, kl=0.001, agreement=0.9))
    assert len(words) == 3
    assert "mean difference of log-probabilities 0.347 (limit 0.1)" in words[0]
    assert "same first choice, near ties counted, at 50.0% of positions (limit 90%)" in words[2]


def test_a_choice_that_is_as_likely_is_the_same() -> None:
    p, near, far = (np.array([row]) for row in ([0.45, 0.44, 0.11], [0.44, 0.45, 0.11], [0.2, 0.2, 0.6]))
    found = compare(scores(p, [0]), scores(near, [0]))
    assert (found.same_choice, found.agreement) == (0.0, 1.0)
    found = compare(scores(near, [0]), scores(far, [0]))
    assert (found.same_choice, found.agreement) == (0.0, 0.0)


def test_a_format_with_few_bits_has_the_same_idea_of_a_tie() -> None:
    """1.5 nats are no tie, however far such a format's log-probabilities may be."""
    p, q = np.array([[0.75, 0.17, 0.08]]), np.array([[0.17, 0.75, 0.08]])
    assert compare(scores(p, [2]), scores(q, [2])).beyond(
        Limits(9.0, 9.0, 9.0, TARGETS["gguf"].limits("q4_0").agreement)
    )


@pytest.mark.parametrize("known", [1, 3, 8])
def test_joining_the_rest_never_makes_the_divergence_larger(known: int) -> None:
    p, q = random_distributions(40, 12, 1), random_distributions(40, 12, 2)
    whole = (p * np.log(p / q)).sum(1)
    ids = np.argsort(-p, axis=1)[:, :known]
    found = compare(scores(p, [0] * 40, ids), scores(q, [0] * 40, ids))
    assert 0 < found.kl <= whole.mean() + 1e-12
    assert found.kl_max <= whole.max() + 1e-12


def test_tokens_the_export_did_not_name_count_with_the_rest() -> None:
    p, q = random_distributions(6, 10, 3), random_distributions(6, 10, 4)
    ids = np.argsort(-p, axis=1)[:, :5]
    tuned, exported = scores(p, [0] * 6, ids), scores(q, [0] * 6, ids)
    exported.known[:, 3:] = np.nan
    fewer = np.argsort(-p, axis=1)[:, :3]
    expected = compare(scores(p, [0] * 6, fewer), scores(q, [0] * 6, fewer))
    assert compare(tuned, exported).kl == pytest.approx(expected.kl)


def test_something_that_is_no_number_is_beyond_every_limit() -> None:
    p = random_distributions(2, 4, 5)
    broken = scores(p, [0, 1])
    broken.target[0] = np.nan
    assert compare(scores(p, [0, 1]), broken).beyond(Limits(9.0, 9.0, 9.0, 0.0))


def test_positions_of_a_probe_are_spread_over_the_answer() -> None:
    probe = make_probe(range(100), list(range(50, 100)), "here", positions=4)
    assert probe.at == (50, 66, 83, 99)
    assert (probe.prompt, probe.where) == (50, "here")
    assert make_probe(range(9), [7, 8], positions=4).at == (7, 8)


def test_what_could_not_be_measured_is_not_invented() -> None:
    from tunery.export.updates import _kept, _Slope
    from tunery.records.export_record import KeptUpdate
    from tunery.show import _found

    nothing, sharp = _Slope(), _Slope()
    nothing.add(np.zeros((4, 4)), np.zeros((4, 4)), np.zeros((4, 4)), None)
    assert _kept([("a", nothing)]).as_dict() == {
        "layers": 1,
        "measured": 0,
        "mean_share": None,
        "least_share": None,
        "least_in": None,
    }
    assert _found(KeptUpdate.of(_kept([("a", nothing)]).as_dict())).startswith("the update is found in 0 of 1 layer:")
    sharp.add(np.zeros((4, 4)), np.ones((4, 4)), 0.75 * np.ones((4, 4)), None)
    found = KeptUpdate.of(_kept([("a", nothing), ("b", sharp)]).as_dict())
    assert _found(found) == "the update is found in 1 of 2 layers, 75% of it on average, least 75% in b"


def test_every_dtype_has_limits() -> None:
    from tunery.export.gguf_types import NUMBERS

    for numbers in NUMBERS:
        assert TARGETS["gguf"].limits(numbers) is LIMITS[f"gguf {numbers}"]
        assert TARGETS["ollama"].limits(numbers) is TARGETS["gguf"].limits(numbers)
    bits = [TARGETS["gguf"].limits(n) for n in NUMBERS]
    assert [b.kl for b in bits] == sorted(b.kl for b in bits)
