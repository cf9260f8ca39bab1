"""Variants of LoRA. A new one is a file here, an entry below and a name in tunery.config."""

from __future__ import annotations

from collections.abc import Mapping

from tunery.config import VariantName
from tunery.jsonl import JsonMapping
from tunery.lora.variants.base import Variant
from tunery.lora.variants.dora import DoRA
from tunery.lora.variants.lora import LoRA

VARIANTS: Mapping[VariantName, Variant] = {variant.name: variant for variant in (LoRA(), DoRA())}


def variant_of(config: JsonMapping) -> Variant:
    """The variant that an adapter_config.json stands for; plain LoRA where no field of another one is set."""
    told = (v for v in VARIANTS.values() if v.peft and all(config.get(key) == value for key, value in v.peft.items()))
    return next(told, VARIANTS["lora"])
