"""What an export target is: a noun of this package, one file beside this one.

Nothing heavy is imported while these modules are: the command line lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from tunery.export.destinations import Wanted
    from tunery.export.subject import Sample, Subject
    from tunery.export.token_scores import TokenScores
    from tunery.export.verify import Verdict

Remark = tuple[bool, str]
"""(whether it is refused, why); what is not refused works, with that in mind."""


class Destination:
    """Where an adapter can go.

    Attributes:
        name: on the command line.
        adds_only: it takes the adapter by itself and can only add it to the base's weights.
    """

    name: ClassVar[str]
    adds_only: ClassVar[bool] = False

    def all_remarks(self, wanted: Wanted) -> list[Remark]:
        """What it refuses of an adapter, whatever else it is, and its own remarks."""
        found = self.remarks(wanted)
        if self.adds_only and not wanted.variant.additive:
            why = f"an adapter by itself is added to the base's weights, and {wanted.variant.title} rescales them too"
            found = [(True, f"{why}: use --to merged or --to gguf"), *found]
        return found

    def remarks(self, wanted: Wanted) -> list[Remark]:
        """What it refuses of an adapter, or needs to be told; known before any training or export."""
        return []


class Target(Destination):
    """A form in which a run can be exported.

    Attributes:
        about: what it is, in the words of the command line.
        runtime: the program that loads it back.
        files: by which a program knows it, as patterns.
        hub_library: that the hub shows for it.
        holds_base: the base is inside.
        default_dtype: of its weights, where `--quantize` chooses; None where they keep a dtype of their own.
    """

    about: ClassVar[str]
    runtime: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    hub_library: ClassVar[str]
    holds_base: ClassVar[bool] = False
    default_dtype: ClassVar[str | None] = None

    def require_runtime(self) -> None:
        """Make sure that the program that loads it back is installed.

        Raises:
            ConfigError: it is not.
        """

    def check_dtype(self, name: str) -> None:
        """Refuse a dtype that `--quantize` names.

        Raises:
            ConfigError: this target has no such weights.
        """
        raise NotImplementedError

    def dtype(self, subject: Subject) -> str:
        """Of its weights, where nothing chooses: the base's own."""
        return subject.numbers

    def limits(self, dtype: str) -> Limits:
        """How far it may be from the adapter in tunery; for an adapter alone, by the dtype of the base it is put on."""
        raise NotImplementedError

    def prepare(self, subject: Subject, sample: Sample) -> None:
        """Find out in seconds what would stop the export after minutes.

        Raises:
            ConfigError: it cannot be written.
        """

    def notes(self, wanted: Wanted) -> list[str]:
        """What a person should know before it is written, besides the remarks."""
        return []

    def write(self, subject: Subject, sample: Sample, dtype: str, folder: Path) -> list[str]:
        """Write it into an empty folder; what a person should know about it."""
        raise NotImplementedError

    def read_back(
        self, subject: Subject, sample: Sample, tuned: TokenScores, dtype: str, folder: Path, device: str
    ) -> Verdict:
        """Load it in its program and compare it with the adapter in tunery.

        Args:
            tuned: what the adapter says in tunery.

        Raises:
            AdapterError: it differs by more than its limits, in its tokens, or an update is lost.
        """
        raise NotImplementedError


# --------------------------------------------------------------------------- limits

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
