"""How the next token is chosen."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tunery.serve.engine.sampling_params import Choice, Sampler, SamplingParams, choose

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 2 * torch.randn(6, 40, generator=GENERATOR)


def one(sampling: SamplingParams, logits: torch.Tensor = LOGITS[0], **more) -> Choice:
    (choice,) = choose(logits[None].clone(), [Sampler(sampling, **more)])
    assert isinstance(choice, Choice)
    return choice


def test_temperature_zero_takes_the_most_likely() -> None:
    choices = choose(LOGITS.clone(), [Sampler(SamplingParams(temperature=0.0)) for _ in LOGITS])
    assert [c.token for c in choices] == LOGITS.argmax(-1).tolist()  # type: ignore[union-attr]


def test_a_seed_repeats_a_rows_draws_whatever_else_is_in_the_batch() -> None:
    def draws(rows: int, at: int, seed: int | None, choice: int = 0) -> list[int]:
        samplers = [Sampler(SamplingParams(seed=i)) for i in range(rows)]
        samplers[at] = Sampler(SamplingParams(seed=seed), choice)
        found = []
        for _ in range(20):
            logits = torch.randn(rows, 40, generator=torch.Generator().manual_seed(7))
            logits[at] = LOGITS[0]
            found.append(choose(logits, samplers)[at].token)  # type: ignore[union-attr]
        return found

    assert draws(1, 0, 5) == draws(6, 3, 5)
    assert draws(1, 0, 5) != draws(1, 0, 6)
    assert draws(1, 0, 5) != draws(1, 0, 5, choice=1)
    assert draws(1, 0, None) != draws(1, 0, None)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.8), (1.0, 0.3), (0.7, 0.95)])
def test_draws_follow_the_distribution(temperature: float, top_p: float) -> None:
    shares = torch.softmax(LOGITS[0].double() / temperature, -1)
    order = shares.argsort(descending=True)
    before = shares[order].cumsum(0) - shares[order]
    kept = order[before < top_p]
    wanted = torch.zeros(40, dtype=torch.float64)
    wanted[kept] = shares[kept] / shares[kept].sum()
    count = 20_000
    samplers = [Sampler(SamplingParams(temperature, top_p, seed=i)) for i in range(count)]
    counts = Counter(c.token for c in choose(LOGITS[:1].repeat(count, 1), samplers))  # type: ignore[union-attr]
    found = torch.tensor([counts[i] / count for i in range(40)], dtype=torch.float64)
    assert set(counts) <= set(kept.tolist())
    assert (found - wanted).abs().max() < 5 * (0.25 / count) ** 0.5


def test_a_nucleus_wider_than_the_first_look_is_found() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, 4321] = 1.0
    seen = {choose(logits.clone(), [Sampler(SamplingParams(1.0, 0.999, seed=s))])[0].token for s in range(300)}  # type: ignore[union-attr]
    assert len(seen) > 250


def test_top_p_zero_is_greedy() -> None:
    assert {one(SamplingParams(2.0, 0.0, seed=s)).token for s in range(20)} == {int(LOGITS[0].argmax())}


def test_penalties_are_openais() -> None:
    sampler = Sampler(SamplingParams(temperature=0.0, presence_penalty=1.5, frequency_penalty=0.25))
    for token in (3, 3, 3, 8):
        sampler.note(token)
    logits = LOGITS[0].clone()
    sampler.adjust(logits)
    wanted = LOGITS[0].clone()
    wanted[3] -= 1.5 + 3 * 0.25
    wanted[8] -= 1.5 + 0.25
    assert torch.allclose(logits, wanted)


def test_bias_bans_and_forces() -> None:
    best = int(LOGITS[0].argmax())
    assert one(SamplingParams(temperature=0.0, bias={best: -100.0})).token != best
    assert {one(SamplingParams(seed=s, bias={7: 100.0})).token for s in range(30)} == {7}


class Only:
    """A grammar that allows some tokens."""

    def __init__(self, *tokens: int):
        self.mask = torch.zeros(40, dtype=torch.bool)
        self.mask[list(tokens)] = True

    def allowed(self) -> torch.Tensor:
        return self.mask


class Broken:
    def allowed(self) -> torch.Tensor:
        raise ValueError("too deep")


def test_a_grammar_is_kept_to() -> None:
    assert {one(SamplingParams(2.0, seed=s), grammar=Only(4, 9)).token for s in range(40)} == {4, 9}
    assert one(SamplingParams(0.0), grammar=Only(9)).token == 9


def test_log_probabilities_are_those_of_the_model_not_of_what_was_changed() -> None:
    shares = torch.log_softmax(LOGITS[0], -1)
    changed = SamplingParams(0.3, 0.5, 1, 1.0, 1.0, {5: 50.0}, top_logprobs=4)
    choice = one(changed, grammar=Only(5, 6))
    assert choice.token == 5
    assert choice.logprob == pytest.approx(float(shares[5]), abs=1e-6)
    assert [token for token, _ in choice.top] == shares.topk(4).indices.tolist()
    assert [value for _, value in choice.top] == pytest.approx(shares.topk(4).values.tolist(), abs=1e-6)
    everything = one(SamplingParams(0.0, top_logprobs=40))
    assert sum(torch.tensor(value).exp().item() for _, value in everything.top) == pytest.approx(1.0, abs=1e-5)
    assert one(SamplingParams(0.0, top_logprobs=0)).top == ()
    assert one(SamplingParams(0.0)).logprob is None


def test_one_rows_trouble_is_not_the_others() -> None:
    logits = LOGITS.clone()
    logits[1, 3] = float("nan")
    logits[4, 3] = float("inf")
    samplers = [Sampler(SamplingParams(temperature=0.0, top_logprobs=1)) for _ in LOGITS]
    samplers[2] = Sampler(SamplingParams(), grammar=Broken())
    found = choose(logits, samplers)
    assert isinstance(found[1], FloatingPointError)
    assert isinstance(found[4], FloatingPointError)
    assert isinstance(found[2], ValueError)
    for row in (0, 3, 5):
        choice = found[row]
        assert isinstance(choice, Choice)
        assert choice.token == int(LOGITS[row].argmax())
