"""An export is loaded back by the program it is for, and compared with the adapter in tunery."""

from __future__ import annotations

import functools
import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch

from tunery.config import TEMPLATED_KINDS
from tunery.errors import AdapterError, ConfigError
from tunery.export.exact import compute_in_float32
from tunery.export.gguf_model import plan, write_model
from tunery.export.gguf_names import architecture_of
from tunery.export.gguf_types import NUMBERS
from tunery.export.layers import Kept, kept_in_adapter, kept_in_gguf, kept_in_layers, kept_in_model
from tunery.export.llama import Answers, as_scores, ask_llama
from tunery.export.room import place_with_room
from tunery.export.sample import Sample
from tunery.export.scores import Scores, compare, score
from tunery.export.subject import Subject
from tunery.export.targets import LIMITS, RUNTIMES, Limits, limits_of
from tunery.export.tokens import AGAIN, check_tokenizer, same_text, same_tokens
from tunery.lora.attach import place, remove
from tunery.models.load import attention_settings, load_base
from tunery.models.quantized import bitsandbytes, installed
from tunery.models.quiet import quiet
from tunery.versions import install_command, version_of


@dataclass(frozen=True)
class Verdict:
    """What a comparison found; the content of export.json's "comparison".

    Attributes:
        runtime: the program and its version.
        kept: how much of each layer's update is there.
    """

    runtime: str
    difference: dict[str, float | int]
    limits: dict[str, float]
    prompts: int
    texts: int
    kept: Kept

    def as_dict(self) -> dict[str, Any]:
        """For export.json."""
        return {
            "runtime": self.runtime, "difference": self.difference, "limits": self.limits,
            "identical_prompts": self.prompts, "identical_texts": self.texts, "update": self.kept.as_dict(),
        }  # fmt: skip


def score_tuned(subject: Subject, sample: Sample, device: str) -> Scores:
    """What the adapter says in tunery: on the base as it is stored, computed in float32."""
    scores = _score_tuned(subject, sample, device)
    _give_back()
    return scores


def _score_tuned(subject: Subject, sample: Sample, device: str) -> Scores:
    model = subject.held if subject.held is not None else load_stored(subject, device)
    place(model, "export", subject.pieces, trainable=False)
    with compute_in_float32(model):
        scores = score(model, sample.probes)
    if subject.held is not None:
        remove(model, "export")
    return scores


def load_stored(subject: Subject, device: str) -> Any:
    """The base as its files hold it, or widened where tunery has no such format."""
    precision = subject.numbers if subject.numbers in ("bfloat16", "float16") else "float32"
    needed = subject.source.count_weights() * getattr(torch, precision).itemsize
    return load_base(subject.task.model, precision=precision, device=place_with_room(device, needed)).model


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def verify(
    subject: Subject, sample: Sample, tuned: Scores, form: str, numbers: str, folder: Path, device: str
) -> Verdict:
    """Load an export and compare.

    Args:
        tuned: what the adapter says in tunery.
        form: "peft", "merged", "gguf", "gguf-adapter" or "ollama".
        numbers: its number format.

    Raises:
        AdapterError: it differs by more than its limits, in its tokens, or an update is lost.
        ConfigError: the program that loads it is not installed.
    """
    check: Callable[..., Verdict] = {
        "peft": _verify_peft, "merged": _verify_merged, "gguf-adapter": _verify_gguf_adapter,
    }.get(form, _verify_gguf)  # fmt: skip
    return check(subject, sample, tuned, numbers, folder, device)


def require_runtime(form: str) -> None:
    """Make sure that the program for a format is installed.

    Raises:
        ConfigError: it is not.
    """
    from tunery.export.llama import require_llama

    if RUNTIMES[form] == "llama.cpp":
        require_llama()
    elif importlib.util.find_spec(RUNTIMES[form]) is None:
        raise ConfigError(
            "an adapter for PEFT is checked in PEFT, which is not installed",
            install_command("export"),
        )


def _judge(
    tuned: Scores, exported: Scores, limits: Limits, runtime: str, sample: Sample, kept: Kept, what: str
) -> Verdict:
    difference = compare(tuned, exported)
    if wrong := difference.beyond(limits):
        raise AdapterError(
            f"{what} is not what was trained: in {runtime}, over {difference.positions:,} answer tokens, "
            f"{'; '.join(wrong)}",
            "nothing was kept; take more bits (--quantize), or another format" if "gguf" in what else AGAIN,
        )
    return Verdict(
        runtime, difference.as_dict(), limits.as_dict(), len(sample.prompts), len(sample.texts), kept
    )  # fmt: skip


# --------------------------------------------------------------------------- transformers, PEFT


def _verify_merged(subject: Subject, sample: Sample, tuned: Scores, numbers: str, folder: Path, device: str) -> Verdict:
    check_tokenizer(subject, sample, folder)
    exported, kept = _score_merged(subject, sample, tuned, numbers, folder, device)
    _give_back()
    limits = limits_of("merged", numbers)
    return _judge(tuned, exported, limits, _version("transformers"), sample, kept, "the merged model")


def _score_merged(
    subject: Subject, sample: Sample, tuned: Scores, numbers: str, folder: Path, device: str
) -> tuple[Scores, Kept]:
    model = _load_merged(folder, device)
    kept = kept_in_model(subject.weights, numbers, functools.partial(_parameter, model))
    with compute_in_float32(model):
        return score(model, sample.probes, tuned), kept


def _load_merged(folder: Path, device: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    place = place_with_room(device, sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with quiet():
        more = attention_settings(AutoConfig.from_pretrained(folder, **local))
        both: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True, **local, **more
        )
    model, loaded = both
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        lost = sorted(map(str, (*loaded["missing_keys"], *loaded["mismatched_keys"])))
        raise AdapterError(f"the merged model lacks {', '.join(lost[:3])}", AGAIN)
    return model.requires_grad_(False).eval().to(place)


def _parameter(model: Any, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _verify_peft(subject: Subject, sample: Sample, tuned: Scores, numbers: str, folder: Path, device: str) -> Verdict:
    check_tokenizer(subject, sample, folder)
    exported, kept = _score_peft(subject, sample, tuned, folder, device)
    subject.held = None  # PEFT has changed it
    _give_back()
    return _judge(tuned, exported, LIMITS["peft"], _version("peft"), sample, kept, "the adapter")


def _score_peft(subject: Subject, sample: Sample, tuned: Scores, folder: Path, device: str) -> tuple[Scores, Kept]:
    if installed():
        bitsandbytes()  # PEFT imports it, and it would fetch code from the hub then
    from peft import PeftModel

    base = subject.held if subject.held is not None else load_stored(subject, device)
    with quiet():
        model = PeftModel.from_pretrained(base, str(folder)).eval()
    layers: Any = model.get_base_model()
    kept = kept_in_layers(subject, lambda path: _parts_in_peft(layers.get_submodule(path)))
    with compute_in_float32(model):
        return score(model, sample.probes, tuned), kept


def _parts_in_peft(layer: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A, B and the scaling of a layer as PEFT holds them."""
    if "default" in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return A.detach().cpu(), B.detach().cpu(), layer.scaling["default"]


def _version(package: str) -> str:
    return f"{package} {version_of(package)}"


# --------------------------------------------------------------------------- llama.cpp


def _verify_gguf(subject: Subject, sample: Sample, tuned: Scores, numbers: str, folder: Path, device: str) -> Verdict:
    file = next(folder.glob("*.gguf"))
    entries = plan(architecture_of(subject.config), subject.config, subject.weights, NUMBERS[numbers])
    kept = kept_in_gguf(subject.weights, entries, file, numbers)
    answers = _ask(subject, sample, file, None)
    exported = as_scores(answers, tuned)
    return _judge(tuned, exported, limits_of("gguf", numbers), answers.build, sample, kept, "the gguf file")


def _verify_gguf_adapter(
    subject: Subject, sample: Sample, tuned: Scores, numbers: str, folder: Path, device: str
) -> Verdict:
    file = next(folder.glob("*.gguf"))
    kept = kept_in_adapter(subject, file)
    base, base_numbers = subject.source.gguf, base_numbers_of(subject)
    own = None
    if base is None:
        own = base = folder / "base-for-the-check.gguf"
        write_model(subject, own, NUMBERS[base_numbers], subject.weights.without_update())
    try:
        answers = _ask(subject, sample, base, file)
    finally:
        if own is not None:
            own.unlink(missing_ok=True)
    limits = limits_of("gguf-adapter", base_numbers)
    return _judge(tuned, as_scores(answers, tuned), limits, answers.build, sample, kept, "the gguf adapter")


def base_numbers_of(subject: Subject) -> str:
    """The number format whose limits hold for an adapter on the base that it is tried on.

    On a quantised file both sides have the same weights. What differs is that llama.cpp rounds what goes into a product
    with them to 8 bits, as with q8_0.
    """
    if subject.source.gguf is None:
        return {"bfloat16": "bf16", "float16": "f16"}.get(subject.numbers, "f32")
    kinds = {t.tensor_type.name.lower() for t in gguf.GGUFReader(subject.source.gguf).tensors if len(t.shape) > 1}
    return next((name for name in ("f32", "f16", "bf16") if kinds <= {name, "f32"}), "q8_0")


def _ask(subject: Subject, sample: Sample, file: Path, adapter: Path | None) -> Answers:
    """Score the sample in llama.cpp, once its tokens are seen to be those of the training."""
    templated = subject.kind in TEMPLATED_KINDS
    asked = [(text, False) for text, _ in sample.texts]
    if not templated:
        asked += [(prompt.text, True) for prompt in sample.prompts]
    answers = ask_llama(
        file, adapter=adapter, prompts=sample.prompts if templated else (), texts=asked, probes=sample.probes
    )
    decode = subject.tokenizer.decode
    for prompt, found in zip(sample.prompts, answers.prompts, strict=False) if templated else ():
        if "error" in found:
            raise AdapterError(
                f"llama.cpp cannot use the chat template: {found['error']}", "use --to merged, or another base"
            )
        if list(prompt.ids) != found["ids"]:
            same_text(prompt.text, found["text"], subject.tokenizer.bos_token or "")
        same_tokens(prompt.ids, found["ids"], "llama.cpp", decode)
    wanted = [ids for _, ids in sample.texts] + ([] if templated else [p.ids for p in sample.prompts])
    for ids, found in zip(wanted, answers.texts, strict=True):
        same_tokens(ids, found, "llama.cpp", decode)
    return answers
