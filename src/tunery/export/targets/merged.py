"""The base with the adapter in it, as safetensors."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.errors import AdapterError
from tunery.export.limits import LIMITS, Limits
from tunery.export.targets.base import Remark, Target

if TYPE_CHECKING:
    import torch

    from tunery.export.destinations import Wanted
    from tunery.export.layers import Kept
    from tunery.export.sample import Sample
    from tunery.export.scores import Scores
    from tunery.export.subject import Subject
    from tunery.export.verify import Verdict


class Merged(Target):
    """A folder that transformers, vLLM and any other server loads as a model."""

    name = "merged"
    about = "the base with the adapter in it, as safetensors, for transformers, vLLM and any other server"
    runtime = "transformers"
    files = (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-*.safetensors",
        "model.safetensors.index.json",
    )
    hub_library = "transformers"
    holds_base = True

    def remarks(self, wanted: Wanted) -> list[Remark]:
        if not wanted.lost:
            return []
        message = (
            f"the base's files do not hold {wanted.lost[0]} under that name, so the adapter cannot be merged into "
            "them: merge in memory instead, with tunery.merge(model).save_pretrained(FOLDER)"
        )
        return [(True, message)]

    def limits(self, dtype: str) -> Limits:
        return LIMITS[f"merged {dtype}"]

    def write(self, subject: Subject, sample: Sample, dtype: str, folder: Path) -> list[str]:
        from tunery.export.merge_weights import write_merged

        write_merged(subject, folder)
        return []

    def read_back(
        self, subject: Subject, sample: Sample, tuned: Scores, dtype: str, folder: Path, device: str
    ) -> Verdict:
        from tunery.export.tokens import check_tokenizer
        from tunery.export.verify import free_memory, judge, version

        check_tokenizer(subject, sample, folder)
        exported, kept = _score(subject, sample, tuned, dtype, folder, device)
        free_memory()
        return judge(tuned, exported, self.limits(dtype), version("transformers"), sample, kept, "the merged model")


def _score(
    subject: Subject, sample: Sample, tuned: Scores, dtype: str, folder: Path, device: str
) -> tuple[Scores, Kept]:
    from tunery.export.exact import compute_in_float32
    from tunery.export.layers import kept_in_model
    from tunery.export.scores import score

    model = _load(folder, device)
    kept = kept_in_model(subject.weights, dtype, functools.partial(_parameter, model))
    with compute_in_float32(model):
        return score(model, sample.probes, tuned), kept


def _load(folder: Path, device: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunery.export.room import place_with_room
    from tunery.export.tokens import AGAIN
    from tunery.models.hf_logging import quiet
    from tunery.models.load import attention_settings

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
