"""How far an export may differ from the adapter in tunery.

The figures behind the limits on the first choice are in docs/lab.md ("How far is an export from its adapter?").
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS = 24
"""Held-out rows compared, unless told otherwise."""

POSITIONS = 16
"""Answer tokens compared in one row, evenly chosen."""

KNOWN = 256
"""Most likely tokens of the tuned model that are compared one by one; the rest of its vocabulary counts as one."""

TIE = 0.15
"""Nats within which the tuned model's second choice is as good as its first, whatever the format."""


@dataclass(frozen=True)
class Limits:
    """How far an export may be from the adapter in tunery, over the answer tokens compared.

    Attributes:
        mean, maximum: difference of an answer token's log-probability, in nats.
        kl: mean KL(tuned ‖ exported), in nats.
        agreement: smallest share of positions with the same most likely token. One that is as likely to the tuned
            model as its own first choice, up to TIE, counts as the same.
    """

    mean: float
    maximum: float
    kl: float
    agreement: float

    def as_dict(self) -> dict[str, float]:
        """For export.json."""
        return {
            "mean_difference": self.mean,
            "max_difference": self.maximum,
            "kl": self.kl,
            "agreement": self.agreement,
        }


_EXACT = Limits(mean=0.001, maximum=0.01, kl=0.0001, agreement=1.0)
_HALF = Limits(mean=0.02, maximum=0.15, kl=0.002, agreement=0.99)
_COARSE_HALF = Limits(mean=0.05, maximum=0.4, kl=0.01, agreement=0.97)

LIMITS: dict[str, Limits] = {
    "peft": _EXACT,
    "merged float32": _EXACT,
    "merged float64": _EXACT,
    "merged float16": _HALF,
    "merged bfloat16": _COARSE_HALF,
    "gguf f32": _HALF,
    "gguf f16": _HALF,
    "gguf bf16": _COARSE_HALF,
    "gguf q8_0": Limits(mean=0.05, maximum=0.4, kl=0.01, agreement=0.97),
    "gguf q6_k": Limits(mean=0.08, maximum=0.6, kl=0.02, agreement=0.95),
    "gguf q5_1": Limits(mean=0.15, maximum=1.2, kl=0.05, agreement=0.9),
    "gguf q5_0": Limits(mean=0.15, maximum=1.2, kl=0.05, agreement=0.9),
    "gguf q5_k_m": Limits(mean=0.15, maximum=1.2, kl=0.05, agreement=0.9),
    "gguf q4_1": Limits(mean=0.3, maximum=2.5, kl=0.15, agreement=0.65),
    "gguf q4_0": Limits(mean=0.3, maximum=2.5, kl=0.15, agreement=0.65),
    "gguf q4_k_m": Limits(mean=0.3, maximum=2.5, kl=0.15, agreement=0.65),
    "gguf q3_k_m": Limits(mean=0.6, maximum=4.0, kl=0.4, agreement=0.6),
}
"""The one table of limits, by target and dtype; what llama.cpp loads has those of "gguf"."""
