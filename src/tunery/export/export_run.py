"""Exporting a finished run: written to a temporary folder, loaded back by the program it is for, compared, and only
then given its name. Nothing half written stays, whatever ends it."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from tunery.console import Console
from tunery.errors import ConfigError, ResumableError, StoppedError, TuneryError
from tunery.export import hub
from tunery.export.destinations import Wanted
from tunery.export.subject import Sample, Subject, draw_sample, memory_errors, open_run
from tunery.export.targets import HUB, HUB_CONTENT, TARGETS
from tunery.export.targets.base import ROWS, Target
from tunery.export.verify import score_tuned
from tunery.jsonl import JsonMapping, JsonObject
from tunery.lora.variants import VARIANTS
from tunery.paths import file_sha256, safe_name, write_folder
from tunery.progress import Note, Progress
from tunery.records.export_record import VERSION, ExportRecord
from tunery.versions import version_of


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        path: its folder.
        record: the content of export.json.
        upload: of format "hub": the files that went to the hub, or would go.
    """

    path: Path
    record: ExportRecord
    upload: JsonObject | None = None


def export_run(
    run: str | Path,
    to: str,
    *,
    quantize: str | None = None,
    out: str | Path | None = None,
    rows: int = ROWS,
    device: str = "auto",
    repo: str | None = None,
    content: str | None = None,
    private: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Export a finished run, and prove that the export does what the adapter does.

    Args:
        run: a run directory.
        to: of tunery.export.targets.FORMATS.
        quantize: dtype of a GGUF file (tunery.export.gguf_types.NUMBERS).
        out: the export's folder; left out, RUN/export/FORMAT. An earlier export there is replaced.
        rows: held-out rows compared.
        device: where models are loaded to be compared.
        repo, content, private, dry_run: of format "hub": "owner/name", which format to upload (left out, "peft"),
            whether a new repository is hidden, and whether only to say what would be uploaded.
        progress: told what is being done; the default prints to stderr.

    Returns:
        The export, in its folder.

    Raises:
        ConfigError: the run cannot be expressed in that format, or a library is missing.
        AdapterError: the export differs from the adapter by more than its limits; nothing is kept.
        StoppedError: SIGTERM came; nothing is kept.
    """
    progress = progress or Console()
    _check_hub_only(to, {"--repo": repo, "--content": content, "--public": not private, "--dry-run": dry_run})
    repository = hub.check_repository(repo) if to == HUB else None
    target = _target((content or HUB_CONTENT) if to == HUB else to, quantize)
    target.require_runtime()
    root = Path(run)
    folder = (Path(out) if out is not None else root / "export" / _folder_name(target, quantize)).resolve()
    check_folder(folder, root)
    with terminable(), memory_errors():
        subject = open_run(run, device)
        subject.public = repository is not None
        dtype = (quantize or target.default_dtype or target.dtype(subject)).lower()
        _make(subject, target, dtype, folder, rows, device, progress)
    record = ExportRecord.read(folder / RECORD)
    upload = _publish(folder, record, repository, private, dry_run, progress) if repository else None
    return Export(folder, record, upload)


def _make(
    subject: Subject, target: Target, dtype: str, place: Path, rows: int, device: str, progress: Progress
) -> None:
    """Write an export, load it back, compare, and give it its name."""
    notes = _preflight(subject, target)
    sample = draw_sample(subject, rows)
    target.prepare(subject, sample)
    notes += [sample.note] if sample.note else []
    for text in notes:
        progress.note(Note(text))
    progress.note(Note(f"scoring {len(sample.probes)} {sample.origin} rows with the adapter in tunery"))
    tuned = score_tuned(subject, sample, device)

    def fill(folder: Path) -> None:
        progress.note(Note(f"writing {target.name} ({dtype})"))
        more = target.write(subject, sample, dtype, folder)
        hub.write_card(subject.paths.root, folder, target.name)
        progress.note(Note("loading it back and comparing"))
        verdict = target.read_back(subject, sample, tuned, dtype, folder, device)
        record = _record(subject, sample, target.name, dtype, verdict.as_dict(), notes + more, folder)
        record.write(folder / RECORD)

    write_export(place, fill)


def _publish(
    folder: Path, record: ExportRecord, repository: str, private: bool, dry_run: bool, progress: Progress
) -> JsonObject:
    """Upload an export, or say what would be uploaded."""
    upload = {"repository": repository, "sent": not dry_run, **hub.what_would_go(folder, record["format"])}
    if not dry_run:
        progress.note(Note(f"uploading {len(upload['files'])} files to {repository}"))
        upload["address"] = hub.upload(folder, repository, private=private, facts=record.as_json())
    return upload


# --------------------------------------------------------------------------- before anything is written


def _check_hub_only(to: str, given: JsonMapping) -> None:
    if to != HUB and (settings := [name for name, value in given.items() if value]):
        raise ConfigError(f"{settings[0]} has no meaning for {to}: nothing is uploaded", "it belongs to --to hub")


def _target(name: str, quantize: str | None) -> Target:
    """The target of that name, if it can have such weights."""
    if name not in TARGETS:
        raise ConfigError(f"nothing is exported to {name!r}", f"formats: {', '.join(TARGETS)}")
    target = TARGETS[name]
    if quantize and target.default_dtype is None:
        raise ConfigError(
            f"--quantize has no meaning for {name}: its weights keep the base's dtype",
            f"it belongs to {', '.join(each.name for each in TARGETS.values() if each.default_dtype)}",
        )
    if quantize:
        target.check_dtype(quantize)
    return target


def _folder_name(target: Target, quantize: str | None) -> str:
    return safe_name(f"{target.name}-{quantize.lower()}" if quantize else target.name)


def _preflight(subject: Subject, target: Target) -> list[str]:
    """What the destination needs to be told.

    Raises:
        ConfigError: it refuses the adapter.
    """
    pieces = subject.pieces.values()
    wanted = Wanted(
        subject.layers,
        subject.tokenizer,
        list(subject.pieces),
        tuple(sorted({piece.settings.rank for piece in pieces})),
        tuple(sorted({piece.settings.alpha for piece in pieces})),
        VARIANTS[next(iter(pieces)).settings.variant],
        subject.quantized,
        subject.weights.lost,
        subject.task.data.system,
    )
    found = target.all_remarks(wanted)
    if refused := [message for is_refused, message in found if is_refused]:
        raise ConfigError(f"{target.name}: {refused[0]}")
    return [*(message for _, message in found), *target.notes(wanted)]


def _record(
    subject: Subject, sample: Sample, form: str, dtype: str, verdict: JsonObject, notes: list[str], folder: Path
) -> ExportRecord:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    receipt = subject.receipt
    return ExportRecord.of(
        {
            "version": VERSION,
            "tunery": version_of("tunery"),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "run": subject.task.name,
            "format": form,
            "numbers": dtype,
            "base": {
                "name": subject.base_name,
                "sha256": receipt.model.sha256,
                "license": receipt.model.license,
            },
            "adapter_sha256": receipt.adapter.sha256,
            "template_sha256": subject.renderer.template_sha256,
            "rows": {"origin": sample.origin, "count": len(sample.probes)},
            "comparison": verdict,
            "notes": notes,
            "files": {
                str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in files
            },
        }
    )


# --------------------------------------------------------------------------- the folder

RECORD = "export.json"
"""Written beside every export: what it is, how it was compared, and the hash of each of its files."""

_ELSEWHERE = "choose another folder with --out"


def check_folder(folder: Path, root: Path) -> None:
    """Refuse a folder that is not an export's to replace.

    Args:
        folder: resolved.
        root: the run directory.

    Raises:
        ConfigError: it holds the run, this process's own folder, or anything that is not an export.
    """
    here = Path.cwd().resolve()
    if folder == here or folder in here.parents:
        raise ConfigError(f"{folder} is the folder you are in, or holds it; it is not replaced", _ELSEWHERE)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / RECORD).is_file())):
        raise ConfigError(f"{folder} exists and holds no export; it is not replaced", _ELSEWHERE)
    if folder == root.resolve() or folder in root.resolve().parents:
        raise ConfigError(f"{folder} holds the run itself", _ELSEWHERE)


def write_export(folder: Path, fill: Callable[[Path], None]) -> None:
    """Have `fill` write an export into a temporary folder, which then takes the name; or leave nothing.

    Raises:
        ResumableError: the disk is full.
        ConfigError: no permission.
    """
    sweep(folder)
    try:
        write_folder(folder, fill)
    except (ResumableError, ConfigError) as error:
        if isinstance(error.__cause__, OSError) and type(error) in _HINTS:
            error.hint = _HINTS[type(error)]
        raise


_HINTS: dict[type[TuneryError], str] = {
    ResumableError: f"nothing of it is kept; free some space and run the same command again, or {_ELSEWHERE}",
    ConfigError: _ELSEWHERE,
}
"""What to do about a disk; those who write files in general speak of runs."""


def sweep(folder: Path) -> None:
    """Remove what killed exports left beside a folder. One that had made way for its successor gets its name back."""
    for leftover in sorted(folder.parent.glob(f".{folder.name}.*-*")):
        match = re.fullmatch(r"\.(tmp|old)-(\d+)", leftover.name.removeprefix(f".{folder.name}"))
        if match is None or psutil.pid_exists(int(match[2])):
            continue
        if match[1] == "old" and not folder.exists():
            os.rename(leftover, folder)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


class _Terminated(BaseException):
    """SIGTERM came. No error that somebody may handle."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within this context SIGTERM is an exception, so what is half written goes and programs that were started end.

    In a thread other than the main one signals cannot be caught.

    Raises:
        StoppedError: SIGTERM came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # cleaning up is not to be cut short
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        raise StoppedError(
            "the export was terminated; nothing of it is kept",
            "run the same command again",
            signal_number=signal.SIGTERM,
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
