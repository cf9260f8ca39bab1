"""What a model says at the answer tokens of some rows, and how far two models are apart there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tunery.export.limits import KNOWN, POSITIONS, TIE, Limits

TINY = 1e-9
"""Probability below which the rest of a vocabulary counts as nothing."""


@dataclass(frozen=True)
class Probe:
    """A row and the places in it where models are compared.

    Attributes:
        ids: the row's tokens.
        at: ascending; at t the token ids[t] is predicted from ids[:t].
        prompt: tokens before the first trained one.
    """

    ids: tuple[int, ...]
    at: tuple[int, ...]
    prompt: int
    where: str = ""


def make_probe(ids: Sequence[int], trained: Sequence[int], where: str = "", positions: int = POSITIONS) -> Probe:
    """A row with at most `positions` of its trained places, evenly chosen, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(trained) - 1, min(positions, len(trained))).round().astype(int))
    return Probe(tuple(map(int, ids)), tuple(int(trained[i]) for i in chosen), int(trained[0]), where)


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities in nats at P places, one after another over all probes.

    Attributes:
        target: of the row's own token. float64 [P].
        best: the most likely token. int64 [P].
        ids: tokens whose log-probability is known. int64 [P, K].
        known: it; NaN where it is not known after all. float64 [P, K].
    """

    target: np.ndarray
    best: np.ndarray
    ids: np.ndarray
    known: np.ndarray


@torch.no_grad()
def score(model: Any, probes: Sequence[Probe], at: TokenScores | None = None) -> TokenScores:
    """What a causal language model of transformers says at the probes' places; rows run one at a time.

    Args:
        at: take the log-probabilities of the same tokens as these; left out, of the KNOWN most likely ones.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    done = 0
    for probe in probes:
        ids = torch.tensor([probe.ids[: probe.at[-1]]], device=model.device)
        places = torch.tensor(probe.at, device=model.device) - 1
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0]
        logs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        targets = torch.tensor([probe.ids[t] for t in probe.at], device=model.device)
        if at is None:
            known, tokens = logs.topk(min(KNOWN, logs.shape[-1]), dim=-1)
        else:
            tokens = torch.as_tensor(at.ids[done : done + len(places)], device=model.device)
            known = logs.gather(1, tokens)
        target = logs.gather(1, targets[:, None])[:, 0]
        parts.append(tuple(t.double().cpu().numpy() for t in (target, logs.argmax(dim=-1), tokens, known)))
        done += len(places)
    target, best, tokens, known = (np.concatenate(column) for column in zip(*parts, strict=True))
    return TokenScores(target, best.astype(np.int64), tokens.astype(np.int64), known)


@dataclass(frozen=True)
class Difference:
    """How far an exported model is from the tuned one; see Limits for the words.

    Attributes:
        same_choice: share of positions with exactly the same most likely token.
        agreement: the same, where a token that is nearly as likely to the tuned model counts too.
    """

    positions: int
    mean: float
    maximum: float
    kl: float
    kl_max: float
    same_choice: float
    agreement: float

    def as_dict(self) -> dict[str, float | int]:
        """For export.json."""
        return {
            "positions": self.positions,
            "mean_difference": self.mean,
            "max_difference": self.maximum,
            "kl": self.kl,
            "kl_max": self.kl_max,
            "same_choice": self.same_choice,
            "agreement": self.agreement,
        }

    def beyond(self, limits: Limits) -> list[str]:
        """What is outside the limits, in words."""
        found = [
            f"{name} {value:.3g} (limit {limit:g})"
            for name, value, limit in (
                ("mean difference of log-probabilities", self.mean, limits.mean),
                ("largest difference of log-probabilities", self.maximum, limits.maximum),
                ("KL(tuned ‖ exported)", self.kl, limits.kl),
            )
            if not value <= limit
        ]
        if not self.agreement >= limits.agreement:
            found.append(
                f"same first choice, near ties counted, at {self.agreement:.1%} of positions "
                f"(limit {limits.agreement:.0%})"
            )
        return found


def compare(tuned: TokenScores, exported: TokenScores) -> Difference:
    """Two models at the same places.

    Args:
        tuned: with the log-probabilities of its most likely tokens.
        exported: with those of the same tokens, as far as they are known.
    """
    gaps = np.abs(tuned.target - exported.target)
    divergence = _divergence(tuned.known, exported.known)
    top = tuned.known.max(axis=1)
    chosen = np.where(tuned.ids == exported.best[:, None], tuned.known, -np.inf).max(axis=1)
    same = tuned.best == exported.best
    return Difference(
        positions=len(gaps),
        mean=float(gaps.mean()),
        maximum=float(gaps.max()),
        kl=float(divergence.mean()),
        kl_max=float(divergence.max()),
        same_choice=float(same.mean()),
        agreement=float((same | (chosen >= top - TIE)).mean()),
    )


def _divergence(p_logs: np.ndarray, q_logs: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) of each row, over the tokens known of both, all others as one. float64 [P]

    Joining tokens never makes a divergence larger, so it is not more than the true one.
    """
    both = ~np.isnan(q_logs)
    p = np.where(both, np.exp(p_logs), 0.0)
    q = np.where(both, np.exp(np.where(both, q_logs, 0.0)), 0.0)
    listed = np.where(both, p * (p_logs - np.where(both, q_logs, 0.0)), 0.0).sum(axis=1)
    p_rest, q_rest = 1.0 - p.sum(axis=1), 1.0 - q.sum(axis=1)
    counts = p_rest > TINY
    rest = np.where(counts, p_rest, 1.0) * np.log(np.where(counts, p_rest, 1.0) / np.maximum(q_rest, TINY))
    return np.maximum(listed + np.where(counts, rest, 0.0), 0.0)
