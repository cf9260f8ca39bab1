"""The adapter folder for PEFT, vLLM and other servers that load adapters."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.errors import AdapterError, NotInstalledError
from tunery.export.targets.base import LIMITS, Limits, Target
from tunery.export.targets.vllm import Vllm

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunery.export.destinations import Wanted
    from tunery.export.subject import Sample, Subject
    from tunery.export.token_scores import TokenScores
    from tunery.export.updates import Kept
    from tunery.export.verify import Verdict


class Peft(Target):
    """A copy of the run's adapter folder that names its base as others can find it."""

    name = "peft"
    about = "the adapter folder for PEFT, vLLM and other servers that load adapters"
    runtime = "peft"
    files = ("adapter_config.json", "adapter_model.safetensors")
    hub_library = "peft"

    def require_runtime(self) -> None:
        from tunery.versions import install_command

        if importlib.util.find_spec("peft") is None:
            raise NotInstalledError(
                "an adapter for PEFT is checked in PEFT, which is not installed", install_command("export")
            )

    def dtype(self, subject: Subject) -> str:
        return "float32"

    def limits(self, dtype: str) -> Limits:
        return LIMITS["peft"]

    def notes(self, wanted: Wanted) -> list[str]:
        return [f"for vLLM: {message}" for _, message in Vllm().all_remarks(wanted)]

    def write(self, subject: Subject, sample: Sample, dtype: str, folder: Path) -> list[str]:
        from tunery.evaluation.record import read_run
        from tunery.export.subject import hub_id
        from tunery.lora.adapter import CONFIG_FILE, WEIGHTS_FILE
        from tunery.models.portable import save_tokenizer
        from tunery.paths import read_json, write_json

        adapter = subject.paths.adapter
        config = read_json(adapter / CONFIG_FILE)
        config["base_model_name_or_path"] = hub_id(read_run(subject.paths.root)) or subject.base_name
        shutil.copyfile(adapter / WEIGHTS_FILE, folder / WEIGHTS_FILE)
        write_json(folder / CONFIG_FILE, config)
        save_tokenizer(subject.tokenizer, folder)
        return []

    def read_back(
        self, subject: Subject, sample: Sample, tuned: TokenScores, dtype: str, folder: Path, device: str
    ) -> Verdict:
        from tunery.export.verify import check_tokenizer, free_memory, judge, version

        check_tokenizer(subject, sample, folder)
        exported, kept = _score(subject, sample, tuned, folder, device)
        subject.held = None  # PEFT has changed it
        free_memory()
        return judge(tuned, exported, self.limits(dtype), version("peft"), sample, kept, "the adapter")


def _score(subject: Subject, sample: Sample, tuned: TokenScores, folder: Path, device: str) -> tuple[TokenScores, Kept]:
    from tunery.export.token_scores import compute_in_float32, score
    from tunery.export.updates import kept_in_layers
    from tunery.export.verify import load_stored
    from tunery.models.hf_logging import quiet
    from tunery.models.quantized import bitsandbytes, installed

    if installed():
        bitsandbytes()  # PEFT imports it, and it would fetch code from the hub then
    from peft import PeftModel

    base = subject.held if subject.held is not None else load_stored(subject, device)
    with quiet():
        model = PeftModel.from_pretrained(base, str(folder)).eval()
    layers = model.get_base_model()
    _require_same_extra(subject, layers)
    kept = kept_in_layers(subject, lambda path: _parts(layers.get_submodule(path)))
    with compute_in_float32(model):
        return score(model, sample.probes, tuned), kept


def _require_same_extra(subject: Subject, layers: nn.Module) -> None:
    """What a variant has besides A and B must be in PEFT what it is in the run.

    Raises:
        AdapterError: it is not.
    """
    for path, piece in subject.pieces.items():
        layer: Any = layers.get_submodule(path)
        for key, tensor in piece.extra.items():
            there = getattr(layer, key)["default"].weight.detach().cpu().float()
            if not there.equal(tensor.float().cpu()):
                raise AdapterError(f"{key} of {path} is not in the export")


def _parts(layer: Any) -> tuple[Tensor, Tensor, float]:
    """A, B and the scaling of a layer as PEFT holds them."""
    if "default" in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return A.detach().cpu(), B.detach().cpu(), layer.scaling["default"]
