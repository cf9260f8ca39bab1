"""How the model runs while training: its element-wise functions compiled or not, its decoder layers recomputed in the
backward pass or not.

To recompute, each layer's `forward` is replaced on the layer object, and the class's own comes back at the end. So
evaluation afterwards, generation and saving never meet a recomputing layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tunery.data.batching import pack
from tunery.fast.compile import calls, refusals
from tunery.fast.packed_model import PackedModel, probe_rows
from tunery.models.typed import checkpoint
from tunery.training.loss import batch_loss


class DecoderLayers:
    """The decoder layers of a model.

    Attributes:
        recomputing: they keep only their input.
    """

    def __init__(self, model: nn.Module):
        self.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.recomputing = False

    def recompute(self) -> None:
        """Keep only each layer's input, and run the layer again in the backward pass (Chen et al. 2016,
        arXiv:1604.06174). No random state is kept: the model's own dropout is off, and the adapter's follows from the
        step."""
        self.restore()
        self.recomputing = True
        for layer in self.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def restore(self) -> None:
        """As before training."""
        self.recomputing = False
        for layer in self.layers:
            layer.__dict__.pop("forward", None)


@contextlib.contextmanager
def running_layers(model: nn.Module, recompute: bool = False) -> Generator[DecoderLayers]:
    """The layers of a model, to be changed within this context; at its end they are as before."""
    layers = DecoderLayers(model)
    if recompute:
        layers.recompute()
    try:
        yield layers
    finally:
        layers.restore()


def try_compiling(model: PackedModel, parameters: Sequence[Tensor]) -> list[str]:
    """Run three short rows forward and backward, so that what is compiled (tunery.fast.compile) is compiled, and
    compared with the plain functions, before the first step.

    Returns:
        Sentences for the user: that functions are compiled, or which are not, and why. None where nothing is compiled.
    """
    before = calls()
    rows = probe_rows(model.model.config)
    with model.running():
        loss = batch_loss(model, pack(rows if model.flattened else rows[:1])).total
        torch.autograd.grad(loss, parameters, allow_unused=True)
    said = ["element-wise functions are compiled (train.compile)"] if calls() > before else []
    return said + refusals()
