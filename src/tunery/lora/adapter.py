"""Adapter folders in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors.

PEFT's names: "base_model.model.<module>.lora_A.weight" [rank, in] and "….lora_B.weight" [out, rank]; for embeddings
"….lora_embedding_A" [rank, vocabulary] and "….lora_embedding_B" [width, rank]. Other libraries and servers read them.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunery.config import VariantName
from tunery.errors import AdapterError
from tunery.jsonl import JsonMapping, JsonObject, is_object
from tunery.lora.attach import adapter_names, adapter_state, lora_layers, place, require_adapter
from tunery.lora.layer import LoRASettings, LoRATensors, check_name, wrap
from tunery.lora.targets import plain_modules
from tunery.lora.tensor_names import sort_tensors
from tunery.lora.variants import VARIANTS, variant_of
from tunery.models.model_source import shared_name
from tunery.models.typed import load_file, unwrapped
from tunery.paths import RunPaths, write_atomic, write_folder, write_json
from tunery.progress import Note, Say

T = TypeVar("T")

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_NEUTRAL = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "use_rslora",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",
    "eva_config",
    "runtime_config",
    "loftq_config",
    "corda_config",
    "lora_ga_config",
    "ensure_weight_tying",
    "lora_dtype",
    "lorap_lr_ratio",
    "lorap_emb_lr",
}
"""Fields of PEFT's configuration (the last three are ms-swift's) that a saved LoRA adapter may set and we honour, or
that only say how it was started or trained. Any other field that is set stands for a method that needs more than A and
B."""

_UNSET: tuple[object, ...] = (None, False, "none", {}, [])

_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is; the others (PiSSA, OLoRA, …) change its weights too."""

_AGAIN = "save or download the adapter again"


# --------------------------------------------------------------------------- writing


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default", base_model: str | None = None) -> None:
    """Write an adapter as a PEFT folder, whole or not at all. A folder of that name is replaced.

    Args:
        base_model: name or path of the base, for the configuration; left out, what the model was loaded from. It is
            written as others can resolve it, if they can (tunery.models.model_source.shared_name).

    Raises:
        AdapterError: there is no such adapter, or the folder holds something else than an adapter.
    """
    folder = Path(folder)
    require_adapter(model, name)
    keep_other_content(folder)
    write_folder(folder, lambda temporary: write_adapter_files(model, temporary, name, base_model))


def keep_other_content(folder: Path) -> None:
    """Refuse to replace what is not an adapter folder.

    Raises:
        AdapterError: the folder is a file, or holds something else than an adapter.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG_FILE).exists())):
        raise AdapterError(f"{folder} exists and is not an adapter folder; it is not replaced", "choose another folder")


def write_adapter_files(model: nn.Module, folder: Path, name: str = "default", base_model: str | None = None) -> None:
    """Write the two files of an adapter into a folder, each whole or not at all; other files there stay.

    Raises:
        AdapterError: there is no such adapter.
    """
    tensors = {key: t.detach().to("cpu", torch.float32).contiguous() for key, t in adapter_state(model, name).items()}
    write_atomic(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG_FILE, adapter_config(model, name, base_model))


def adapter_config(model: nn.Module, name: str = "default", base_model: str | None = None) -> JsonObject:
    """The content of adapter_config.json for an adapter that a model carries."""
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.settings}
    settings = {path: layer.settings[name] for path, layer in layers.items()}
    usual = usual_settings(model, name)
    rank, alpha = usual.rank, usual.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": shared_name(base_model or getattr(unwrapped(model), "name_or_path", None) or ""),
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": usual.dropout,
        "use_rslora": usual.rank_stabilized,
        **_peft_fields(usual.variant),
        "target_modules": _target_modules(model, list(layers)),
        "exclude_modules": None,
        "rank_pattern": {path: s.rank for path, s in settings.items() if s.rank != rank},
        "alpha_pattern": {path: _number(s.alpha) for path, s in settings.items() if s.alpha != alpha},
        "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in layers.values()),
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "auto_mapping": None,
    }


def _peft_fields(variant: VariantName) -> dict[str, object]:
    """The fields that say which variant an adapter is: those of all variants, unset but for its own."""
    unset = {key: False for other in VARIANTS.values() for key in other.peft}
    return {**unset, **VARIANTS[variant].peft}


def usual_settings(model: nn.Module, name: str = "default") -> LoRASettings:
    """The settings that most layers of an adapter have. As a rule all have the same; one that PEFT made may have
    exceptions (rank_pattern)."""
    return Counter(s for layer in lora_layers(model).values() if (s := layer.settings.get(name))).most_common(1)[0][0]


def _number(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() else alpha


def _target_modules(model: nn.Module, paths: list[str]) -> list[str]:
    """Leaf names if PEFT, which matches by the end of the name, then finds exactly these layers; else full names."""
    leaves = tuple(sorted({path.rsplit(".", 1)[-1] for path in paths}))
    endings = tuple(f".{leaf}" for leaf in leaves)
    named = {path for path, _ in plain_modules(model) if f".{path}".endswith(endings)}
    return list(leaves) if named == set(paths) else sorted(paths)


# --------------------------------------------------------------------------- reading


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default", trainable: bool = False) -> None:
    """Put the adapter of a folder (`read_adapter`) on a model and make it active. The base is frozen; nothing changes
    if anything is wrong.

    Args:
        trainable: see `place`.

    Raises:
        AdapterError: as `read_adapter`; or `name` is taken.
    """
    check_name(name)
    if name in adapter_names(model):
        raise AdapterError(f"the model already has an adapter named {name!r}", "load it under another name")
    place(model, name, read_adapter(dict(plain_modules(model)), folder), trainable=trainable)


def _warn(note: Note) -> None:
    warnings.warn(str(note), stacklevel=5)  # where tunery.load_adapter was called


def read_adapter(modules: Mapping[str, nn.Module], folder: str | Path, say: Say = _warn) -> dict[str, LoRATensors]:
    """An adapter folder's part in each layer that it adapts, by full module name in model order; nothing is changed.

    Args:
        modules: of the model as it is without adapters (`plain_modules`).
        folder: as tunery or PEFT writes it. Its tensors decide which layers are adapted.
        say: told of names that are not PEFT's (tunery.lora.tensor_names); left out, it is a warning of Python's.

    Raises:
        AdapterError: the folder cannot be read, does not fit the model, or is of a method that is not known here.
    """
    folder = Path(folder)
    config, tensors = read_config(folder), _read_tensors(folder)
    found = sort_tensors(tensors, modules, variant_of(config), folder)
    if remark := found.remark:
        say(Note(remark, code="renamed-tensors"))
    return {
        path: _checked(path, module, found.layers[path], _settings(config, path, folder), folder)
        for path, module in modules.items()
        if path in found.layers
    }


def read_config(folder: Path) -> JsonObject:
    """The content of adapter_config.json.

    Raises:
        AdapterError: it is missing or unreadable, or stands for a method that is not known here.
    """
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = RunPaths(folder).adapter
        hint = f"did you mean {inside}?" if (inside / CONFIG_FILE).exists() else "name a folder that holds one"
        raise AdapterError(f"no adapter at {folder}: {CONFIG_FILE} is missing", hint) from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file} cannot be read: {error}", _AGAIN) from None
    if not is_object(config):
        raise AdapterError(f"{file} holds no settings, but a {type(config).__name__}", _AGAIN)
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{folder} is an adapter of type {config.get('peft_type')!r}, not LORA", "tunery reads LoRA adapters only"
        )
    neutral = _NEUTRAL | set(variant_of(config).peft)
    strange = [key for key, value in config.items() if key not in neutral and value not in _UNSET]
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        strange.append("init_lora_weights")
    if strange:
        used = ", ".join(f"{key}: {json.dumps(config[key])}" for key in strange)
        raise AdapterError(
            f"{folder} is an adapter of a method that is not known here; it uses {used}",
            f"merge it into its base with peft, which knows the method, and take {merged_folder(folder)} as model:\n"
            + "\n".join(f"    {line}" for line in lines_to_merge(folder)),
        )
    return config


def merged_folder(folder: Path) -> Path:
    """Where `lines_to_merge` put the merged model."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.with_name(f"{named.name}-merged")


def lines_to_merge(folder: Path) -> tuple[str, str]:
    """Two lines of Python that merge an adapter of any of PEFT's methods into its base, which the adapter names."""
    here, there = repr(str(folder)), repr(str(merged_folder(folder)))
    # peft widens the embedding for the tokenizer that lies beside an adapter
    tokenizer = here if (folder / "tokenizer_config.json").is_file() else "model.name_or_path"
    return (
        f"import peft, transformers; model = peft.AutoPeftModelForCausalLM.from_pretrained({here}).merge_and_unload()",
        f"model.save_pretrained({there}); "
        f"transformers.AutoTokenizer.from_pretrained({tokenizer}).save_pretrained({there})",
    )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS_FILE
    if not file.exists():
        if (folder / "adapter_model.bin").exists():
            raise AdapterError(
                f"{folder} holds adapter_model.bin, a pickle file, which can run any code when it is opened",
                "if you trust it, convert it once: PeftModel.from_pretrained(base, FOLDER).save_pretrained(NEW_FOLDER)",
            )
        raise AdapterError(f"{file} is missing", _AGAIN)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} cannot be read: {error}", _AGAIN) from None


def _settings(config: JsonMapping, path: str, folder: Path) -> LoRASettings:
    """Rank and alpha of one layer, with the exceptions of rank_pattern and alpha_pattern (regular expressions)."""
    try:
        settings = LoRASettings(
            rank=int(_by_pattern(config.get("rank_pattern"), path, config["r"])),
            alpha=float(_by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])),
            dropout=float(config.get("lora_dropout") or 0.0),
            rank_stabilized=bool(config.get("use_rslora")),
            variant=variant_of(config).name,
        )
        if settings.rank < 1 or not math.isfinite(settings.alpha) or not 0 <= settings.dropout < 1:
            raise ValueError(settings)
        return settings
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        raise AdapterError(
            f"{folder / CONFIG_FILE} gives no sound settings for {path}: {type(error).__name__} {error}", _AGAIN
        ) from None


def _by_pattern(patterns: Mapping[str, T] | None, path: str, default: T) -> T:
    """The value of the first pattern that matches the name, or its end from a dot on (PEFT's rule)."""
    return next((v for pattern, v in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", path)), default)


def _checked(
    path: str, module: nn.Module, own: Mapping[str, Tensor], settings: LoRASettings, folder: Path
) -> LoRATensors:
    layer = wrap(module)
    extra = VARIANTS[settings.variant].tensors
    shapes = {"A": (settings.rank, layer.in_features), "B": (layer.out_features, settings.rank)}
    shapes |= dict.fromkeys(extra, (layer.out_features,))
    for name, shape in shapes.items():
        if tuple(own[name].shape) != shape:
            raise AdapterError(
                f"{folder} does not fit this model: {name} of {path} is {list(own[name].shape)}, not {list(shape)}",
                "load it on the base it was trained on",
            )
        if not torch.isfinite(own[name]).all():
            raise AdapterError(f"{folder}: {name} of {path} holds values that are not finite", _AGAIN)
    return LoRATensors(settings, own["A"], own["B"], {name: own[name] for name in extra})
