"""Export targets, one file each.

To add one, write a module with a subclass of Target and name it in TARGETS; the command line, the checks before a
training, the model card and the upload find it here. Its limits are in tunery.export.targets.base.
"""

from __future__ import annotations

from collections.abc import Mapping

from tunery.export.targets.base import Destination, Target
from tunery.export.targets.gguf import Gguf
from tunery.export.targets.gguf_adapter import GgufAdapter
from tunery.export.targets.merged import Merged
from tunery.export.targets.ollama import Ollama
from tunery.export.targets.peft import Peft
from tunery.export.targets.vllm import Vllm

TARGETS: Mapping[str, Target] = {target.name: target for target in (Peft(), Merged(), Gguf(), GgufAdapter(), Ollama())}
"""By name, in the order of the command line."""

HUB = "hub"
"""The way of an export to the Hugging Face hub, whichever it is."""

HUB_CONTENT = "peft"
"""What is uploaded unless told otherwise."""

DESTINATIONS: Mapping[str, Destination] = {**TARGETS, "vllm": Vllm(), HUB: TARGETS[HUB_CONTENT]}
"""Everything of which it can be asked beforehand whether an adapter can go there."""

FORMATS: Mapping[str, str] = {
    **{name: target.about for name, target in TARGETS.items()},
    HUB: "one of the above, uploaded to the Hugging Face hub",
}
"""What `tunery export --to` takes, with what it is."""
