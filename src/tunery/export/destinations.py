"""What a destination refuses, known before any training or export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.config import Task
from tunery.errors import ConfigError, ModelError
from tunery.lora.targets import plain_modules

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank; an adapter may have any rank up to it."""

VLLM_DEFAULT_RANK = 16

VLLM_OUTER = ("llama", "mistral")
"""Model types for which vLLM applies an update of the embedding or the head (its pull request 33234)."""

VLLM_WITHOUT_LORA = ("gpt2",)
"""Model types that vLLM serves without adapters."""


@dataclass(frozen=True)
class Wanted:
    """An adapter that is there, or will be.

    Attributes:
        layers: the base's modules, on any device.
        adapted: full names of the layers it adapts.
        ranks, alphas: of those layers, as far as they differ.
        lost: adapted weights that the base's files, as far as they are here, hold under no such name.
        system: the run's system message.
    """

    layers: Any
    tokenizer: Any
    adapted: Sequence[str]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
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

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"destination": self.destination, "refused": self.refused, "message": self.message}


def _vllm(wanted: Wanted) -> list[tuple[bool, str]]:
    found = []
    rank = max(wanted.ranks)
    if rank > VLLM_RANKS[-1]:
        found.append((True, f"rank {rank} is above {VLLM_RANKS[-1]}, the most that vLLM takes: lower lora.rank"))
    elif rank > VLLM_DEFAULT_RANK:
        room = next(r for r in VLLM_RANKS if r >= rank)
        found.append((False, f"vLLM needs --max-lora-rank {room} for rank {rank} (its default is {VLLM_DEFAULT_RANK})"))
    if len(wanted.ranks) > 1 or len(wanted.alphas) > 1:
        found.append((True, "vLLM takes one rank and one alpha for all layers of an adapter: use --to merged"))
    if wanted.outer:
        names = ", ".join(wanted.outer)
        sure = wanted.model_type in VLLM_OUTER
        some = f"vLLM applies updates of {names} for a few kinds of models only ({', '.join(VLLM_OUTER)})"
        found.append((not sure, f"{some}: leave them out of lora.targets, or use --to merged"))
    if wanted.model_type in VLLM_WITHOUT_LORA:
        found.append((True, f"vLLM serves {wanted.model_type} models without adapters: use --to merged"))
    if wanted.quantized:
        found.append((False, f"the adapter is trained on a base in {wanted.quantized}; serve it on the same"))
    return found


def _merged(wanted: Wanted) -> list[tuple[bool, str]]:
    if not wanted.lost:
        return []
    return [(True, f"the base's files do not hold {wanted.lost[0]} under that name, so the adapter cannot be merged "
                   "into them: merge in memory instead, with tunery.merge(model).save_pretrained(FOLDER)")]  # fmt: skip


def _gguf(wanted: Wanted) -> list[tuple[bool, str]]:
    from tunery.export.gguf_names import architecture_of
    from tunery.export.gguf_tokenizer import read_vocabulary

    found = _merged(wanted)
    try:
        architecture = architecture_of(wanted.layers.config)
        if not architecture.head and wanted.outer:
            found.append((True, f"llama.cpp ties the embedding and head of {architecture.name} models: leave "
                                f"{', '.join(wanted.outer)} out of lora.targets"))  # fmt: skip
        read_vocabulary(wanted.tokenizer, wanted.layers.get_input_embeddings().weight.shape[0])
    except ConfigError as error:
        found.append((True, f"{error.message}: {error.hint}" if error.hint else error.message))
    return found


def _gguf_adapter(wanted: Wanted) -> list[tuple[bool, str]]:
    found = _gguf(wanted)
    if wanted.tied and wanted.outer:
        names = ", ".join(wanted.outer)
        found.append((True, f"embedding and head are one tensor in a GGUF file of this base, so an update of {names} "
                            "alone cannot be applied: leave it out of lora.targets, or use --to gguf"))  # fmt: skip
    if wanted.quantized:
        found.append((False, f"the adapter is trained on a base in {wanted.quantized}; a GGUF file of the base in "
                             "another number format answers a little differently"))  # fmt: skip
    return found


def _ollama(wanted: Wanted) -> list[tuple[bool, str]]:
    from tunery.data.render import Renderer
    from tunery.export.ollama import find_pieces, unsayable

    found = _gguf(wanted)
    renderer = Renderer(wanted.tokenizer)
    if words := unsayable(renderer, wanted.system):
        found.append((True, f"{words}: use --to gguf"))
    if wanted.tokenizer.chat_template and find_pieces(renderer) is None:
        found.append((True, "the chat template does more than a Modelfile's template can say: use --to gguf"))
    return found


def _nothing(wanted: Wanted) -> list[tuple[bool, str]]:
    return []


DESTINATIONS: dict[str, Callable[[Wanted], list[tuple[bool, str]]]] = {
    "peft": _nothing,
    "hub": _nothing,  # it gets the adapter, unless --content says otherwise
    "merged": _merged,
    "vllm": _vllm,
    "gguf": _gguf,
    "gguf-adapter": _gguf_adapter,
    "ollama": _ollama,
}
"""What is known of each destination."""


def findings(destination: str, wanted: Wanted) -> list[Finding]:
    """What a destination refuses of an adapter, or needs to be told.

    Raises:
        ConfigError: there is no such destination.
    """
    if destination not in DESTINATIONS:
        raise ConfigError(f"no destination {destination!r} is known", f"known: {', '.join(DESTINATIONS)}")
    return [Finding(destination, refused, message) for refused, message in DESTINATIONS[destination](wanted)]


def check_destinations(
    task: str | Path | Task, destinations: Sequence[str], overrides: Sequence[str] = ()
) -> list[Finding]:
    """What the destinations refuse of the adapter that a task would train; nothing is trained, no weights are read.

    Raises:
        ConfigError: there is no such destination, or the task's base or targets cannot be found.
    """
    from tunery.lora.attach import lora_layers
    from tunery.models.load import empty_model, load_tokenizer, quantization_of
    from tunery.task_file import load_task
    from tunery.training.start import attach_adapter

    task = task if isinstance(task, Task) else load_task(task, overrides)
    for destination in destinations:
        if destination not in DESTINATIONS:
            raise ConfigError(f"no destination {destination!r} is known", f"known: {', '.join(DESTINATIONS)}")
    adapted = empty_model(task.model)
    matched = attach_adapter(task, "chat", adapted).matched
    settings = [layer.settings["default"] for layer in lora_layers(adapted).values()]
    layers = empty_model(task.model)
    quantized = quantization_of(task.model, layers.config, task.train.quantize)
    wanted = Wanted(
        layers, load_tokenizer(task.model), matched, tuple(sorted({s.rank for s in settings})),
        tuple(sorted({s.alpha for s in settings})),
        quantized, [] if quantized else _lost(task.model, layers, matched), task.data.system,
    )  # fmt: skip
    return [finding for destination in destinations for finding in findings(destination, wanted)]


def _lost(model: str, layers: Any, adapted: Sequence[str]) -> list[str]:
    """Adapted weights that the base's files hold under no such name; none where the files are not on this machine."""
    from tunery.export.weights import FileWeights, lost_weights
    from tunery.models.source import locate

    try:
        return lost_weights(FileWeights(locate(model, weights=False), layers), layers, adapted)
    except ModelError:
        return []
