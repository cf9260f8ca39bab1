"""Dropout before an adapter, whose masks follow from where training stands."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class DropoutClock:
    """Where training stands. Dropout masks are a function of it, so that a resumed run and a recomputed forward pass
    (gradient checkpointing) draw the masks that were drawn before. All layers of an adapter share one clock.

    Attributes:
        enabled: masks are drawn; otherwise dropout does nothing.
    """

    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    enabled: bool = False

    def set(self, seed: int, step: int, micro_batch: int) -> None:
        """Move to another micro-batch."""
        self.seed, self.step, self.micro_batch = seed, step, micro_batch

    def generator(self, layer: int, device: torch.device) -> torch.Generator:
        """The random numbers of layer number `layer` in this micro-batch."""
        place = f"{self.seed} {self.step} {self.micro_batch} {layer}".encode()
        return torch.Generator(device).manual_seed(int.from_bytes(hashlib.sha256(place).digest()[:8]))


@dataclass(frozen=True)
class Dropout:
    """Inverted dropout on an adapter's input (Hu et al., appendix D).

    Attributes:
        p: share of values set to zero.
        clock: None means PyTorch's usual rule: on in training mode, masks from the global generator.
        layer: the layer's number within its adapter.
    """

    p: float
    clock: DropoutClock | None
    layer: int

    def on(self, training: bool) -> bool:
        """Whether masks are drawn now."""
        return self.p > 0.0 and (training if self.clock is None else self.clock.enabled)

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        if not self.on(training):
            return x
        if self.clock is None:
            return F.dropout(x, self.p)
        keep = 1.0 - self.p
        mask = torch.empty_like(x).bernoulli_(keep, generator=self.clock.generator(self.layer, x.device))
        return x * mask.div_(keep)
