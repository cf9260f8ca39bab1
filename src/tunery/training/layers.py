"""How the decoder layers run while training: compiled or not, recomputed in the backward pass or not.

Each layer's `forward` is replaced on the layer object, and the class's own comes back at the end. So hooks, evaluation
afterwards, generation and saving never meet a compiled or a recomputing layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tunery.config import TrainConfig
from tunery.data.batching import flatten
from tunery.models.flat import TOLERANCE, FlatModel, probe_rows
from tunery.training.guard import is_out_of_memory
from tunery.training.loss import batch_loss

WORTH_COMPILING = 200
"""Optimizer steps from which `train.compile: auto` compiles on a GPU. An estimate: a minute of compiling, and a fifth
saved of steps that take one to two seconds (norms, rotations, activations and additions become fewer kernels)."""

VARIANTS = 64
"""Most versions of one layer: with and without gradients, adapter and window; PyTorch would stop at eight."""


class Layers:
    """The decoder layers of a model.

    Attributes:
        compiled, recomputing: how they run now.
    """

    def __init__(self, model: nn.Module):
        self.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.compiled = self.recomputing = False
        self._compiled: dict[nn.Module, Callable[..., Any]] = {}

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile each layer's forward pass when it first runs. All layers share the code; lengths may vary.

        Attention stays outside (tunery.models.attention): it would be compiled anew for each batch.
        """
        self.compiled = True
        # Made once: a second torch.compile of the same function would compile all over again.
        self._compiled = {
            layer: torch.compile(layer.forward, dynamic=True, backend=backend) for layer in self._as_their_class()
        }
        self._apply()

    def uncompile(self) -> None:
        """Run as the model's class says."""
        self.compiled = False
        self._apply()

    def recompute(self) -> None:
        """Keep only each layer's input, and run the layer again in the backward pass (Chen et al. 2016,
        arXiv:1604.06174). No random state is kept: the model's own dropout is off, and the adapter's follows from the
        step."""
        self.recomputing = True
        self._apply()

    def restore(self) -> None:
        """As before training."""
        self.compiled = self.recomputing = False
        self._apply()

    def _as_their_class(self) -> Iterator[nn.Module]:
        """The layers, each with its class's own forward pass."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)
            yield layer

    def _apply(self) -> None:
        for layer in self._as_their_class():
            forward = self._compiled[layer] if self.compiled else layer.forward
            if self.recomputing:
                forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
            if self.compiled or self.recomputing:
                layer.forward = forward


@contextlib.contextmanager
def running_layers(model: nn.Module, recompute: bool = False) -> Iterator[Layers]:
    """The layers of a model, to be changed within this context; at its end they are as before."""
    layers = Layers(model)
    if recompute:
        layers.recompute()
    try:
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            yield layers
    finally:
        layers.restore()


# --------------------------------------------------------------------------- compiling


def wants_compiling(config: TrainConfig, dropout: float, steps: int, device: torch.device) -> tuple[bool, str | None]:
    """What `train.compile` means here, and what the user should know about it.

    Args:
        dropout: the adapter's. Its masks come from a generator of their own, which cannot be compiled.
        steps: still to do.
    """
    if config.compile is False:
        return False, None
    if dropout > 0:
        return False, None if config.compile == "auto" else "train.compile: not with lora.dropout above 0"
    if config.compile == "auto":
        return device.type == "cuda" and steps >= WORTH_COMPILING, None
    return True, None


def compile_layers(
    layers: Layers, model: FlatModel, parameters: Sequence[Tensor], backend: str | Callable[..., Any] = "inductor"
) -> str:
    """Compile the layers if that works: three short rows are run both ways, with gradients, and compared.

    Returns:
        A sentence for the user: that the layers are compiled, or why they are not.
    """
    if not layers.layers:
        return "not compiled: this model has no decoder layers of the usual kind"
    wanted = _trial(model, parameters)
    layers.compile(backend)
    try:
        got = _trial(model, parameters)
    except Exception as error:  # whatever a compiler, its absence or a driver may raise
        if is_out_of_memory(error):
            raise
        layers.uncompile()
        return f"not compiled: {_reason(error)}"
    difference = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if difference > TOLERANCE.get(model.model.dtype, 0.1):
        layers.uncompile()
        return f"not compiled: compiled layers gave gradients that differ by {difference:.1%}"
    return "decoder layers are compiled (train.compile)"


def _trial(model: FlatModel, parameters: Sequence[Tensor]) -> Tensor:
    """Loss without gradients, loss with them, and the adapter's gradient, as one vector in float64 on the CPU."""
    rows = probe_rows(min(model.model.config.get_text_config().vocab_size, 1000))
    batch = flatten(rows if model.flattened else rows[:1])
    with torch.no_grad():
        alone = batch_loss(model, batch).total
    with model.running():
        loss = batch_loss(model, batch).total
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    parts = [alone, loss.detach(), *(g for g in gradients if g is not None)]
    return torch.cat([part.detach().cpu().double().flatten() for part in parts])


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at the bottom, with its kind."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {words[:160]}".removesuffix(": ")
