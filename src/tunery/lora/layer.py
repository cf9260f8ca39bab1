"""The LoRA layer: a frozen weight and a trained low-rank update beside it.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1. For a frozen weight
W [out, in], two thin matrices are trained, A [rank, in] and B [out, rank]:

    y = W x + b + s · B A x        s = alpha / rank

A starts random and B at zero, so training starts from the base model exactly. The rank-stabilised scaling
s = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732) keeps the update's size independent of the rank.

The frozen layer is kept untouched as the submodule `base`; with no active adapter the wrapper returns `base(x)`, bit
for bit. One wrapper holds any number of named adapters, of which one is active.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunery.config import VariantName
from tunery.errors import AdapterError
from tunery.lora.dropout import Dropout
from tunery.lora.variants import VARIANTS
from tunery.lora.variants.base import Extra, Update, Variant
from tunery.lora.variants.lora import add_up, delta_weight
from tunery.models.quantized import is_quantized, unpacked_weight
from tunery.models.typed import hook_state_dict


@dataclass(frozen=True)
class LoRASettings:
    """What one adapter is in one layer: its width, the strength of its update, and the dropout before it."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rank_stabilized: bool = False
    variant: VariantName = "lora"

    @property
    def scaling(self) -> float:
        """s in y = W x + s · B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@dataclass(frozen=True)
class LoRATensors:
    """An adapter's part in one layer: A [rank, in], B [out, rank], and what its variant has besides."""

    settings: LoRASettings
    A: Tensor
    B: Tensor
    extra: Extra = field(default_factory=dict[str, Tensor])


def check_name(name: str) -> None:
    """Refuse an adapter name that cannot be a parameter's name.

    Raises:
        AdapterError: it holds other characters than letters, digits, dash and underscore, or PyTorch uses it itself.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ParameterDict, name):
        raise AdapterError(
            f"{name!r} cannot name an adapter", "use letters, digits, dashes and underscores, for example support-v2"
        )


class LoRALayer(nn.Module):
    """What LoRALinear and LoRAEmbedding share: a frozen `base` and, by adapter name, A, B and their settings.

    A state dict shows the base's tensors under their own names ("q_proj.weight", not "q_proj.base.weight") with the
    adapters' beside them ("q_proj.lora_A.default"). So code that saves, reloads or ties a model's weights works on.

    Attributes:
        active: name of the adapter that `forward` adds, or None.
        settings: by adapter name.
        extra: by the name of a further tensor of a variant (Variant.tensors), by adapter name.
    """

    kinds = ("lora_A.weight", "lora_B.weight")
    """How PEFT's files call A and B."""

    output_scale = 1.0
    """What the base multiplies its output by, and the update with it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.extra = nn.ModuleDict()
        self.settings: dict[str, LoRASettings] = {}
        self.dropouts: dict[str, Dropout] = {}
        self.active: str | None = None
        self.training = base.training
        hook_state_dict(self, _hide_base, _find_base)

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        # transformers ties weights by assigning `lm_head.weight = …`
        if name in ("weight", "bias") and "base" in self.__dict__.get("_modules", ()):
            setattr(self.base, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def weight(self) -> Tensor:
        """The base's own weight, without any adapter."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's own bias, or None."""
        return getattr(self.base, "bias", None)

    @property
    def in_features(self) -> int:
        """Columns of A: what goes in (for an embedding, the vocabulary)."""
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        """Rows of B: what comes out."""
        raise NotImplementedError

    @property
    def scaling(self) -> dict[str, float]:
        """s, by adapter name."""
        return {name: settings.scaling for name, settings in self.settings.items()}

    def initial(self, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Untrained A [rank, in] and B [out, rank], float32 on the CPU."""
        raise NotImplementedError

    def variant(self, name: str) -> Variant:
        """Of an adapter."""
        return VARIANTS[self.settings[name].variant]

    def update(self, name: str) -> Update:
        """An adapter's tensors in this layer."""
        return Update(self.lora_A[name], self.lora_B[name], self.settings[name].scaling, self._extra(name))

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The same by PEFT's names within the layer ("lora_A.weight")."""
        return {**dict(zip(self.kinds, (self.lora_A[name], self.lora_B[name]), strict=True)), **self._extra(name)}

    def _extra(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's further tensors, by name."""
        return {key: self._holder(key)[name] for key in self.variant(name).tensors}

    def _holder(self, key: str) -> nn.ParameterDict:
        """One further tensor of a variant, by adapter name."""
        holder = self.extra[key]
        assert isinstance(holder, nn.ParameterDict)
        return holder

    def _holders(self) -> list[nn.ParameterDict]:
        """All tensors, by adapter name."""
        return [self.lora_A, self.lora_B, *map(self._holder, self.extra)]

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """`weight`, in the layout of the base's, with an adapter in it: at least float32."""
        raise NotImplementedError

    def add(self, name: str, tensors: LoRATensors, dropout: Dropout, trainable: bool = True) -> None:
        """Hold a further adapter.

        Args:
            trainable: its tensors collect gradients.

        They are copied to the base's device as float32 (float64 when the base is float64).
        """
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        self.settings[name], self.dropouts[name] = tensors.settings, dropout
        extra = tensors.extra
        if missing := [key for key in self.variant(name).tensors if key not in extra]:
            started = self.variant(name).start(self.dense_weight())
            extra = {**extra, **{key: started[key] for key in missing}}
        holders = [(self.lora_A, tensors.A), (self.lora_B, tensors.B)]
        for key, tensor in extra.items():
            if key not in self.extra:
                self.extra[key] = nn.ParameterDict()
            holders.append((self._holder(key), tensor))
        for holder, tensor in holders:
            copy = tensor.detach().to(self.weight.device, dtype, copy=True).contiguous()
            holder[name] = nn.Parameter(copy, requires_grad=trainable)

    def dense_weight(self) -> Tensor:
        """The base's weight [out, in], unpacked where it is quantised, at least float32."""
        raise NotImplementedError

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The tensors of all adapters."""
        return [parameter for holder in self._holders() for parameter in holder.values()]

    def discard(self, name: str) -> None:
        """Forget an adapter that this layer may hold."""
        for held in (*self._holders(), self.settings, self.dropouts):
            if name in held:
                del held[name]
        if self.active == name:
            self.active = None

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: rank {s.rank}, scaling {s.scaling:g}" for name, s in self.settings.items())


class LoRALinear(LoRALayer):
    """y = base(x) + s · B A dropout(x), around nn.Linear or GPT-2's Conv1D (a linear layer that stores [in, out])."""

    @property
    def in_features(self) -> int:
        return self.base.nx if isinstance(self.base, Conv1D) else self.base.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.base.nf if isinstance(self.base, Conv1D) else self.base.out_features  # type: ignore[return-value]

    def initial(self, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A uniform within ±1/sqrt(in) (Kaiming with a = sqrt(5), PyTorch's own start for a linear layer), B zero."""
        A = torch.empty(rank, self.in_features, dtype=torch.float32)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        return A, torch.zeros(self.out_features, rank, dtype=torch.float32)

    @property
    def flipped(self) -> bool:
        """The base stores its weight as [in, out]."""
        return getattr(self.base, "flipped", isinstance(self.base, Conv1D))

    def dense_weight(self) -> Tensor:
        weight = unpacked_weight(self.base) if is_quantized(self.base) else self.weight
        weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        return weight.t() if self.flipped else weight

    def merged(self, name: str, weight: Tensor) -> Tensor:
        update = self.update(name)
        weight = weight.to(update.A.dtype)
        if self.flipped:
            return self.variant(name).merged(weight.t(), update).t()
        return self.variant(name).merged(weight, update)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in the dtype of the base's output."""
        return self.base(x) if (name := self.active) is None else self.variant(name).output(self, x, name)


class LoRAEmbedding(LoRALayer):
    """Row i of the table plus s · B A[:, i], around nn.Embedding. A is [rank, vocabulary], B [width, rank].

    There is no dropout: the input is an index. The scale that some bases put on their output (Gemma 3) is put on the
    update too.
    """

    kinds = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__(base)
        scale = getattr(base, "embed_scale", 1.0)
        if isinstance(scale, Tensor) and scale.is_meta:  # a model without memory; the number itself is kept beside
            scale = getattr(base, "scalar_embed_scale", 1.0)
        self.output_scale = float(torch.as_tensor(scale).to(base.weight.dtype))

    @property
    def in_features(self) -> int:
        return self.base.num_embeddings  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.base.embedding_dim  # type: ignore[return-value]

    @property
    def num_embeddings(self) -> int:
        """Size of the vocabulary."""
        return self.in_features

    @property
    def embedding_dim(self) -> int:
        """Width of a row."""
        return self.out_features

    @property
    def padding_idx(self) -> int | None:
        """The base's own."""
        return self.base.padding_idx  # type: ignore[return-value]

    def initial(self, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A zero, B standard normal: only rows of tokens that occur are ever moved."""
        A = torch.zeros(rank, self.in_features, dtype=torch.float32)
        return A, torch.randn(self.out_features, rank, dtype=torch.float32, generator=generator)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        update = self.update(name)
        return weight.to(update.A.dtype) + delta_weight(update.B.t(), update.A.t(), update.scaling)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] → [..., width], in the dtype of the table."""
        y = self.base(ids)
        if (name := self.active) is None:
            return y
        # No padding_idx here: where pad is also the end token, its update must be trained.
        h = F.embedding(ids, self.lora_A[name].t())
        return add_up(y, h, self.lora_B[name], self.settings[name].scaling * self.output_scale)


def can_wrap(module: nn.Module) -> bool:
    """Whether LoRA can stand beside this module.

    Linear layers, Conv1D and embeddings whose output is the table's row, scaled or not.
    """
    if isinstance(module, nn.Embedding):
        plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return plain and module.max_norm is None
    return isinstance(module, nn.Linear | Conv1D)


def wrap(module: nn.Module) -> LoRALayer:
    """A wrapper without adapters around a module that `can_wrap`."""
    return LoRAEmbedding(module) if isinstance(module, nn.Embedding) else LoRALinear(module)


def _hide_base(layer: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: object) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}base.")]:
        state[prefix + key.removeprefix(f"{prefix}base.")] = state.pop(key)


def _find_base(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    own = (f"{prefix}lora_A.", f"{prefix}lora_B.", f"{prefix}extra.")
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(own)]:
        state[f"{prefix}base.{key.removeprefix(prefix)}"] = state.pop(key)
