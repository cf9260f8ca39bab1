"""Attention blocks and decoder layers of the common form, put in the place of a model's own.

transformers' attention calls its rotation by name, so the block around it is replaced: its layers stay the model's own,
and so does the attention function, which transformers' public interface hands out. What is replaced is first run beside
the model's own on random numbers, with an attention function that shows what it is given, and left alone if anything
differs. So no architecture is named here.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunery.fast.fused_rmsnorm import FusedRMSNorm
from tunery.fast.islands import rotate
from tunery.fast.replacement import Replacement, replace_modules
from tunery.fast.trial import relative_difference
from tunery.models.autograd import Context

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig

    class AttentionBlock(nn.Module):
        """What is used of a model's own attention block; `_fused_attention` looks whether it is there."""

        config: PreTrainedConfig
        head_dim: int
        q_proj: nn.Linear
        o_proj: nn.Linear

    class DecoderLayer(nn.Module):
        """What is used of a model's own decoder layer; `_has_layer_form` looks whether it is there."""

        input_layernorm: FusedRMSNorm
        self_attn: AttentionBlock


AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""Of transformers' attention interface."""

SHOWN = "tunery_shown"
"""Name of the attention function that shows what it is given."""

_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest relative difference to the model's own block that rounding explains; 0.02 in half precision."""

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")

_BEFORE, _BETWEEN = "input_layernorm", "post_attention_layernorm"
_SANDWICH = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


class _RotationContext(Context, Protocol):
    turn: tuple[Tensor, Tensor]


class _Rotation(torch.autograd.Function):
    """Only cos and sin are kept: the gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: _RotationContext, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.turn = cos, sin  # shared by all layers, and changed by none
        return rotate(q, k, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: _RotationContext, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*rotate(dq, dk, *ctx.turn, -1), None, None)


class _Around(Replacement):
    """A module in the place of another, with that one's children and attributes."""

    def __init__(self, origin: nn.Module) -> None:
        super().__init__()
        for name, child in origin.named_children():
            setattr(self, name, child)
        self.in_place_of(origin)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not self._origin:  # while it is copied, nothing is there yet
                raise
            return getattr(self._origin[0], name)


class FusedAttention(_Around):
    """Projections, norms of heads if there are any, rotation, attention by transformers' interface, and the output.

    Args:
        options: what the model's own block tells the attention function, besides what it was told itself.
    """

    head_dim: int
    config: PreTrainedConfig
    layer_idx: int
    attention_dropout: float

    def __init__(self, origin: AttentionBlock, options: dict[str, object]) -> None:
        super().__init__(origin)
        # held here, because looking through to the model's own block takes time
        self.head_dim, self.config = origin.head_dim, origin.config
        self.options = options
        self._by_itself: AttentionFunction = vars(sys.modules[type(origin).__module__])["eager_attention_forward"]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """[rows, T, width] → ([rows, T, width], attention weights if the attention function returns any)."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        layers: dict[str, Any] = self._modules
        q, k, v = (layers[name](hidden_states).view(shape) for name in ("q_proj", "k_proj", "v_proj"))
        if "q_norm" in layers:
            q, k = layers["q_norm"](q), layers["k_norm"](k)
        cos, sin = (x.unsqueeze(2) for x in position_embeddings)
        q, k = _Rotation.apply(q, k, cos, sin)  # type: ignore[misc]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        name = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, self._by_itself)  # type: ignore[arg-type]  # None too
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, **self.options, **kwargs)
        return layers["o_proj"](out.reshape(*hidden_states.shape[:-1], -1)), weights


class FusedDecoderLayer(_Around, GradientCheckpointingLayer):
    """x + attention(norm(x)), and that + mlp(norm(that)); with norms before and after both, or before only."""

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        """[rows, T, width] → [rows, T, width]."""
        layers: dict[str, Any] = self._modules
        x, inside = layers[_BEFORE].beside(hidden_states)
        inside, _ = layers["self_attn"](hidden_states=inside, **kwargs)
        if _SANDWICH[0] in layers:
            before, after = (layers[name] for name in _SANDWICH)
            x, inside = before.beside(x, layers[_BETWEEN](inside))
            return x + after(layers["mlp"](inside))
        x, inside = layers[_BETWEEN].beside(x, inside)
        return x + layers["mlp"](inside)


# --------------------------------------------------------------------------- replacing


def replace_attention(model: nn.Module) -> int:
    """Put FusedAttention in the place of every attention block that it reproduces; returns how many. Each is tried,
    since layers of one class may differ in their window or rotation."""
    return replace_modules(model, lambda block: _fused_attention(block, _dtype(model)))


def replace_layers(model: nn.Module) -> int:
    """Put FusedDecoderLayer in place of every decoder layer that it reproduces; returns how many. To be called after
    tunery.fast.fused_rmsnorm.replace_norms. Every class is tried once."""
    known: dict[type, bool] = {}

    def fused(layer: nn.Module) -> FusedDecoderLayer | None:
        if not _has_layer_form(layer):
            return None
        made, kind = FusedDecoderLayer(layer), type(layer)
        if kind not in known:
            known[kind] = _same_layer(cast("DecoderLayer", layer), made, _dtype(model))
        return made if known[kind] else None

    return replace_modules(model, fused)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _untouched(module: nn.Module) -> bool:
    """Without hooks of somebody's, and with memory for its weights."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in module.__dict__
    return not hooks and not any(p.is_meta for p in module.parameters())


# --------------------------------------------------------------------------- trying


_shown: list[tuple[tuple[Tensor, ...], dict[str, object]]] = []


def _show(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: object
) -> tuple[Tensor, None]:
    _shown.append(((query, key, value), options))
    fold = query.shape[1] // key.shape[1]
    out = query + 2 * key.repeat_interleave(fold, 1) + 3 * value.repeat_interleave(fold, 1)
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(SHOWN, _show)


@contextlib.contextmanager
def _showing(config: PreTrainedConfig) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = SHOWN
    try:
        yield
    finally:
        config._attn_implementation = before
        _shown.clear()


def _inputs(width: int, head: int, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, width, generator=random).to(device, dtype)
    angles = torch.rand(1, 6, head // 2, generator=random).mul_(6).repeat(1, 1, 2)
    turn = tuple(t.to(device, dtype) for t in (angles.cos(), angles.sin()))
    return {"hidden_states": x, "position_embeddings": turn, "attention_mask": None}


def _close(got: Tensor, wanted: Tensor) -> bool:
    return got.shape == wanted.shape and relative_difference(got, wanted) <= _ROUNDING.get(wanted.dtype, 0.02)


@torch.no_grad()
def _fused_attention(block: nn.Module, dtype: torch.dtype) -> FusedAttention | None:
    """A FusedAttention for this block, if that gives the attention function the same as the block does, and makes the
    same of what it returns."""
    children = set(dict(block.named_children()))
    if children - {*_HEAD_NORMS} != {*_PROJECTIONS} or len(children) == len(_PROJECTIONS) + 1:
        return None
    if isinstance(block, FusedAttention) or not _untouched(block) or not hasattr(block, "config"):
        return None
    block = cast("AttentionBlock", block)
    try:
        with _showing(block.config):
            weight = block.o_proj.weight
            inputs = _inputs(block.q_proj.in_features, block.head_dim, weight.device, dtype)
            wanted, _ = block(**inputs)
            ((theirs, options),) = _shown
            options = {name: value for name, value in options.items() if name != "dropout"}
            if not all(value is None or isinstance(value, bool | int | float) for value in options.values()):
                return None
            made = FusedAttention(block, options)
            _shown.clear()
            got, _ = made(**inputs)
            ((ours, _),) = _shown
            same = all(_close(a, b) for a, b in zip((got, *ours), (wanted, *theirs), strict=True))
            float(made.attention_dropout)
    except Exception:  # whatever a foreign block may ask for
        return None
    return made if same else None


def _has_layer_form(layer: nn.Module) -> bool:
    children = dict(layer.named_children())
    norms = [name for name in (_BEFORE, _BETWEEN, *_SANDWICH) if name in children]
    return (
        isinstance(layer, GradientCheckpointingLayer)
        and not isinstance(layer, FusedDecoderLayer)
        and set(children) == {"self_attn", "mlp", *norms}
        and norms in ([_BEFORE, _BETWEEN], [_BEFORE, _BETWEEN, *_SANDWICH])
        and all(isinstance(children[name], FusedRMSNorm) for name in norms)
        and not list(layer.parameters(recurse=False))
        and _untouched(layer)
    )


@torch.no_grad()
def _same_layer(layer: DecoderLayer, made: FusedDecoderLayer, dtype: torch.dtype) -> bool:
    try:
        with _showing(layer.self_attn.config):
            norm = layer.input_layernorm.weight
            inputs = _inputs(len(norm), layer.self_attn.head_dim, norm.device, dtype)
            wanted, got = layer(**inputs), made(**inputs)
            return isinstance(wanted, Tensor) and _close(got, wanted)
    except Exception:  # whatever a foreign layer may ask for
        return False
