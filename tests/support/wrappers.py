"""What PyTorch and its users put around a model, or around its layers."""

from __future__ import annotations

import tempfile

import torch
from torch import nn


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_layers(model: nn.Module) -> nn.Module:
    layers = model.model.layers  # type: ignore[union-attr]
    for number, layer in enumerate(layers):  # type: ignore[arg-type]
        layers[number] = compiled(layer)  # type: ignore[index, operator]
    return model


def distributed(model: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            return nn.parallel.DistributedDataParallel(model)
        finally:
            torch.distributed.destroy_process_group()
