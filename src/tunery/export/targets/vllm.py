"""vLLM, which loads PEFT's folder and wants more of it than PEFT does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunery.export.targets.base import Destination, Remark

if TYPE_CHECKING:
    from tunery.export.destinations import Wanted

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank; an adapter may have any rank up to it."""

DEFAULT_RANK = 16

WITH_OUTER = ("llama", "mistral")
"""Model types for which vLLM applies an update of the embedding or the head (its pull request 33234)."""

WITHOUT_LORA = ("gpt2",)
"""Model types that vLLM serves without adapters."""


class Vllm(Destination):
    """A server, not a form of its own: what it loads is the target peft or merged."""

    name = "vllm"
    adds_only = True

    def remarks(self, wanted: Wanted) -> list[Remark]:
        found = []
        rank = max(wanted.ranks)
        if rank > RANKS[-1]:
            found.append((True, f"rank {rank} is above {RANKS[-1]}, the most that vLLM takes: lower lora.rank"))
        elif rank > DEFAULT_RANK:
            most = next(r for r in RANKS if r >= rank)
            found.append((False, f"vLLM needs --max-lora-rank {most} for rank {rank} (its default is {DEFAULT_RANK})"))
        if len(wanted.ranks) > 1 or len(wanted.alphas) > 1:
            found.append((True, "vLLM takes one rank and one alpha for all layers of an adapter: use --to merged"))
        if wanted.outer:
            names = ", ".join(wanted.outer)
            sure = wanted.model_type in WITH_OUTER
            some = f"vLLM applies updates of {names} for a few kinds of models only ({', '.join(WITH_OUTER)})"
            found.append((not sure, f"{some}: leave them out of lora.targets, or use --to merged"))
        if wanted.model_type in WITHOUT_LORA:
            found.append((True, f"vLLM serves {wanted.model_type} models without adapters: use --to merged"))
        if wanted.quantized:
            found.append((False, f"the adapter is trained on a base in {wanted.quantized}; serve it on the same"))
        return found
