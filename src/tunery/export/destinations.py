"""What a destination refuses, known before any training or export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunery.config import Task
from tunery.errors import ConfigError, ModelError
from tunery.export.targets import DESTINATIONS
from tunery.export.targets.base import Destination
from tunery.jsonl import JsonObject
from tunery.lora.targets import plain_modules
from tunery.lora.variants import VARIANTS
from tunery.lora.variants.base import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Wanted:
    """An adapter that is there, or will be.

    Attributes:
        layers: the base's modules, on any device.
        adapted: full names of the layers it adapts.
        ranks, alphas: of those layers, as far as they differ.
        variant: of LoRA.
        lost: adapted weights that the base's files, as far as they are here, hold under no such name.
        system: the run's system message.
    """

    layers: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapted: Sequence[str]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    variant: Variant = VARIANTS["lora"]
    quantized: str | None = None
    lost: Sequence[str] = ()
    system: str | None = None

    @property
    def model_type(self) -> str:
        """transformers' name of the base's kind."""
        return self.layers.config.model_type

    @property
    def outer(self) -> list[str]:
        """Adapted layers that are the embedding or the output head."""
        outer = (self.layers.get_input_embeddings(), self.layers.get_output_embeddings())
        return [name for name, module in plain_modules(self.layers) if name in set(self.adapted) and module in outer]

    @property
    def tied(self) -> bool:
        """Embedding and head share their weight."""
        head, embedding = self.layers.get_output_embeddings(), self.layers.get_input_embeddings()
        return head is not None and embedding is not None and head.weight is embedding.weight


@dataclass(frozen=True)
class Finding:
    """One thing about a destination. `refused`: it will not work; else it works, with this in mind."""

    destination: str
    refused: bool
    message: str

    def as_dict(self) -> JsonObject:
        """For JSON."""
        return {"destination": self.destination, "refused": self.refused, "message": self.message}


def findings(destination: str, wanted: Wanted) -> list[Finding]:
    """What a destination refuses of an adapter, or needs to be told.

    Raises:
        ConfigError: there is no such destination.
    """
    remarks = destination_named(destination).all_remarks(wanted)
    return [Finding(destination, refused, message) for refused, message in remarks]


def destination_named(name: str) -> Destination:
    """A target, or another place of which it can be asked.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in DESTINATIONS:
        raise ConfigError(f"no destination {name!r} is known", f"known: {', '.join(DESTINATIONS)}")
    return DESTINATIONS[name]


def check_destinations(
    task: str | Path | Task | None, destinations: Sequence[str], overrides: Sequence[str] = (), **settings: object
) -> list[Finding]:
    """What the destinations refuse of the adapter that a task would train; nothing is trained, no weights are read.

    Raises:
        ConfigError: there is no such destination, or the task's base or targets cannot be found.
    """
    from tunery.lora.attach import lora_layers
    from tunery.models.load import empty_model, load_tokenizer, quantization_of
    from tunery.task_file import resolve_task
    from tunery.training.start import attach_adapter

    task = resolve_task(task, overrides, settings)
    for destination in destinations:
        destination_named(destination)
    adapted = empty_model(task.model)
    matched = attach_adapter(task, adapted).matched
    layouts = [layer.settings["default"] for layer in lora_layers(adapted).values()]
    layers = empty_model(task.model)
    quantized = quantization_of(task.model, layers.config, task.train.quantize)
    wanted = Wanted(
        layers,
        load_tokenizer(task.model),
        matched,
        tuple(sorted({s.rank for s in layouts})),
        tuple(sorted({s.alpha for s in layouts})),
        VARIANTS[layouts[0].variant],
        quantized,
        [] if quantized else _lost(task.model, layers, matched),
        task.data.system,
    )
    return [finding for destination in destinations for finding in findings(destination, wanted)]


def _lost(model: str, layers: PreTrainedModel, adapted: Sequence[str]) -> list[str]:
    """Adapted weights that the base's files hold under no such name; none where the files are not on this machine."""
    from tunery.export.weights import FileWeights, lost_weights
    from tunery.models.model_source import locate

    try:
        return lost_weights(FileWeights(locate(model, weights=False), layers), layers, adapted)
    except ModelError:
        return []
