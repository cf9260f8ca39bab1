"""tunery on a Llama whose linear layers are NF4 with random weights, made on the device a layer at a time.

A 70B model's bfloat16 weights would not fit there, and need not be written to disk to be random.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bench.peers.common import Lines, Workload, finish, options
from bench.peers.with_tunery import PACKAGES, Trainer, rows_of
from tunery.models.device import available_memory
from tunery.training.memory import Lean, estimate, logit_chunk

SPREAD = 0.02
"""Standard deviation of the weights, as Llama is initialised."""


ROOM = 0.9
"""Part of the free memory that a step may be expected to take."""


def random_nf4(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """The model, frozen: NF4 (double quantisation) inside the decoder layers, `dtype` elsewhere."""
    try:
        from tunery.models import quantized  # type: ignore[attr-defined]
    except ImportError:
        raise SystemExit("this version of tunery trains no quantised bases") from None
    bnb = quantized.bitsandbytes()
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not head:
            model.set_submodule(name, _nf4(bnb, layer, dtype, device))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                values = (
                    torch.ones(parameter.shape) if parameter.dim() == 1 else torch.empty(parameter.shape, device=device)
                )
                values = values if parameter.dim() == 1 else values.normal_(std=SPREAD)
                setattr(module, name, nn.Parameter(values.to(device, dtype), requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    model.requires_grad_(False).eval()
    quantized.make_ready(model, dtype)
    return model


def _nf4(bnb: Any, layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    values = torch.empty(layer.weight.shape, dtype=dtype, device=device).normal_(std=SPREAD)
    made.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=True).to(device)
    return made


def recompute(model: Any) -> None:
    """Keep only each decoder layer's input. transformers recomputes layers that are in training mode."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True


def fits(trainer: Trainer, tokens: int) -> bool:
    """Whether a step over so many tokens is expected to fit beside the base with all activations kept."""
    model, device = trainer.model.model, trainer.model.device
    expected = estimate(
        model.config, parameters=0, trainable=trainer.trainable, dtype_bytes=model.dtype.itemsize,
        tokens_in_flight=tokens, trained_tokens=tokens, gradient_checkpointing=False,
        keys=0 if device.type == "cuda" else None, logit_chunk=logit_chunk(device.type), lean=Lean.of(model),
    )  # fmt: skip
    return expected.total <= ROOM * available_memory(device)


def main() -> None:
    """Train, a step at a time. The workload's base is a folder with a config.json and nothing else."""
    chosen = options(__doc__ or "")
    lines, work = Lines(), Workload.read(chosen.workload, precision=chosen.precision)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig.from_pretrained(work.base)
    model = random_nf4(config, getattr(torch, work.precision), device)
    trainer = Trainer(work, model)
    steps = rows_of(work)
    recomputing = not fits(trainer, max(sum(len(row.ids) for row in rows) for rows in steps))
    if recomputing:
        recompute(model)
    lines.ready(*PACKAGES, "bitsandbytes", trainable=trainer.trainable, dtype="nf4", recomputing=recomputing)
    for number, rows in enumerate(steps):
        lines.wait()
        started = time.perf_counter()
        result = trainer.step(number, rows)
        finish()
        lines.step(
            number, time.perf_counter() - started, result.loss, result.sums.data_tokens, result.sums.trained_tokens
        )
    lines.wait()


if __name__ == "__main__":
    main()
