"""The adapter alone for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tunery.export.targets.base import Remark
from tunery.export.targets.gguf import Gguf
from tunery.paths import safe_name

if TYPE_CHECKING:
    from tunery.export.destinations import Wanted
    from tunery.export.subject import Sample, Subject
    from tunery.export.token_scores import TokenScores
    from tunery.export.verify import Verdict


class GgufAdapter(Gguf):
    """A file to be put on a GGUF file of the base, whose tokenizer and template hold."""

    name = "gguf-adapter"
    about = "the adapter alone for llama.cpp, to be put on a GGUF file of the base"
    holds_base = False
    default_dtype = "f32"
    adds_only = True

    def check_dtype(self, name: str) -> None:
        from tunery.export.gguf_file import check_numbers

        check_numbers(name)

    def remarks(self, wanted: Wanted) -> list[Remark]:
        found = super().remarks(wanted)
        if wanted.tied and wanted.outer:
            message = (
                f"embedding and head are one tensor in a GGUF file of this base, so an update of "
                f"{', '.join(wanted.outer)} alone cannot be applied: leave it out of lora.targets, or use --to gguf"
            )
            found.append((True, message))
        if wanted.quantized:
            message = (
                f"the adapter is trained on a base in {wanted.quantized}; a GGUF file of the base in another number "
                "format answers a little differently"
            )
            found.append((False, message))
        return found

    def write(self, subject: Subject, sample: Sample, dtype: str, folder: Path) -> list[str]:
        from tunery.export.gguf_file import write_adapter

        write_adapter(subject, folder / f"{safe_name(subject.task.name)}-adapter-{dtype}.gguf", dtype)
        return ["tokenizer and chat template are those of the base's GGUF file; they must be the run's own"]

    def read_back(
        self, subject: Subject, sample: Sample, tuned: TokenScores, dtype: str, folder: Path, device: str
    ) -> Verdict:
        from tunery.export.gguf_file import write_model
        from tunery.export.gguf_types import NUMBERS
        from tunery.export.llama_cpp import as_scores
        from tunery.export.updates import kept_in_adapter
        from tunery.export.verify import MORE_BITS, ask, judge

        file = next(folder.glob("*.gguf"))
        kept = kept_in_adapter(subject, file)
        base, base_dtype = subject.source.gguf, _base_dtype(subject)
        own = None
        if base is None:
            own = base = folder / "base-for-the-check.gguf"
            write_model(subject, own, NUMBERS[base_dtype], subject.weights.without_update())
        try:
            answers = ask(subject, sample, base, file)
        finally:
            if own is not None:
                own.unlink(missing_ok=True)
        exported, limits = as_scores(answers, tuned), self.limits(base_dtype)
        return judge(tuned, exported, limits, answers.build, sample, kept, "the gguf adapter", MORE_BITS)


def _base_dtype(subject: Subject) -> str:
    """The dtype whose limits hold for an adapter on the base that it is tried on.

    On a quantised file both sides have the same weights. What differs is that llama.cpp rounds what goes into a product
    with them to 8 bits, as with q8_0.
    """
    import gguf

    if subject.source.gguf is None:
        return {"bfloat16": "bf16", "float16": "f16"}.get(subject.numbers, "f32")
    kinds = {t.tensor_type.name.lower() for t in gguf.GGUFReader(subject.source.gguf).tensors if len(t.shape) > 1}
    return next((name for name in ("f32", "f16", "bf16") if kinds <= {name, "f32"}), "q8_0")
