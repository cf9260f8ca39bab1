"""Bases whose linear layers hold 4-bit or 8-bit weights, through the bitsandbytes library (`pip install bitsandbytes`).

NF4 (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, sections 3 and 4): blocks of 64 weights share a scale, and each
weight is one of 16 values that suit a normal distribution; the scales are stored in 8 bits themselves ("double
quantisation"). int8 (Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, section 2): one scale for each row.
Only the storage changes: every product is taken with the weights unpacked to the dtype of the run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunery.errors import ConfigError, NotInstalledError
from tunery.jsonl import JsonObject
from tunery.models.autograd import Context
from tunery.versions import install_command

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

    # What is used of bitsandbytes, which has no types.

    class QuantState:
        """The scales of a 4-bit weight."""

        absmax: Tensor
        shape: torch.Size
        state2: QuantState | None

    class MatmulState:
        """The scale [out] of an 8-bit weight that has been used."""

        SCB: Tensor

    class QuantizedWeight(nn.Parameter):
        """Codes, with `quant_state` (4 bits) or a scale [out] (8 bits)."""

        quant_state: QuantState | None
        SCB: Tensor | None

    class QuantizedLayer(nn.Module):
        """A linear layer; `source_cls` is the class it was written as."""

        in_features: int
        out_features: int
        weight: QuantizedWeight
        bias: nn.Parameter | None
        compute_dtype: torch.dtype | None
        state: MatmulState
        source_cls: type[nn.Module]


NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight is 4 bits; 64 of them share a scale of 8 bits; 256 of those share one of 32 bits."""


def installed() -> bool:
    """Whether bitsandbytes can be imported; it is not imported for that."""
    return "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is not None


def bitsandbytes() -> ModuleType:
    """The library.

    Where the package `kernels` is installed as well, bitsandbytes fetches compiled code from the Hugging Face hub while
    it is imported, and runs it. tunery runs no code from there, so that package is out of sight meanwhile.

    Raises:
        ConfigError: it is not installed, or does not work here.
    """
    if (loaded := sys.modules.get("bitsandbytes")) is not None:
        return loaded
    if not installed():
        raise NotInstalledError(
            "a quantised base (train.quantize) needs the library bitsandbytes, which is not installed",
            install_command("quantized"),
        )
    log, hidden = logging.getLogger("bitsandbytes"), "kernels" not in sys.modules
    level = log.level
    log.setLevel(logging.ERROR)
    if hidden:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bitsandbytes")
    except Exception as error:  # whatever a build for another system raises
        raise ConfigError(f"bitsandbytes does not work here: {error}", "pip install --upgrade bitsandbytes") from error
    finally:
        log.setLevel(level)
        if hidden:
            del sys.modules["kernels"]


def load_settings(quantize: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers is told, to quantise a base while it loads; embedding and output head stay as they are.

    Args:
        quantize: "nf4" or "int8".
        dtype: of everything else, and of the products.
    """
    from transformers import BitsAndBytesConfig

    bitsandbytes()
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def stored_quantization(config: PreTrainedConfig | JsonObject) -> str | None:
    """How a base's own files are quantised, by its configuration: "nf4", "fp4", "int8", or None.

    Args:
        config: transformers' configuration, or the content of config.json.
    """
    stated = (
        config.get("quantization_config") if isinstance(config, dict) else getattr(config, "quantization_config", None)
    )
    if stated is None:
        return None
    facts = stated if isinstance(stated, dict) else stated.to_dict()
    if facts.get("load_in_8bit") or facts.get("_load_in_8bit"):
        return "int8"
    return str(facts.get("bnb_4bit_quant_type") or "fp4")


def make_ready(model: nn.Module, dtype: torch.dtype) -> None:
    """Have every quantised layer of a loaded model compute as training needs it, in evaluation too.

    bitsandbytes decides by a layer's training mode. Outside it, its 4-bit layer on a CPU repacks its weight in place,
    for a product that has no gradient; its 8-bit layer rounds the inputs to 8 bits as well, with scales and exceptions
    that depend on the other rows of the batch. Here base and tuned model, training and evaluation, one row and many
    give the same numbers.
    """
    for name, module in list(quantized_layers(model)):
        if hasattr(module.weight, "quant_state"):
            module.compute_dtype = dtype
            module.register_forward_pre_hook(_in_training_mode)
        else:
            model.set_submodule(name, _weight_only(module, dtype))


def _in_training_mode(module: nn.Module, _: object) -> None:
    module.training = True


class _Int8Context(Context, Protocol):
    weight: tuple[Tensor, Tensor]


class _Int8Product(torch.autograd.Function):
    """y = x Wᵀ for W [out, in] = diag(scale / 127) · codes, unpacked for each product and never kept."""

    @staticmethod
    def forward(ctx: _Int8Context, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = codes, scale  # buffers that nothing changes
        return nn.functional.linear(x, _unpack_int8(codes, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: _Int8Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,), (codes, scale) = gradients, ctx.weight
        return grad @ _unpack_int8(codes, scale, grad.dtype), None, None, None


def _unpack_int8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype).mul_((scale / 127)[:, None])  # multiplied in float32, rounded once


@functools.cache
def _int8_class() -> Callable[..., QuantizedLayer]:
    class Int8Linear(bitsandbytes().nn.Linear8bitLt):
        """bitsandbytes' 8-bit layer, whose products use the inputs as they are."""

        def forward(self, x: Tensor) -> Tensor:
            """x [..., in] → [..., out]."""
            return _Int8Product.apply(x, self.weight, _int8_scale(self), self.bias)  # type: ignore[return-value]

    return Int8Linear


def _weight_only(module: QuantizedLayer, dtype: torch.dtype) -> nn.Module:
    """An Int8Linear with the tensors of bitsandbytes' layer."""
    made = _int8_class()(
        module.in_features, module.out_features, module.bias is not None, has_fp16_weights=False, device="meta"
    )
    made.weight, made.bias = module.weight, module.bias
    made.compute_dtype = dtype
    made.state, made.source_cls = module.state, getattr(module, "source_cls", nn.Linear)
    return made.train(module.training)


def _int8_scale(module: QuantizedLayer) -> Tensor:
    scale = module.weight.SCB
    return module.state.SCB if scale is None else scale


# --------------------------------------------------------------------------- facts about layers


def is_quantized(module: nn.Module) -> TypeGuard[QuantizedLayer]:
    """Whether a layer, itself and not one inside it, holds its weight in one of bitsandbytes' formats."""
    return type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params")


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """The quantised layers of a model, by full name."""
    return ((name, module) for name, module in model.named_modules() if is_quantized(module))


def numel(parameter: Tensor) -> int:
    """How many weights a parameter stands for; a packed one holds fewer numbers."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a quantised layer's products."""
    return getattr(module, "compute_dtype", None) or torch.float32


@torch.no_grad()
def unpacked_weight(module: QuantizedLayer) -> Tensor:
    """A quantised layer's weight [out, in] in float32: what its products use, but for rounding to their format."""
    weight = module.weight
    if getattr(weight, "quant_state", None) is None:
        return _unpack_int8(weight.data, _int8_scale(module), torch.float32)
    return bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state).to(torch.float32)


def unpacking(module: QuantizedLayer, dtype: torch.dtype) -> Callable[[], Tensor] | None:
    """A function that makes a quantised layer's weight [out, in] for one product in `dtype`, as the layer itself does;
    None where the layer does more than multiply by it, or computes in another dtype."""
    weight = module.weight
    foreign = any(hook is not _in_training_mode for hook in module._forward_pre_hooks.values())
    if foreign or module._forward_hooks or compute_dtype(module) != dtype:
        return None
    if (state := getattr(weight, "quant_state", None)) is not None:
        return lambda: bitsandbytes().functional.dequantize_4bit(weight.data, state).to(dtype)
    if type(module).__name__ == "Int8Linear":
        return lambda: _unpack_int8(weight.data, _int8_scale(module), dtype)
    return None


def plain_layer(module: QuantizedLayer, weight: Tensor) -> nn.Module:
    """An unquantised layer of the kind the model was written with, holding `weight` [out, in]."""
    width, out = module.in_features, module.out_features
    if getattr(module, "source_cls", nn.Linear) is Conv1D:
        plain: Conv1D | nn.Linear = Conv1D(out, width)
        weight = weight.t().contiguous()
    else:
        plain = nn.Linear(width, out, bias=module.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().clone())
    return plain.train(module.training)


# --------------------------------------------------------------------------- memory


def expected_bytes(model: PreTrainedModel, quantize: str | None, dtype_bytes: int) -> int:
    """Memory that a base will take, from its layers (on any device, also without memory for their weights).

    Args:
        model: not quantised.
        quantize: "nf4", "fp4", "int8", or None and "none" for a base as it is.
        dtype_bytes: of a number that is not quantised.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    total = dtype_bytes * sum(p.numel() for p in frozen)
    if quantize in (None, "none"):
        return total
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    layers = [m for m in linear if type(m) in (nn.Linear, Conv1D)]
    sizes = [layer.weight.numel() for layer in layers]
    rows = sum(layer.weight.shape[1 if isinstance(layer, Conv1D) else 0] for layer in layers)
    packed = sum(sizes) + 4 * rows if quantize == "int8" else int(NF4_BYTES * sum(sizes))
    return total - dtype_bytes * sum(sizes) + packed + dtype_bytes * max(sizes, default=0)


def held_bytes(model: nn.Module, dtype_bytes: int) -> int:
    """Memory that the frozen weights of a loaded model take, with room to unpack the largest quantised layer."""
    seen = {id(p): p for p in model.parameters() if not p.requires_grad}
    scales = [t for _, layer in quantized_layers(model) for t in _scales(layer)]
    total = sum(t.numel() * t.element_size() for t in (*seen.values(), *scales))
    largest = max((numel(layer.weight) for _, layer in quantized_layers(model)), default=0)
    return total + dtype_bytes * largest


def _scales(layer: QuantizedLayer) -> list[Tensor]:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return [_int8_scale(layer)]
    return [state.absmax] if state.state2 is None else [state.absmax, state.state2.absmax]
