"""Exporting a finished run: written to a temporary folder, loaded back by the program it is for, compared, and only
then given its name."""

from __future__ import annotations

import datetime
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.config import TEMPLATED_KINDS
from tunery.console import Console
from tunery.errors import ConfigError
from tunery.export import hub
from tunery.export.card import hub_id, write_card
from tunery.export.destinations import Wanted, findings
from tunery.export.folder import RECORD, check_target, terminable, write_export
from tunery.export.gguf_adapter import check_numbers, write_adapter
from tunery.export.gguf_model import write_model
from tunery.export.gguf_types import numbers_of
from tunery.export.merged import write_merged
from tunery.export.ollama import MODEL, pieces_of, write_modelfile
from tunery.export.room import memory_errors
from tunery.export.sample import Sample, draw_sample
from tunery.export.subject import Subject, open_run
from tunery.export.targets import FORMATS, ROWS
from tunery.export.verify import require_runtime, score_tuned, verify
from tunery.lora.adapter import CONFIG_FILE, WEIGHTS_FILE
from tunery.paths import file_sha256, read_json, safe_name, write_json
from tunery.progress import Note, Watcher
from tunery.versions import version_of

DEFAULT_NUMBERS = {"gguf": "f16", "ollama": "q8_0", "gguf-adapter": "f32"}
"""Number format of a GGUF file when none is asked for."""


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        path: its folder.
        record: the content of export.json.
        upload: of format "hub": the files that went to the hub, or would go.
    """

    path: Path
    record: dict[str, Any]
    upload: dict[str, Any] | None = None


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
    view: Watcher | None = None,
) -> Export:
    """Export a finished run, and prove that the export does what the adapter does.

    Args:
        run: a run directory.
        to: a key of tunery.export.targets.FORMATS.
        quantize: number format of a GGUF file (tunery.export.gguf_types.NUMBERS).
        out: the export's folder; left out, RUN/export/FORMAT. An earlier export there is replaced.
        rows: held-out rows compared.
        device: where models are loaded to be compared.
        repo, content, private, dry_run: of format "hub": "owner/name", which format to upload (left out, "peft"),
            whether a new repository is hidden, and whether only to say what would be uploaded.
        view: told what is being done; the default prints to stderr.

    Returns:
        The export, in its folder.

    Raises:
        ConfigError: the run cannot be expressed in that format, or a library is missing.
        AdapterError: the export differs from the adapter by more than its limits; nothing is kept.
        StoppedError: SIGTERM came; nothing is kept.
    """
    view = view or Console()
    _check_hub_only(to, {"--repo": repo, "--content": content, "--public": not private, "--dry-run": dry_run})
    repository = hub.check_repository(repo) if to == "hub" else None
    form = (content or "peft") if to == "hub" else to
    _check_format(form, quantize)
    require_runtime(form)
    root = Path(run)
    target = (Path(out) if out is not None else root / "export" / _folder_name(form, quantize)).resolve()
    check_target(target, root)
    with terminable(), memory_errors():
        subject = open_run(run, device)
        subject.public = repository is not None
        _make(subject, form, _numbers(subject, form, quantize), target, rows, device, view)
    record = read_json(target / RECORD)
    upload = _publish(target, record, repository, private, dry_run, view) if repository else None
    return Export(target, record, upload)


def _make(subject: Subject, form: str, numbers: str, target: Path, rows: int, device: str, view: Watcher) -> None:
    """Write an export, load it back, compare, and give it its name."""
    notes = _preflight(subject, form)
    sample = draw_sample(subject, rows)
    if form == "ollama" and subject.kind in TEMPLATED_KINDS:
        pieces_of(subject, sample.prompts)  # before minutes of work
    notes += [sample.note] if sample.note else []
    for text in notes:
        view.note(Note(text))
    view.note(Note(f"scoring {len(sample.probes)} {sample.origin} rows with the adapter in tunery"))
    tuned = score_tuned(subject, sample, device)

    def fill(folder: Path) -> None:
        view.note(Note(f"writing {form} ({numbers})"))
        more = WRITERS[form](subject, sample, numbers, folder)
        write_card(subject.paths.root, folder, form)
        view.note(Note("loading it back and comparing"))
        verdict = verify(subject, sample, tuned, form, numbers, folder, device)
        write_json(folder / RECORD, _record(subject, sample, form, numbers, verdict.as_dict(), notes + more, folder))

    write_export(target, fill)


def _publish(
    target: Path, record: Mapping[str, Any], repository: str, private: bool, dry_run: bool, view: Watcher
) -> dict[str, Any]:
    """Upload an export, or say what would be uploaded."""
    upload = {"repository": repository, "sent": not dry_run, **hub.what_would_go(target, record["format"])}
    if not dry_run:
        view.note(Note(f"uploading {len(upload['files'])} files to {repository}"))
        upload["address"] = hub.upload(target, repository, private=private, facts=record)
    return upload


# --------------------------------------------------------------------------- before anything is written


def _check_hub_only(to: str, given: Mapping[str, Any]) -> None:
    if to != "hub" and (settings := [name for name, value in given.items() if value]):
        raise ConfigError(f"{settings[0]} has no meaning for {to}: nothing is uploaded", "it belongs to --to hub")


def _check_format(form: str, quantize: str | None) -> None:
    if form == "hub" or form not in FORMATS:
        raise ConfigError(f"nothing is exported to {form!r}", f"formats: {', '.join(f for f in FORMATS if f != 'hub')}")
    if quantize and form not in DEFAULT_NUMBERS:
        raise ConfigError(
            f"--quantize has no meaning for {form}: its weights keep the base's number format",
            f"it belongs to {', '.join(DEFAULT_NUMBERS)}",
        )
    if quantize:
        (check_numbers if form == "gguf-adapter" else numbers_of)(quantize)


def _numbers(subject: Subject, form: str, quantize: str | None) -> str:
    """The number format of the export's weights."""
    if form in DEFAULT_NUMBERS:
        return (quantize or DEFAULT_NUMBERS[form]).lower()
    return "float32" if form == "peft" else subject.numbers


def _folder_name(form: str, quantize: str | None) -> str:
    return safe_name(f"{form}-{quantize.lower()}" if quantize else form)


def _preflight(subject: Subject, form: str) -> list[str]:
    """What the destination needs to be told.

    Raises:
        ConfigError: it refuses the adapter.
    """
    pieces = subject.pieces.values()
    wanted = Wanted(
        subject.layers, subject.tokenizer, list(subject.pieces),
        tuple(sorted({piece.settings.rank for piece in pieces})),
        tuple(sorted({piece.settings.alpha for piece in pieces})), subject.quantized, subject.weights.lost,
        subject.task.data.system,
    )  # fmt: skip
    found = findings(form, wanted)
    if refused := [finding.message for finding in found if finding.refused]:
        raise ConfigError(f"{form}: {refused[0]}")
    notes = [finding.message for finding in found]
    if form == "peft":  # the folder is for vLLM too, which wants more than PEFT
        notes += [f"for vLLM: {finding.message}" for finding in findings("vllm", wanted)]
    return notes


# --------------------------------------------------------------------------- writing


def _write_peft(subject: Subject, sample: Sample, numbers: str, folder: Path) -> list[str]:
    """A copy of the run's adapter folder that names its base as others can find it."""
    from tunery.evaluation.record import read_run

    adapter = subject.paths.adapter
    config = read_json(adapter / CONFIG_FILE)
    config["base_model_name_or_path"] = hub_id(read_run(subject.paths.root)) or _base_name(subject)
    shutil.copyfile(adapter / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    write_json(folder / CONFIG_FILE, config)
    subject.tokenizer.save_pretrained(folder)
    return []


def _base_name(subject: Subject) -> str:
    """What the run calls its base; of one on this machine only the last part, if others will see it."""
    name = subject.task.model
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if subject.public and Path(name).exists() else name


def _write_merged(subject: Subject, sample: Sample, numbers: str, folder: Path) -> list[str]:
    write_merged(subject, folder)
    return []


def _write_gguf(subject: Subject, sample: Sample, numbers: str, folder: Path) -> list[str]:
    write_model(subject, folder / f"{safe_name(subject.task.name)}-{numbers}.gguf", numbers_of(numbers))
    return []


def _write_gguf_adapter(subject: Subject, sample: Sample, numbers: str, folder: Path) -> list[str]:
    write_adapter(subject, folder / f"{safe_name(subject.task.name)}-adapter-{numbers}.gguf", numbers)
    return ["tokenizer and chat template are those of the base's GGUF file; they must be the run's own"]


def _write_ollama(subject: Subject, sample: Sample, numbers: str, folder: Path) -> list[str]:
    write_model(subject, folder / MODEL, numbers_of(numbers))
    return write_modelfile(subject, sample, folder)


WRITERS: dict[str, Callable[[Subject, Sample, str, Path], list[str]]] = {
    "peft": _write_peft,
    "merged": _write_merged,
    "gguf": _write_gguf,
    "gguf-adapter": _write_gguf_adapter,
    "ollama": _write_ollama,
}
"""Format → what writes it into an empty folder, and tells what a person should know."""


def _record(
    subject: Subject, sample: Sample, form: str, numbers: str, verdict: dict[str, Any], notes: list[str], folder: Path
) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    receipt = subject.receipt
    return {
        "tunery": version_of("tunery"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "run": subject.task.name,
        "format": form,
        "numbers": numbers,
        "base": {
            "name": _base_name(subject),
            "sha256": receipt["model"]["sha256"],
            "license": receipt["model"].get("license"),
        },
        "adapter_sha256": receipt["adapter"]["sha256"],
        "template_sha256": subject.renderer.template_sha256,
        "rows": {"origin": sample.origin, "count": len(sample.probes)},
        "comparison": verdict,
        "notes": notes,
        "files": {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
        },
    }
