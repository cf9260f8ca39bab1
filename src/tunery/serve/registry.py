"""Which model a name stands for: the bases, their aliases, fine-tuned models, and checkpoints of jobs.

Names are looked up and never made into paths. A checkpoint becomes an adapter folder when it is first asked for.
"""

from __future__ import annotations

import difflib
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunery.errors import ConfigError, TuneryError
from tunery.serve.errors import ApiError
from tunery.serve.jobs.folder import JobFolder
from tunery.serve.records import Checkpoint, Model, Work
from tunery.serve.store import Store

OWNER_OF_BASES = "tunery"
ORGANIZATION = "local"

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


Export = Callable[[Path, int, Path], None]
"""(run directory, step, target): makes an adapter folder of a checkpoint, whole or not at all."""


class Registry:
    """The models of a server.

    Args:
        store: of the jobs, checkpoints and fine-tuned models.
        jobs: the folder of the jobs' folders.
        bases: names of base models, as Task.model takes them. The first is the default.
        aliases: further names → one of the bases.
        export: makes an adapter folder of a checkpoint.

    Raises:
        ConfigError: no base, an alias of something else than a base, or an alias that hides a base.
    """

    def __init__(
        self,
        store: Store,
        jobs: Path,
        bases: Sequence[str],
        aliases: Mapping[str, str] | None = None,
        *,
        export: Export | None = None,
    ):
        self._store, self._jobs = store, jobs
        self.bases, self.aliases = tuple(dict.fromkeys(bases)), dict(aliases or {})
        self._export = export or _export_checkpoint
        self._exporting = threading.Lock()
        self._started = int(time.time())
        if not self.bases:
            raise ConfigError("no base model to serve", "name one with --base")
        for alias, base in self.aliases.items():
            if base not in self.bases:
                raise ConfigError(f"alias {alias}: {base} is not among the bases", f"add --base {base}")
            if alias in self.bases or alias.startswith("ft:") or not alias.strip():
                raise ConfigError(f"{alias!r} cannot be an alias", "choose a name that is not a base's, nor ft:…")

    # ----------------------------------------------------------------- looking up

    def resolve(self, name: str) -> ServedModel:
        """The model of this name.

        Raises:
            ApiError: 404, there is none, or its base is not served here; the message names what there is.
        """
        found = self._find(name)
        if found.base not in self.bases:
            raise _missing(f"{name} is an adapter of {found.base}, which this server was started without")
        return found

    def list(self) -> list[ServedModel]:
        """The bases, the aliases and the fine-tuned models on these bases, newest first."""
        named = [self._plain(name) for name in (*self.bases, *self.aliases)]
        tuned = [self._tuned(model) for model in self._store.list(Model).data]
        return named + [model for model in tuned if model.base in self.bases]

    def base_of(self, name: str) -> tuple[str, Path | None]:
        """Where a new job begins: (what Task.model names, the adapter to go on from).

        Raises:
            ApiError: 404, there is no such model.
        """
        found = self.resolve(name)
        return found.base, found.adapter

    def _find(self, name: str) -> ServedModel:
        if name in self.bases or name in self.aliases:
            return self._plain(name)
        if model := self._store.get(Model, name):
            return self._tuned(model)
        if match := _CHECKPOINT.fullmatch(name):
            return self._checkpoint(name, int(match[2]))
        raise _missing(f"there is no model {name[:200]!r}", self._hint(name))

    def _plain(self, name: str) -> ServedModel:
        return ServedModel(name, self.aliases.get(name, name), None, "", self._started, OWNER_OF_BASES)

    def _tuned(self, model: Model) -> ServedModel:
        job_id = self._store.owner(Model, model.id) or ""
        adapter = JobFolder.of(self._jobs, job_id).run.adapter
        return ServedModel(model.id, model.base, adapter, job_id, model.created, ORGANIZATION)

    def _hint(self, name: str) -> str:
        known = [model.id for model in self.list()]
        close = difflib.get_close_matches(name, known, 1, 0.7)
        listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        wanted = (
            f"did you mean {close[0]}? " if close else f"start the server with --alias {name}={self.bases[0]}, or use "
        )
        return f"{wanted}one of: {listed}" if not close else f"{wanted}There are: {listed}"

    # ----------------------------------------------------------------- checkpoints

    def _checkpoint(self, name: str, step: int) -> ServedModel:
        found = self._store.list(Checkpoint, where={"fine_tuned_model_checkpoint": name}, limit=1).data
        if not found:
            raise _missing(f"there is no checkpoint {name[:200]!r}", "a job's checkpoints are listed with the job")
        checkpoint = found[0]
        job_id = checkpoint.fine_tuning_job_id
        work = self._store.get(Work, job_id)
        folder = JobFolder.of(self._jobs, job_id)
        if work is None:
            raise _missing(f"the job of {name} is gone")
        adapter = folder.exported(step)
        with self._exporting:
            if not adapter.is_dir():
                self._make(folder, step, adapter, name)
        return ServedModel(name, work.base, adapter, f"{job_id}/step-{step}", checkpoint.created_at, ORGANIZATION)

    def _make(self, folder: JobFolder, step: int, adapter: Path, name: str) -> None:
        try:
            self._export(folder.run.root, step, adapter)
        except (TuneryError, OSError) as error:
            if (folder.run.checkpoints / f"step-{step}").is_dir():
                raise ApiError(
                    500, f"{name} could not be made into an adapter: {error}", type="server_error"
                ) from error
            raise _missing(f"checkpoint {name} is no longer kept: newer ones have taken its place") from error

    # ----------------------------------------------------------------- deleting

    def delete(self, name: str) -> None:
        """Delete a fine-tuned model: its adapter and the checkpoints of its job. The job's record stays.

        Raises:
            ApiError: 404, there is no such model; 403, it is a base, an alias or a checkpoint.
        """
        model = self._store.get(Model, name)
        if model is None:
            found = self._find(name)
            what = "a checkpoint, and goes with its model" if found.adapter else "a base of this server"
            raise ApiError(403, f"{name} is {what}; only fine-tuned models can be deleted", code="cannot_delete_model")
        job_id = self._store.owner(Model, name) or ""
        folder = JobFolder.of(self._jobs, job_id)
        with self._store.transaction():
            self._store.delete(Model, name)
            for checkpoint in self._store.list(Checkpoint, owner=job_id).data:
                self._store.delete(Checkpoint, checkpoint.id)
        for weights in (folder.run.adapter, folder.run.checkpoints, folder.checkpoints):
            shutil.rmtree(weights, ignore_errors=True)


def _missing(message: str, hint: str | None = None) -> ApiError:
    words = message if hint is None else f"{message}; {hint}"
    return ApiError(404, words, code="model_not_found", param="model")


def _export_checkpoint(run: Path, step: int, target: Path) -> None:
    from tunery.export.checkpoint import export_checkpoint

    export_checkpoint(run, step, target)
