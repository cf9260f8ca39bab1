"""Loading a base model: from a built-in name, a folder, a .gguf file or a hub id to a frozen model on its device.

Safetensors only, and no code from the model's repository is ever run.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from tunery.errors import ConfigError, ModelError
from tunery.jsonl import JsonObject
from tunery.models import quantized
from tunery.models.device import PrecisionProbe, available_memory, bound_kernel_caches, pick_device, resolve_dtype
from tunery.models.hf_logging import first_line, quiet
from tunery.models.model_source import ModelSource, locate
from tunery.models.templates import ensure_template
from tunery.models.typed import text_config
from tunery.text import gigabytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""Files are already on disk when transformers is asked for them."""


@dataclass(frozen=True)
class BaseInfo:
    """Which base model it is; part of the receipt.

    Attributes:
        name: as given in the task.
        source: what that stands for: a folder, a file, or "owner/name@revision".
        sha256: of the weights (tunery.models.model_source.ModelSource.sha256).
        architecture: the model's class.
        parameters: their number, tied ones counted once.
        dtype: dtype of the weights in memory, such as "bfloat16".
        device: where they lie, such as "cpu" or "cuda:0".
        license: as the model states it, or None.
        quantization: how the linear layers are stored: "nf4", "int8" (or "fp4"); None for `dtype`.
        template_source: "model", or "tunery plain" (tunery.models.templates).
        file_type: of the weights in the GGUF file that they were read from ("Q4_1"); None for safetensors.
    """

    name: str
    source: str
    sha256: str
    architecture: str
    parameters: int
    dtype: str
    device: str
    license: str | None
    quantization: str | None
    template_source: str
    file_type: str | None = None


@dataclass(frozen=True)
class Base:
    """A frozen base model: in evaluation mode, without gradients, with a tokenizer that has a chat template.

    Attributes:
        probe: what chose the dtype; None when the task named one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: BaseInfo
    probe: PrecisionProbe | None = None


def load_base(spec: str, *, precision: str = "auto", device: str = "auto", quantize: str = "none") -> Base:
    """Load a base model.

    Args:
        spec: a built-in name, a folder, a .gguf file, or a hub id (owner/name).
        precision: "auto", "float32", "bfloat16", "float64", or "float16" (to be evaluated; it is not trained in).
        device: "auto", "cpu", "cuda" or "mps".
        quantize: "none", "nf4" or "int8" (tunery.models.quantized); a base that is stored so already stays so.

    Raises:
        ModelError: the model cannot be found or reached, or is not one that can be trained here; the message says why.
        ConfigError: the device is not there, or cannot compute in that dtype; or bitsandbytes is missing.
    """
    bound_kernel_caches()
    place = pick_device(device)
    config = load_config(spec)  # may refuse the model before gigabytes of it are fetched
    source = locate(spec)
    numbers = source.count_weights()
    tokenizer, template_source = _read_tokenizer(source)
    dtype, probe = resolve_dtype(precision, place)
    stored = quantization_of(spec, config, quantize)
    if stored is None:
        _check_room(spec, numbers * dtype.itemsize, place)
        model = _read_model(source, config, dtype, **_straight_to(place))
    else:
        model = _read_quantized(source, config, dtype, stored, place)
    check_vocabulary(spec, tokenizer, model)
    model.requires_grad_(False).eval()
    if stored is None:
        model.to(place)  # type: ignore[arg-type]
    # How answers are drawn is the caller's to choose; `generate` would fill what is left open from the model's own.
    model.generation_config = GenerationConfig()
    info = BaseInfo(
        name=spec,
        source=source.origin,
        sha256=source.sha256(),
        architecture=type(model).__name__,
        parameters=sum(quantized.numel(p) for p in model.parameters()),
        dtype=str(dtype).removeprefix("torch."),
        device=str(model.device),
        license=source.license,
        quantization=stored,
        template_source=template_source,
        file_type=source.file_type,
    )
    return Base(model, tokenizer, info, probe)


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone, exactly as `load_base` gives it; no weights are fetched from the hub.

    Raises:
        ModelError: as `load_base`.
    """
    return _read_tokenizer(locate(spec, weights=False))[0]


def load_config(spec: str) -> PreTrainedConfig:
    """The model's configuration alone; no weights are fetched from the hub.

    Raises:
        ModelError: as `load_base`.
    """
    return _read_config(locate(spec, weights=False))


def empty_model(spec: str) -> PreTrainedModel:
    """The model's layers without memory for their weights (PyTorch's "meta" device), frozen: for counting and matching.

    Raises:
        ModelError: as `load_base`.
    """
    return _without_weights(load_config(spec))


def quantization_of(spec: str, config: PreTrainedConfig, quantize: str) -> str | None:
    """How the linear layers will be stored under `train.quantize`: "nf4", "int8" (or "fp4"), or None.

    Raises:
        ModelError: the base is stored in another way already.
        ConfigError: bitsandbytes is needed and missing.
    """
    stored = quantized.stored_quantization(config)
    if stored and quantize not in ("none", stored):
        raise ModelError(f"{spec} is quantised already ({stored})", f"train.quantize: {quantize} needs a plain base")
    if stored or quantize != "none":
        quantized.bitsandbytes()
    return stored or (None if quantize == "none" else quantize)


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **attention_settings(config))
    return model.requires_grad_(False).eval()


def random_model(config: PreTrainedConfig, layers: int, dtype: torch.dtype, most: int) -> PreTrainedModel | None:
    """The first layers of a model with random weights, frozen, on the CPU: to see how fast it computes.

    Returns:
        None where it would have more than `most` weights, or cannot be made so short.
    """
    short = copy.deepcopy(config)
    text = text_config(short)
    whole = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(cast("list[object]", value)) == whole:  # a setting for each layer
            setattr(text, name, value[:layers])
    text.num_hidden_layers = min(layers, whole)
    try:
        if sum(p.numel() for p in _without_weights(short).parameters()) > most:
            return None
        with quiet(), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(
                short, trust_remote_code=False, dtype=dtype, **attention_settings(short)
            )
    except (ValueError, TypeError, AttributeError, IndexError, KeyError):  # settings that speak of the other layers
        return None
    return model.requires_grad_(False).eval()


# --------------------------------------------------------------------------- parts


def _read_config(source: ModelSource) -> PreTrainedConfig:
    try:
        with quiet():
            raw, _ = transformers.PreTrainedConfig.get_config_dict(source.folder, local_files_only=True)
            _check_kind(source.name, raw)
            config = AutoConfig.from_pretrained(source.folder, **_LOCAL)
    except ModelError:
        raise
    except Exception as error:  # whatever a foreign config.json makes transformers raise
        raise ModelError(f"{source.name}: config.json cannot be used: {first_line(error)}", _AGAIN) from error
    _check_decoder(source.name, config)
    return config


_AGAIN = "copy or download the model again"


def _check_kind(name: str, raw: JsonObject) -> None:
    """Refuse what transformers would need foreign code or other libraries for."""
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        if raw.get("auto_map"):
            raise ModelError(
                f"{name} needs code from its own repository, and tunery never runs such code",
                "choose a model that transformers knows, such as Qwen/Qwen3-0.6B",
            )
        unknown = f"is of a kind that transformers {transformers.__version__} does not know ({kind})"
        what = unknown if kind else "does not say its model_type in config.json"
        raise ModelError(f"{name} {what}", "a newer transformers may know it")
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "quantised") if isinstance(quantization, dict) else "quantised"
        if method == "bitsandbytes":
            return
        raise ModelError(
            f"{name} holds quantised weights ({method}), which cannot be trained here",
            "use the release of the model that is not quantised (bfloat16), with train.quantize: nf4 to save memory, "
            "or a .gguf file",
        )


def _check_decoder(name: str, config: PreTrainedConfig) -> None:
    """Refuse encoders (BERT) and encoder-decoders (T5): a language model that reads from left to right is needed."""
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or encoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{name} is not a decoder language model (its type is {config.model_type})",
            "choose a model that writes text from left to right: Llama, Qwen, Gemma, Mistral, Phi, GPT-2, …",
        )


def _read_tokenizer(source: ModelSource) -> tuple[PreTrainedTokenizerBase, str]:
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.folder, **_LOCAL)
    except Exception as error:  # whatever foreign tokenizer files make the libraries raise
        raise ModelError(f"the tokenizer of {source.name} cannot be loaded: {first_line(error)}", _AGAIN) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{source.name} has only a slow tokenizer ({type(tokenizer).__name__}), which cannot tell a token's place",
            "put a tokenizer.json made with the `tokenizers` library beside its config.json",
        )
    return tokenizer, ensure_template(tokenizer)


def attention_settings(config: PreTrainedConfig) -> dict[str, str]:
    """Which of transformers' attention functions a model is to be loaded with; {} leaves it to transformers.

    scaled_dot_product_attention, its own choice, knows no soft cap of the scores (Gemma 2, arXiv:2408.00118, section
    2): transformers 5.17 loads such a model with it all the same, and leaves the cap out in silence.
    """
    return {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}


def _straight_to(place: torch.device) -> dict[str, dict[str, int]]:
    """With these settings weights are read file by file onto a GPU, with no copy of the model in main memory."""
    return {"device_map": {"": place.index or 0}} if place.type == "cuda" else {}


def _read_quantized(
    source: ModelSource, config: PreTrainedConfig, dtype: torch.dtype, stored: str, place: torch.device
) -> PreTrainedModel:
    """A base whose linear layers are quantised while they are read, or are so on disk."""
    if dtype == torch.float64:
        raise ConfigError(f"a quantised base ({stored}) does not compute in float64", "use float32, bfloat16 or auto")
    _check_room(source.name, quantized.expected_bytes(_without_weights(config), stored, dtype.itemsize), place)
    more: dict[str, object] = {"device_map": {"": place}}
    if quantized.stored_quantization(config) is None:
        more["quantization_config"] = quantized.load_settings(stored, dtype)
    model = _read_model(source, config, dtype, **more)
    quantized.make_ready(model, dtype)
    return model


def _read_model(source: ModelSource, config: PreTrainedConfig, dtype: torch.dtype, **more: object) -> PreTrainedModel:
    try:
        with quiet():
            loaded = AutoModelForCausalLM.from_pretrained(
                source.folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **_LOCAL,
                **attention_settings(config),
                **more,
            )
    except Exception as error:  # whatever foreign weights make the libraries raise
        raise ModelError(f"{source.name} cannot be loaded: {first_line(error)}", _AGAIN) from error
    # what `output_loading_info` gives, which no annotation says
    model, report = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the weights of {source.name} lack {len(missing)} tensors that {type(model).__name__} needs "
            f"({', '.join(missing[:3])}), which would stay random",
            "its config.json does not fit its weights; copy or download the model again",
        )
    return model


def _check_room(spec: str, needed: int, place: torch.device) -> None:
    """Refuse a model that memory cannot hold, before the operating system ends the process.

    On its way to a GPU other than CUDA's a model passes through main memory.
    """
    way = () if _straight_to(place) else (torch.device("cpu"),)
    for device in dict.fromkeys((*way, place)):
        if needed > (free := available_memory(device)):
            raise ModelError(
                f"{spec} needs {gigabytes(needed)} of memory and {gigabytes(free)} are free on {device}",
                "close other programs, use --set train.precision=bfloat16, or choose a smaller model",
            )


def check_vocabulary(spec: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse a tokenizer with tokens that the embedding has no row for.

    Some releases carry a control token beyond the embedding that no text model ever sees (Gemma 3's image token); that
    does no harm as long as the chat template does not write it.

    Args:
        model: with or without memory for its weights.

    Raises:
        ModelError: there are such tokens.
    """
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    control, template = set(tokenizer.all_special_tokens), str(tokenizer.chat_template)
    if harmful := sorted(token for token in beyond if token not in control or token in template):
        raise ModelError(
            f"the tokenizer of {spec} has {len(tokenizer):,} tokens and the model only {rows:,}: "
            f"{', '.join(harmful[:3])} would have no meaning",
            "use the tokenizer that belongs to the model, or resize the model's embedding and save it",
        )
