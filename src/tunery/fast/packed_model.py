"""Running any decoder model on a packed sequence, after checking that it gives what running rows alone gives."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from tunery.data.batching import PackedBatch, Row, pack
from tunery.fast.attention import PackedLayout, flat, prepare_kernels
from tunery.fast.fused_layer import replace_attention, replace_layers
from tunery.fast.fused_linear import find_shared_inputs, fuse_lora, unfuse_lora
from tunery.fast.fused_mlp import replace_mlps
from tunery.fast.fused_rmsnorm import replace_norms
from tunery.fast.last_layer import LastLayer
from tunery.fast.replacement import restore_modules
from tunery.fast.shared_input import sharing
from tunery.fast.trial import relative_difference
from tunery.models.device import is_out_of_memory, on_device
from tunery.models.windows import layer_windows, visible_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest relative difference of logits that rounding explains; a wrong mask or position gives 0.3 and more."""


LAST_LAYER = "_tunery_last_layer"
"""Where a model keeps the hooks of its last layer, so that a second inspection does not put on another pair."""


@dataclass(frozen=True)
class OutputHead:
    """The output projection and what the model does to its logits: y = softcap(scale · (W x + b))."""

    layer: nn.Module
    scale: float
    softcap: float | None

    @property
    def frozen(self) -> nn.Linear | None:
        """The projection when no gradient reaches its weights, so that it can be fused with the loss; else None."""
        layer = self.layer
        plain = isinstance(layer, nn.Linear) and layer.weight.is_floating_point()  # a quantised weight is not
        return layer if plain and not layer.weight.requires_grad else None  # type: ignore[return-value]

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, d] → [S, V], float32 or wider."""
        return self.finish(self.layer(hidden))

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and soft-cap raw logits, in float32 or wider."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


@dataclass(frozen=True)
class PackedModel:
    """A causal language model and how its rows are computed.

    Attributes:
        model: any decoder model of transformers, adapters attached or not.
        flattened: rows run as one packed sequence; otherwise (models that mix rows in other ways, such as recurrent
            layers) one row at a time.
        head: the output projection when we can apply it ourselves; otherwise None, and the model computes logits.
        last_layer: computes only what is asked for, where the model allows that.
        kernels: whether the device's attention kernels are used.
    """

    model: PreTrainedModel
    flattened: bool
    head: OutputHead | None
    last_layer: LastLayer | None = None
    kernels: bool = True

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    @functools.cached_property
    def _windows(self) -> Counter[int | None]:
        return Counter(layer_windows(self.model.config))

    def visible_pairs(self, batch: PackedBatch) -> int:
        """Queries and keys that see each other, summed over the layers."""
        return visible_pairs(self._windows, batch)

    @property
    def last_layer_parameters(self) -> int:
        """Numbers of the base that are used at the predicting positions only."""
        return 0 if self.last_layer is None else self.last_layer.parameters

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Final hidden states at the predicting positions, [S, d]; needs `head`."""
        sources, inputs = self.tensor(batch.sources), self._inputs(batch)
        with self.running():
            if self.last_layer is not None:
                ids = inputs["input_ids"]
                assert isinstance(ids, Tensor)
                self.last_layer.only(sources, ids.squeeze(0))
            out = self.model.get_decoder()(**inputs)
        return out.last_hidden_state.squeeze(0).index_select(0, sources)

    def logits(self, batch: PackedBatch) -> Tensor:
        """Logits at the predicting positions as the model itself computes them, [S, V]."""
        sources = self.tensor(batch.sources)
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            return self._logits(batch, logits_to_keep=sources)
        return self._logits(batch).index_select(0, sources)

    def tensor(self, array: np.ndarray) -> Tensor:
        """A NumPy array on the model's device."""
        return on_device(array, self.device)

    def _inputs(self, batch: PackedBatch) -> dict[str, object]:
        inputs: dict[str, object] = {"input_ids": self.tensor(batch.ids)[None], "use_cache": False}
        if self.flattened:
            inputs["position_ids"] = self.tensor(batch.positions)[None]
            inputs["segments"] = PackedLayout(batch.groups, self.device, self.kernels)
        elif sum(len(group.lengths) for group in batch.groups) > 1:
            raise ValueError("this model takes one row at a time")
        return inputs

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within this context the model computes packed sequences; a backward pass that recomputes belongs inside."""
        last_layer = contextlib.nullcontext() if self.last_layer is None else self.last_layer.used()
        with sharing(), flat(self.model) if self.flattened else contextlib.nullcontext(), last_layer:
            yield

    def _logits(self, batch: PackedBatch, **more: Tensor) -> Tensor:
        inputs = self._inputs(batch)
        with self.running():
            if self.last_layer is not None:
                self.last_layer.only(None)
            return self.model(**inputs, **more).logits.squeeze(0)


def _transforms(config: PreTrainedConfig) -> tuple[float, float | None]:
    """What is known to happen to logits: a factor (Cohere, Granite) and a soft cap (Gemma)."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if divisor := getattr(config, "logits_scaling", None):
        scale /= float(divisor)
    cap = getattr(config, "final_logit_softcapping", None)
    return scale, float(cap) if cap else None


def probe_rows(config: PreTrainedConfig) -> list[Row]:
    """Three short rows with a shared prefix, all positions trained, for a model with this configuration."""
    vocabulary = min(config.get_text_config().vocab_size, 1000)
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, vocabulary, 12)
    rows = [np.concatenate([prefix, rng.integers(0, vocabulary, n)]).astype(np.int32) for n in (5, 9, 3)]
    return [Row(ids, np.concatenate([[0], np.ones(len(ids) - 1)]).astype(np.float32)) for ids in rows]


def _plain_logits(model: PreTrainedModel, row: Row) -> Tensor:
    ids = torch.from_numpy(row.ids[:-1].astype(np.int64)).to(model.device)
    return model(input_ids=ids[None], use_cache=False).logits[0]


@torch.no_grad()
def optimize_model(model: PreTrainedModel, kernels: bool = True) -> PackedModel:
    """Find out, by trying on three short rows, whether the model can run flattened and whether we can apply its head.

    The model runs as usual on each row, and our way on all three; logits must agree up to rounding (TOLERANCE).

    Args:
        kernels: use the device's attention kernels, which are tried here. An engine with attention of its own does
            without: on a GPU compiling them takes seconds.
    """
    rows = probe_rows(model.config)
    truth = [_plain_logits(model, row) for row in rows]
    fuse_lora(model)
    replace_norms(model)
    replace_mlps(model)
    replace_attention(model)
    replace_layers(model)
    find_shared_inputs(model, lambda: _plain_logits(model, rows[0]))
    allowed = TOLERANCE.get(model.dtype, 0.1)
    layer = model.get_output_embeddings()
    head = OutputHead(layer, *_transforms(model.config.get_text_config())) if layer is not None else None

    def differs(candidate: PackedModel, batches: Sequence[PackedBatch], expected: Sequence[Tensor]) -> float:
        worst = 0.0
        for batch, logits in zip(batches, expected, strict=True):
            got = (
                candidate.head.logits(candidate.hidden(batch))
                if candidate.head
                else candidate.logits(batch).to(logits.dtype)
            )
            worst = max(worst, relative_difference(got, logits))
        return worst

    merged = pack(rows)
    in_order = {
        (int(o), int(merged.positions[merged.sources[e]])): int(e)
        for o, e in zip(merged.owners, merged.entry, strict=True)
    }
    wanted = torch.empty(len(merged.sources), truth[0].shape[-1], dtype=truth[0].dtype, device=model.device)
    for (owner, position), source in in_order.items():
        wanted[source] = truth[owner][position]
    single = [pack([row]) for row in rows]

    def works(candidate: PackedModel, batches: Sequence[PackedBatch], expected: Sequence[Tensor]) -> bool:
        try:
            return differs(candidate, batches, expected) <= allowed
        except (TypeError, AttributeError, ValueError, KeyError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise  # says nothing about the model
            return False  # the model's class does not offer this way of running

    if kernels:
        prepare_kernels(model.device, lambda: works(PackedModel(model, True, None), [merged], [wanted]))
    for flattened, batches, expected in ((True, [merged], [wanted]), (False, single, truth)):
        for candidate_head in (head, None):
            candidate = PackedModel(model, flattened, candidate_head, kernels=kernels)
            if works(candidate, batches, expected):
                return _with_last_layer(candidate, works, merged, wanted) if flattened and candidate_head else candidate
    return PackedModel(model, False, None)


def restore_model(model: nn.Module) -> None:
    """Give a model back its own modules in place of those that `optimize_model` put there."""
    restore_modules(model)
    unfuse_lora(model)
    if (last_layer := getattr(model, LAST_LAYER, None)) is not None:
        last_layer.remove()
        delattr(model, LAST_LAYER)


def _with_last_layer(
    model: PackedModel,
    works: Callable[[PackedModel, Sequence[PackedBatch], Sequence[Tensor]], bool],
    batch: PackedBatch,
    logits: Tensor,
) -> PackedModel:
    """The same model whose last layer computes only the predicting positions, if asked for every third of them it
    still gives the right `logits` [S, V] there."""
    few = np.arange(0, len(batch.sources), 3)
    some = replace(batch, sources=batch.sources[few])
    if getattr(model.model, LAST_LAYER, None) is not None:
        getattr(model.model, LAST_LAYER).remove()
    candidate = replace(model, last_layer=LastLayer(model.model))
    assert candidate.last_layer is not None
    if candidate.last_layer and works(candidate, [some], [logits[torch.from_numpy(few).to(logits.device)]]):
        setattr(model.model, LAST_LAYER, candidate.last_layer)
        return candidate
    candidate.last_layer.remove()
    return model
