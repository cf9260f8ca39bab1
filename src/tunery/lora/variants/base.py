"""What a LoRA variant is. Each is one file beside this one, and an entry of tunery.lora.variants.VARIANTS."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from tunery.config import VariantName

if TYPE_CHECKING:
    from tunery.lora.layer import LoRALinear

Extra = Mapping[str, Tensor]
"""What a variant trains in a layer besides A and B, by PEFT's name (Variant.tensors)."""


@dataclass(frozen=True)
class Update:
    """An adapter's tensors in one layer: A [rank, in], B [out, rank], the scaling s, and the variant's own."""

    A: Tensor
    B: Tensor
    scaling: float
    extra: Extra = field(default_factory=dict[str, Tensor])


class Variant(ABC):
    """How A and B change a linear layer y = W x + b.

    Attributes:
        name: in `lora.variant`.
        title: for messages.
        tensors: PEFT's names of what is trained in a layer besides A and B; each is a vector [out], given its first
            values by `start`.
        additive: the weight is W + s · B A and nothing else. Fused layers (tunery.fast), servers of many adapters and
            adapters in GGUF files then compute just that, and do not call `output` and `merged`.
        embeddings: it can adapt an embedding, whose layer (tunery.lora.layer.LoRAEmbedding) adds s · B A too.
        peft: fields of adapter_config.json that say so.
    """

    name: ClassVar[VariantName]
    title: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]] = ()
    additive: ClassVar[bool] = False
    embeddings: ClassVar[bool] = False
    peft: ClassVar[Mapping[str, object]] = {}

    def start(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of a fresh adapter besides A and B, whose product is zero then.

        Args:
            weight: W [out, in], float32 or wider.
        """
        return {}

    @abstractmethod
    def output(self, layer: LoRALinear, x: Tensor, name: str) -> Tensor:
        """x [..., in] → [..., out], in the dtype of the base's output, with the adapter `name` on.

        Not called while no adapter is active.
        """

    @abstractmethod
    def merged(self, weight: Tensor, update: Update) -> Tensor:
        """W with the update in it, [out, in]; `weight` is float32 or wider. Rows depend on their own rows only: of W, B
        and the variant's own tensors."""
