"""The GGUF file with a Modelfile for Ollama."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tunery.export.targets.base import Remark
from tunery.export.targets.gguf import Gguf

if TYPE_CHECKING:
    from tunery.export.destinations import Wanted
    from tunery.export.sample import Sample
    from tunery.export.subject import Subject


class Ollama(Gguf):
    """A folder for `ollama create`."""

    name = "ollama"
    about = "the GGUF file with a Modelfile"
    files = ("*.gguf", "Modelfile")
    default_dtype = "q8_0"

    def remarks(self, wanted: Wanted) -> list[Remark]:
        from tunery.data.render import Renderer
        from tunery.export.modelfile import find_pieces, unsayable

        found = super().remarks(wanted)
        renderer = Renderer(wanted.tokenizer)
        if words := unsayable(renderer, wanted.system):
            found.append((True, f"{words}: use --to gguf"))
        if wanted.tokenizer.chat_template and find_pieces(renderer) is None:
            found.append((True, "the chat template does more than a Modelfile's template can say: use --to gguf"))
        return found

    def prepare(self, subject: Subject, sample: Sample) -> None:
        from tunery.export.modelfile import pieces_of

        if subject.kind.templated:
            pieces_of(subject, sample.prompts)

    def write(self, subject: Subject, sample: Sample, dtype: str, folder: Path) -> list[str]:
        from tunery.export.gguf_model import write_model
        from tunery.export.gguf_types import numbers_of
        from tunery.export.modelfile import MODEL, write_modelfile

        write_model(subject, folder / MODEL, numbers_of(dtype))
        return write_modelfile(subject, sample, folder)
