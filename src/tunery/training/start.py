"""The adapter that a run trains: a fresh one, or one that was trained before (`lora.start`)."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunery.config import BUILT_IN_MODELS, Task
from tunery.errors import AdapterError
from tunery.lora.adapter import CONFIG_FILE, WEIGHTS_FILE, read_adapter, read_config
from tunery.lora.attach import attach, place
from tunery.lora.dropout import DropoutClock
from tunery.lora.layer import LoRATensors
from tunery.lora.targets import plain_modules
from tunery.models.hashes import cached_sha256
from tunery.progress import Note
from tunery.training.objectives.base import REFERENCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Start:
    """The folder that a run's adapter was taken from.

    Attributes:
        sha256: of its weights: what the receipt of the run that made it calls `adapter.sha256`.
        config_sha256: of its adapter_config.json, which holds the scaling.
        base: the model it was trained on, as its configuration names it.
    """

    path: str
    sha256: str
    config_sha256: str
    base: str | None

    @property
    def hashes(self) -> tuple[str, str]:
        """Equal for two folders that hold the same adapter."""
        return self.sha256, self.config_sha256

    def remark(self, base: str) -> str | None:
        """What to say when the adapter was trained on a model of another name than `base`: one of the same shape takes
        it without complaint, and makes nothing of it."""
        if self.base is None or (then := _short(self.base)).casefold() == (now := _short(base)).casefold():
            return None
        return f"the adapter it starts from was trained on {then}, and the base is {now}"


def _short(name: str) -> str:
    """The last part of a hub id, or of a path on whatever machine."""
    return BUILT_IN_MODELS.get(name, name).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def read_start(task: Task) -> Start | None:
    """The facts about `lora.start`; None for a task that has none.

    Raises:
        AdapterError: there is no adapter in that folder.
    """
    if task.lora.start is None:
        return None
    folder = Path(task.lora.start)
    with _named():
        base = read_config(folder).get("base_model_name_or_path")
        try:
            hashes = cached_sha256(folder / WEIGHTS_FILE), cached_sha256(folder / CONFIG_FILE)
            return Start(str(folder), *hashes, base if isinstance(base, str) and base else None)
        except OSError as error:
            raise AdapterError(f"{folder / WEIGHTS_FILE} cannot be read: {error.strerror}") from None


@contextlib.contextmanager
def _named() -> Generator[None]:
    """Put the setting's name before what is wrong with the folder."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"lora.start: {error.message}", error.hint) from None


@dataclass(frozen=True)
class Attached:
    """An adapter on a model, active under the name "default".

    Attributes:
        matched: names of the adapted layers.
        clock: of its dropout.
        start: where its values come from; None if they follow from the seed.
        notes: what to know about how that adapter was read.
    """

    matched: list[str]
    clock: DropoutClock
    start: Start | None = None
    notes: tuple[str, ...] = ()


def attach_adapter(task: Task, model: PreTrainedModel, *, reference: bool = False) -> Attached:
    """Put the adapter to be trained on a base model, as the task says.

    Dropout is a setting of this training, not of an adapter that it starts from.

    Args:
        reference: the tuned model is compared with what it starts from: an adapter to start from is put on twice, and
            the second one, REFERENCE, stays as it is.

    Raises:
        TargetError: `lora.targets` matches nothing.
        AdapterError: `lora.start` cannot be read, or does not fit the model.
    """
    lora, clock = task.lora, DropoutClock()
    if lora.start is None:
        matched = attach(
            model,
            rank=lora.rank,
            alpha=lora.effective_alpha,
            dropout=lora.dropout,
            targets=lora.targets,
            exclude=lora.exclude,
            rank_stabilized=lora.rank_stabilized,
            variant=lora.variant,
            seed=task.seed,
            clock=clock,
        )
        return Attached(matched, clock)
    notes: list[Note] = []
    with _named():
        pieces = read_adapter(dict(plain_modules(model)), lora.start, notes.append)
    if reference:
        place(model, REFERENCE, _with_dropout(pieces, 0.0), trainable=False)
    place(model, "default", _with_dropout(pieces, lora.dropout), clock=clock)
    return Attached(list(pieces), clock, read_start(task), tuple(f"lora.start: {note}" for note in notes))


def _with_dropout(pieces: Mapping[str, LoRATensors], dropout: float) -> dict[str, LoRATensors]:
    return {path: replace(piece, settings=replace(piece.settings, dropout=dropout)) for path, piece in pieces.items()}
