"""Which model a name stands for: the bases, their aliases, fine-tuned models, and checkpoints of jobs.

Names are looked up and never made into paths. A checkpoint becomes an adapter folder when it is first asked for.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunery.config import BUILT_IN_MODELS
from tunery.errors import CheckpointError, ConfigError
from tunery.lora.adapter import read_config
from tunery.lora.variants import variant_of
from tunery.paths import RunPaths, read_json
from tunery.serve.api_errors import ApiError, shorten
from tunery.serve.jobs.job_folder import JobFolder
from tunery.serve.records import Checkpoint, Model, Work
from tunery.serve.store import Store
from tunery.text import similar_names
from tunery.training.checkpoint import export_checkpoint

OWNER_OF_BASES = "tunery"
ORGANIZATION = "local"

_SNAPSHOT = re.compile(r"(.+)-\d{4}-\d{2}-\d{2}")
"""Dated names, such as gpt-4o-mini-2024-07-18, mean what the alias without the date means."""

_CHECKPOINT = re.compile(r"(ft:.+):ckpt-step-(\d+)", re.DOTALL)


@dataclass(frozen=True)
class ServedModel:
    """A model that answers.

    Attributes:
        id: the name a client uses.
        base: what Task.model names.
        adapter: a folder in PEFT's format; None for the base alone.
        key: names the weights for good: "" for the base, else such as "ftjob-abc" or "ftjob-abc/step-88".
        created: Unix time in seconds.
        system: put before a conversation that has no system message; none today.
    """

    id: str
    base: str
    adapter: Path | None
    key: str
    created: int
    owned_by: str
    system: str | None = None


class Registry:
    """The models of a server.

    Args:
        store: of the jobs, checkpoints and fine-tuned models.
        jobs: the folder of the jobs' folders.
        bases: names of base models, as Task.model takes them. The first is the default.
        aliases: further names → one of the bases.
        adapters: name → run directory, or adapter folder in PEFT's format, trained elsewhere on one of the bases.

    Raises:
        ConfigError: no base, an alias of something else than a base, a name that stands for two things, or an adapter
            that cannot be read.
    """

    def __init__(
        self,
        store: Store,
        jobs: Path,
        bases: Sequence[str],
        aliases: Mapping[str, str] | None = None,
        *,
        adapters: Mapping[str, Path] | None = None,
    ):
        self._store, self._jobs = store, jobs
        self.bases, self.aliases = tuple(dict.fromkeys(bases)), dict(aliases or {})
        self._exporting = threading.Lock()
        self._started = int(time.time())
        if not self.bases:
            raise ConfigError("no base model to serve", "name one with --base")
        for alias, base in self.aliases.items():
            if base not in self.bases:
                raise ConfigError(f"alias {alias}: {base} is not among the bases", f"add --base {base}")
            _require_free(alias, self.bases)
        self._adapters = {name: self._own(name, path) for name, path in (adapters or {}).items()}

    def _own(self, name: str, path: Path) -> ServedModel:
        """An adapter of the server's owner."""
        _require_free(name, (*self.bases, *self.aliases))
        inside = RunPaths(path).adapter
        folder = inside if inside.is_dir() else path
        try:
            config = read_json(folder / "adapter_config.json")
            trained_on = config["base_model_name_or_path"]
            created = int((folder / "adapter_model.safetensors").stat().st_mtime)
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"adapter {name}: {path} holds no adapter",
                "name a run directory, or an adapter folder in PEFT's format",
            ) from None
        read_config(folder)  # what no adapter of that method can be loaded for is said at the start
        if not (variant := variant_of(config)).additive:
            raise ConfigError(
                f"adapter {name}: {path} is a {variant.title} adapter, which rescales the base's weights, and many "
                "adapters share one base here",
                "merge it (tunery export RUN --to merged) and serve that folder with --base",
            )
        same = [base for base in self.bases if _full_name(base) == _full_name(str(trained_on))]
        if not same and len(self.bases) > 1:
            raise ConfigError(
                f"adapter {name}: it was trained on {trained_on}, which is not among the bases",
                f"add --base {trained_on}",
            )
        base = next(iter(same or self.bases))
        return ServedModel(name, base, folder, f"adapter/{name}", created, ORGANIZATION)

    # ----------------------------------------------------------------- looking up

    def resolve(self, name: str) -> ServedModel:
        """The model of this name.

        Raises:
            ApiError: 404, there is none, or its base is not served here; the message names what there is.
        """
        found = self._find(name)
        if found.base not in self.bases:
            raise _missing(
                f"The model {shorten(name)} is an adapter of {found.base}, which this server was started without."
            )
        return found

    def list(self) -> list[ServedModel]:
        """The bases, the aliases, the owner's adapters, and the fine-tuned models on these bases, newest first."""
        named = [self._plain(name) for name in (*self.bases, *self.aliases)]
        tuned = [self._tuned(model) for model in self._store.list(Model).data]
        return [*named, *self._adapters.values(), *(model for model in tuned if model.base in self.bases)]

    def base_of(self, name: str) -> tuple[str, Path | None]:
        """Where a new job begins: (what Task.model names, the adapter to start from).

        Raises:
            ApiError: 404, there is no such model.
        """
        found = self.resolve(name)
        return found.base, found.adapter

    def _find(self, name: str) -> ServedModel:
        if name in self.bases or name in self.aliases:
            return self._plain(name)
        if name in self._adapters:
            return self._adapters[name]
        if model := self._store.get(Model, name):
            return self._tuned(model)
        if match := _CHECKPOINT.fullmatch(name):
            return self._checkpoint(name, int(match[2]))
        if (match := _SNAPSHOT.fullmatch(name)) and match[1] in self.aliases:
            return self._plain(name, match[1])
        raise _missing(f"The model {shorten(name)!r} does not exist.", self._hint(name))

    def _plain(self, name: str, known_as: str | None = None) -> ServedModel:
        base = self.aliases.get(known_as or name, name)
        return ServedModel(name, base, None, "", self._started, OWNER_OF_BASES)

    def _tuned(self, model: Model) -> ServedModel:
        job_id = self._store.owner(Model, model.id) or ""
        adapter = JobFolder.of(self._jobs, job_id).run.adapter
        return ServedModel(model.id, model.base, adapter, job_id, model.created, ORGANIZATION)

    def _hint(self, name: str) -> str:
        known = [model.id for model in self.list()]
        close = similar_names(name, known, 1, 0.7)
        listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        if close:
            return f"Did you mean {close[0]}? This server has: {listed}."
        return f"This server has: {listed}. Its owner can add a name with --alias {shorten(name)}={self.bases[0]}."

    # ----------------------------------------------------------------- checkpoints

    def _checkpoint(self, name: str, step: int) -> ServedModel:
        found = self._store.list(Checkpoint, where={"fine_tuned_model_checkpoint": name}, limit=1).data
        if not found:
            raise _missing(f"The checkpoint {shorten(name)!r} does not exist.", "A job lists those that it keeps.")
        checkpoint = found[0]
        job_id = checkpoint.fine_tuning_job_id
        work = self._store.get(Work, job_id)
        folder = JobFolder.of(self._jobs, job_id)
        if work is None:
            raise _missing(f"The job of {name} is gone.")
        adapter = folder.exported(step)
        with self._exporting:
            if not adapter.is_dir():
                self._make(folder, step, adapter, name)
        return ServedModel(name, work.base, adapter, f"{job_id}/step-{step}", checkpoint.created_at, ORGANIZATION)

    def _make(self, folder: JobFolder, step: int, adapter: Path, name: str) -> None:
        try:
            export_checkpoint(folder.run.root, step, adapter)
        except CheckpointError as error:
            raise _missing(f"The checkpoint {name} is no longer kept: newer ones have taken its place.") from error

    # ----------------------------------------------------------------- deleting

    def delete(self, name: str) -> None:
        """Delete a fine-tuned model: its adapter and the checkpoints of its job. The job's record stays.

        Raises:
            ApiError: 404, there is no such model; 403, it is a base, an alias or a checkpoint.
        """
        model = self._store.get(Model, name)
        if model is None:
            found = self._find(name)
            what = "a checkpoint, and goes with its model" if name.startswith("ft:") else "the server's own"
            raise ApiError(
                403, f"{found.id} is {what}. Only models that were fine-tuned here can be deleted.", param="model"
            )
        job_id = self._store.owner(Model, name) or ""
        folder = JobFolder.of(self._jobs, job_id)
        with self._store.transaction():
            self._store.delete(Model, name)
            for checkpoint in self._store.list(Checkpoint, owner=job_id).data:
                self._store.delete(Checkpoint, checkpoint.id)
        for weights in (folder.run.adapter, folder.run.checkpoints, folder.checkpoints):
            shutil.rmtree(weights, ignore_errors=True)


def _require_free(name: str, taken: Sequence[str]) -> None:
    if name in taken or name.startswith("ft:") or not name.strip():
        raise ConfigError(f"{name!r} cannot be the name of another model", "choose one that is free, and not ft:…")


def _full_name(model: str) -> str:
    return BUILT_IN_MODELS.get(model, model).casefold()


def _missing(*sentences: str) -> ApiError:
    return ApiError(404, " ".join(sentences), code="model_not_found", param="model")
