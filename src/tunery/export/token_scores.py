"""What a model says at the answer tokens of some rows, computed in float32, and how far two models are apart there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunery.export.targets.base import KNOWN, POSITIONS, TIE, Limits
from tunery.lora.layer import LoRAEmbedding, can_wrap
from tunery.models.quantized import is_quantized

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TINY = 1e-9
"""Probability below which the rest of a vocabulary counts as nothing."""


@dataclass(frozen=True)
class Probe:
    """A row and the places in it where models are compared.

    Attributes:
        ids: the row's tokens.
        at: ascending; at t the token ids[t] is predicted from ids[:t].
        prompt: tokens before the first trained one.
    """

    ids: tuple[int, ...]
    at: tuple[int, ...]
    prompt: int
    where: str = ""


def make_probe(ids: Sequence[int], trained: Sequence[int], where: str = "", positions: int = POSITIONS) -> Probe:
    """A row with at most `positions` of its trained places, evenly chosen, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(trained) - 1, min(positions, len(trained))).round().astype(int))
    return Probe(tuple(map(int, ids)), tuple(int(trained[i]) for i in chosen), int(trained[0]), where)


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities in nats at P places, one after another over all probes.

    Attributes:
        target: of the row's own token. float64 [P].
        best: the most likely token. int64 [P].
        ids: tokens whose log-probability is known. int64 [P, K].
        known: it; NaN where it is not known after all. float64 [P, K].
    """

    target: np.ndarray
    best: np.ndarray
    ids: np.ndarray
    known: np.ndarray


@torch.no_grad()
def score(model: PreTrainedModel | PeftModel, probes: Sequence[Probe], at: TokenScores | None = None) -> TokenScores:
    """What a causal language model of transformers says at the probes' places; rows run one at a time.

    Args:
        at: take the log-probabilities of the same tokens as these; left out, of the KNOWN most likely ones.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    done = 0
    for probe in probes:
        ids = torch.tensor([probe.ids[: probe.at[-1]]], device=model.device)
        places = torch.tensor(probe.at, device=model.device) - 1
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0]
        logs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        targets = torch.tensor([probe.ids[t] for t in probe.at], device=model.device)
        if at is None:
            known, tokens = logs.topk(min(KNOWN, logs.shape[-1]), dim=-1)
        else:
            tokens = torch.as_tensor(at.ids[done : done + len(places)], device=model.device)
            known = logs.gather(1, tokens)
        target = logs.gather(1, targets[:, None])[:, 0]
        parts.append(tuple(t.double().cpu().numpy() for t in (target, logs.argmax(dim=-1), tokens, known)))
        done += len(places)
    target, best, tokens, known = (np.concatenate(column) for column in zip(*parts, strict=True))
    return TokenScores(target, best.astype(np.int64), tokens.astype(np.int64), known)


@dataclass(frozen=True)
class Difference:
    """How far an exported model is from the tuned one; see Limits for the words.

    Attributes:
        same_choice: share of positions with exactly the same most likely token.
        agreement: the same, where a token that is nearly as likely to the tuned model counts too.
    """

    positions: int
    mean: float
    maximum: float
    kl: float
    kl_max: float
    same_choice: float
    agreement: float

    def as_dict(self) -> dict[str, float | int]:
        """For export.json."""
        return {
            "positions": self.positions,
            "mean_difference": self.mean,
            "max_difference": self.maximum,
            "kl": self.kl,
            "kl_max": self.kl_max,
            "same_choice": self.same_choice,
            "agreement": self.agreement,
        }

    def beyond(self, limits: Limits) -> list[str]:
        """What is outside the limits, in words."""
        found = [
            f"{name} {value:.3g} (limit {limit:g})"
            for name, value, limit in (
                ("mean difference of log-probabilities", self.mean, limits.mean),
                ("largest difference of log-probabilities", self.maximum, limits.maximum),
                ("KL(tuned ‖ exported)", self.kl, limits.kl),
            )
            if not value <= limit
        ]
        if not self.agreement >= limits.agreement:
            found.append(
                f"same first choice, near ties counted, at {self.agreement:.1%} of positions "
                f"(limit {limits.agreement:.0%})"
            )
        return found


def compare(tuned: TokenScores, exported: TokenScores) -> Difference:
    """Two models at the same places.

    Args:
        tuned: with the log-probabilities of its most likely tokens.
        exported: with those of the same tokens, as far as they are known.
    """
    gaps = np.abs(tuned.target - exported.target)
    divergence = _divergence(tuned.known, exported.known)
    top = tuned.known.max(axis=1)
    chosen = np.where(tuned.ids == exported.best[:, None], tuned.known, -np.inf).max(axis=1)
    same = tuned.best == exported.best
    return Difference(
        positions=len(gaps),
        mean=float(gaps.mean()),
        maximum=float(gaps.max()),
        kl=float(divergence.mean()),
        kl_max=float(divergence.max()),
        same_choice=float(same.mean()),
        agreement=float((same | (chosen >= top - TIE)).mean()),
    )


def _divergence(p_logs: np.ndarray, q_logs: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) of each row, over the tokens known of both, all others as one. float64 [P]

    Joining tokens never makes a divergence larger, so it is not more than the true one.
    """
    both = ~np.isnan(q_logs)
    p = np.where(both, np.exp(p_logs), 0.0)
    q = np.where(both, np.exp(np.where(both, q_logs, 0.0)), 0.0)
    listed = np.where(both, p * (p_logs - np.where(both, q_logs, 0.0)), 0.0).sum(axis=1)
    p_rest, q_rest = 1.0 - p.sum(axis=1), 1.0 - q.sum(axis=1)
    counts = p_rest > TINY
    rest = np.where(counts, p_rest, 1.0) * np.log(np.where(counts, p_rest, 1.0) / np.maximum(q_rest, TINY))
    return np.maximum(listed + np.where(counts, rest, 0.0), 0.0)


# --------------------------------------------------------------------------- computing in float32

WIDE = torch.float32

PART = 1 << 23
"""Weights widened at a time."""


@contextlib.contextmanager
def compute_in_float32(model: nn.Module) -> Iterator[None]:
    """Within this context every layer of a model takes and gives float32, whatever its weights are stored in. For
    evaluation only; afterwards the model is as it was.

    Two models are compared by what their weights say, not by how a product in 16 bits happens to be rounded: in
    bfloat16 an answer's log-probability moves with the order of a sum. Widening the whole model would take twice its
    memory, so every layer's weight is widened when its turn comes, a large one part by part.
    """
    with contextlib.ExitStack() as undo:
        for module in list(model.modules()):
            _widen_module(module, undo)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if (type(child) is nn.Linear or type(child) is Conv1D) and _has_narrow(child):
                    _set(parent, name, _WideLinear(child), undo)
        for layer in model.modules():
            if isinstance(layer, LoRAEmbedding):
                scale = float(getattr(layer.base, "scalar_embed_scale", layer.output_scale))
                _set(layer, "output_scale", scale, undo)
        yield


def _widen_module(module: nn.Module, undo: contextlib.ExitStack) -> None:
    """What a single layer needs, but for those that a _WideLinear replaces."""
    if is_quantized(module):
        _set(module, "compute_dtype", WIDE, undo)
        return
    if isinstance(module, nn.Embedding) and hasattr(module, "scalar_embed_scale"):
        _set(module, "embed_scale", _exact_scale(module), undo)
    if not _has_narrow(module) or type(module) in (nn.Linear, Conv1D):
        return
    if isinstance(module, nn.Embedding) and can_wrap(module):  # its input is what is looked up
        before = module.register_forward_pre_hook(_widen_rows, with_kwargs=True)
    else:
        before = module.register_forward_pre_hook(_widen)
    undo.callback(before.remove)
    undo.callback(module.register_forward_hook(_restore).remove)


def _set(owner: object, name: str, value: object, undo: contextlib.ExitStack) -> None:
    """Set an attribute, and have it set back."""
    if hasattr(owner, name):
        undo.callback(setattr, owner, name, getattr(owner, name))
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def _has_narrow(module: nn.Module) -> bool:
    return any(_narrow(p) for p in module.parameters(recurse=False))


def _narrow(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.dtype != WIDE


def _exact_scale(module: nn.Embedding) -> Tensor:
    """Some bases multiply an embedding's rows by a number, which their own format has rounded."""
    return torch.tensor(module.scalar_embed_scale, dtype=WIDE, device=module.weight.device)


class _WideLinear(nn.Module):
    """y = W x + b in float32, W [out, in] (or [in, out], GPT-2's Conv1D) widened part by part."""

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        super().__init__()
        self.layer = layer
        self.flipped = isinstance(layer, Conv1D)
        self.training = layer.training

    @property
    def weight(self) -> Tensor:
        """The layer's own."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's own."""
        return self.layer.bias

    @property
    def in_features(self) -> int:
        """Numbers that go in."""
        return self.weight.shape[0 if self.flipped else 1]

    @property
    def out_features(self) -> int:
        """Numbers that come out."""
        return self.weight.shape[1 if self.flipped else 0]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        weight: Tensor = self.weight.detach()
        if self.flipped:
            weight = weight.t()
        step = max(1, PART // weight.shape[1])
        parts = [F.linear(x.to(WIDE), part.to(WIDE)) for part in weight.split(step)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias.detach().to(WIDE)


def _widen(module: nn.Module, _: object) -> None:
    stored = {name: p.data for name, p in module.named_parameters(recurse=False)}
    module.__dict__["_stored"] = stored
    for name, parameter in module.named_parameters(recurse=False):
        if _narrow(parameter):
            parameter.data = stored[name].to(WIDE)


def _widen_rows(
    module: nn.Embedding, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> tuple[tuple[Tensor], dict[str, Tensor]]:
    """Of an embedding's table only the rows that are looked up; the ids become places among them."""
    ids = args[0] if args else kwargs["input"]
    used, places = torch.unique(ids, return_inverse=True)
    module.__dict__["_stored"] = {"weight": module.weight.data}
    module.__dict__["_padding"] = module.padding_idx
    module.padding_idx = None
    module.weight.data = module.weight.data[used].to(WIDE)
    return (places.view(ids.shape),), {}


def _restore(module: nn.Module, _: object, output: object) -> None:
    stored = module.__dict__.pop("_stored")
    for name, parameter in module.named_parameters(recurse=False):
        parameter.data = stored[name]
    if "_padding" in module.__dict__:
        module.padding_idx = module.__dict__.pop("_padding")
