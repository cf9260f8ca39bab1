"""The merged model in one file for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tunery.errors import ConfigError
from tunery.export.targets.base import LIMITS, Limits, Remark
from tunery.export.targets.merged import Merged
from tunery.paths import safe_name

if TYPE_CHECKING:
    from tunery.export.destinations import Wanted
    from tunery.export.subject import Sample, Subject
    from tunery.export.token_scores import TokenScores
    from tunery.export.verify import Verdict


class Gguf(Merged):
    """A file for llama.cpp and what is built on it, which is merged first and refuses what merging does."""

    name = "gguf"
    about = "the merged model in one file for llama.cpp and what is built on it"
    runtime = "llama.cpp"
    files = ("*.gguf",)
    hub_library = "gguf"
    default_dtype = "f16"

    def require_runtime(self) -> None:
        from tunery.export.llama_cpp import require_llama

        require_llama()

    def check_dtype(self, name: str) -> None:
        from tunery.export.gguf_types import numbers_of

        numbers_of(name)

    def remarks(self, wanted: Wanted) -> list[Remark]:
        from tunery.export.gguf_names import architecture_of
        from tunery.export.gguf_tokenizer import read_vocabulary

        found = Merged.remarks(self, wanted)
        try:
            architecture = architecture_of(wanted.layers.config)
            if not architecture.head and wanted.outer:
                message = (
                    f"llama.cpp ties the embedding and head of {architecture.name} models: leave "
                    f"{', '.join(wanted.outer)} out of lora.targets"
                )
                found.append((True, message))
            read_vocabulary(wanted.tokenizer, wanted.layers.get_input_embeddings().get_parameter("weight").shape[0])
        except ConfigError as error:
            found.append((True, f"{error.message}: {error.hint}" if error.hint else error.message))
        return found

    def limits(self, dtype: str) -> Limits:
        return LIMITS[f"gguf {dtype}"]

    def write(self, subject: Subject, sample: Sample, dtype: str, folder: Path) -> list[str]:
        from tunery.export.gguf_file import write_model
        from tunery.export.gguf_types import numbers_of

        write_model(subject, folder / f"{safe_name(subject.task.name)}-{dtype}.gguf", numbers_of(dtype))
        return []

    def read_back(
        self, subject: Subject, sample: Sample, tuned: TokenScores, dtype: str, folder: Path, device: str
    ) -> Verdict:
        from tunery.export.gguf_file import plan
        from tunery.export.gguf_names import architecture_of
        from tunery.export.gguf_types import NUMBERS
        from tunery.export.llama_cpp import as_scores
        from tunery.export.updates import kept_in_gguf
        from tunery.export.verify import MORE_BITS, ask, judge

        file = next(folder.glob("*.gguf"))
        entries = plan(architecture_of(subject.config), subject.config, subject.weights, NUMBERS[dtype])
        kept = kept_in_gguf(subject.weights, entries, file, dtype)
        answers = ask(subject, sample, file, None)
        exported, limits = as_scores(answers, tuned), self.limits(dtype)
        return judge(tuned, exported, limits, answers.build, sample, kept, "the gguf file", MORE_BITS)
