"""Moving house: a model that was tuned elsewhere, captured while it lives, trained anew here, and put side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tunery.config import KindName
from tunery.config_hosted import HostedConfig
from tunery.data.read import read_data
from tunery.errors import ConfigError, DataError, HostedError, StoppedError
from tunery.evaluation.answers import AnswerBook, Answered, Question, lines_from, read_answers
from tunery.evaluation.tuned import TunedModel
from tunery.hosted.capture import TRAINING, Capture, fetch, from_files, is_capture, open_capture
from tunery.hosted.client import Consent, Service, is_gone, require_consent
from tunery.hosted.comparison import Finished, compare_with_hosted
from tunery.hosted.costs import answers_sentence, estimate_answers, load_prices
from tunery.hosted.job import DONE
from tunery.hosted.querying import ANSWERS_LONGEST, Asker, ask_all
from tunery.hosted.task_from_job import MovedRows, read_rows, target_name, task_from_job
from tunery.jsonl import JsonObject, append_lines
from tunery.models.model_source import locate
from tunery.openai_api.token_counter import TokenCounter
from tunery.paths import file_sha256, safe_name, write_atomic
from tunery.progress import Note
from tunery.task_file import load_task

if TYPE_CHECKING:
    from tunery.progress import Progress


@dataclass(frozen=True)
class Move:
    """What a person asks for.

    Attributes:
        source: a job ("ftjob-…"), the model it made ("ft:…"), or a folder captured earlier; None for `files` alone.
        to: the base to train here; None only with `capture_only`.
        out: the folder that everything goes into; None: runs/ and the job's name.
        files: the person's own copies of the rows, by name (tunery.hosted.capture.TRAINING, VALIDATION).
        answers: the person's own record of what the tuned model answered.
        rows: most held-out rows that the tuned model is asked.
        capture_only: train nothing now.
        overrides: "key=value" settings over those that follow from the job.
        hosted: where the server is.
    """

    source: str | None
    to: str | None
    out: Path | None = None
    files: dict[str, Path] = field(default_factory=dict)
    answers: Path | None = None
    rows: int = 200
    capture_only: bool = False
    overrides: tuple[str, ...] = ()
    hosted: HostedConfig = field(default_factory=HostedConfig)


@dataclass(frozen=True)
class Migration:
    """What came of it.

    Attributes:
        folder: holds capture/, the task file and the run directory.
        answers: answers of the tuned model that were captured.
        run: of the model trained here; None with `capture_only`.
        result: the content of side-by-side.json; None where there is nothing to compare.
    """

    folder: Path
    answers: int
    run: Finished | None = None
    result: JsonObject | None = None

    def as_json(self) -> JsonObject:
        """For machines."""
        run = None if self.run is None else str(self.run.path)
        return {"folder": str(self.folder), "answers": self.answers, "run": run, "side_by_side": self.result}


def migrate(
    move: Move,
    progress: Progress,
    consent: Consent | None,
    train: Callable[[Path, Sequence[str]], Finished],
    load: Callable[[Path], TunedModel],
) -> Migration:
    """Capture, train, compare; each part is kept, and not done again when the same command is given again.

    Args:
        train: trains a task file.
        load: loads a run directory.

    Raises:
        TuneryError: see tunery.errors; what was captured before is kept.
    """
    _require_base(move)
    capture, service = _capture(move, progress)
    rows = _rows(move, capture, progress)
    asked = rows.asked[: move.rows]
    folder = capture.folder.parent
    task = None if move.to is None else _task(move, capture, move.to, rows.kind)
    if move.answers is not None:
        _take_own_answers(move.answers, capture, rows.asked)
    elif service is not None:
        _ask(move, service, capture, asked, progress, consent)
    answered = [(question, answer) for question, answer in read_answers(capture.answers) if not answer.refused]
    if move.capture_only or task is None:
        return Migration(folder, len(answered))
    texts = [(question, answer) for question, answer in answered if answer.is_text]
    _tell_what_is_missing(capture, asked, texts, move, progress)
    run = train(task, move.overrides)
    result = compare_with_hosted(capture, rows, texts, run, load(run.path), progress.note) if texts else None
    return Migration(folder, len(answered), run, result)


def _require_base(move: Move) -> None:
    """Find the model to train before anything is asked or paid.

    Raises:
        ConfigError: none is named, or it is not there.
    """
    if move.to is not None:
        locate(move.to, weights=False)
    elif not move.capture_only:
        raise ConfigError(
            "which model is to be trained here?",
            "name it with --to, e.g. --to smollm2-135m-instruct, or save everything now with --capture-only",
        )


def _rows(move: Move, capture: Capture, progress: Progress) -> MovedRows:
    try:
        rows = read_rows(capture)
    except DataError as error:
        if not move.capture_only:
            raise
        raise HostedError(
            f"the rows are saved in {capture.folder}, but could not be read, so the model was not asked: {error}",
            "give rows that can be read with --files and --validation, into another folder (--out)",
        ) from None
    if rows.problem:
        progress.note(Note(f"only the validation rows are asked: {rows.problem}"))
    return rows


def _task(move: Move, capture: Capture, to: str, kind: KindName) -> Path:
    """The task file, which can be trained with the settings given.

    Raises:
        ConfigError, DataError: it cannot.
    """
    folder = capture.folder.parent
    path = folder / f"{target_name(to)}.yaml"
    if not path.exists():  # one that a person has changed stays
        write_atomic(path, task_from_job(capture, to, folder, kind))
    task = load_task(path, move.overrides)
    read_data(task.data, task.seed)
    return path


def _tell_what_is_missing(
    capture: Capture, asked: Sequence[Question], texts: Sequence[Answered], move: Move, progress: Progress
) -> None:
    """Say before the training, which may take hours, what can be put side by side after it."""
    if not texts:
        progress.note(Note("no answer of the tuned model was captured, so there will be nothing to put side by side"))
    elif move.answers is None and (missing := {one.key for one in asked} - {one.key for one, _ in texts}):
        progress.note(
            Note(
                f"{len(missing):,} of {len(asked):,} questions have no answer of the tuned model; it can only be asked "
                f"with the job's name: tunery migrate {capture.name} --capture-only"
            )
        )


# --------------------------------------------------------------------------- capture


def _capture(move: Move, progress: Progress) -> tuple[Capture, Service | None]:
    """What is moved, and the server it comes from if that can still be asked."""
    if move.source is None:
        if TRAINING not in move.files:
            raise ConfigError("what is to be moved?", "name a job (ftjob-…), a captured folder, or --files TRAIN.jsonl")
        return from_files(_folder(move, move.files[TRAINING].stem), move.files), None
    if Path(move.source).is_dir():
        if not is_capture(Path(move.source)):
            raise ConfigError(f"{move.source} holds no captured job", "name the job itself: tunery migrate ftjob-…")
        if move.files:
            raise ConfigError("--files and --validation go with a job, not with a captured folder", "leave them out")
        return open_capture(Path(move.source)), None
    service = Service(move.hosted, progress.note)
    return fetch(service, move.source, _folder(move, move.source), move.files, progress.note), service


def _folder(move: Move, name: str) -> Path:
    return (move.out or Path("runs") / safe_name(name.replace(":", "-"))) / "capture"


def _take_own_answers(path: Path, capture: Capture, questions: Sequence[Question]) -> None:
    """Take the answers that a person has kept."""
    if not path.is_file():
        raise ConfigError(f"there is no file {path}", "check --answers")
    lines = lines_from(path, questions)
    if capture.answers.exists():  # captured ones were paid for
        capture.answers.replace(capture.answers.with_name(f"answers-{file_sha256(capture.answers)[:8]}.jsonl"))
    append_lines(capture.answers, lines)


def _ask(
    move: Move,
    service: Service,
    capture: Capture,
    asked: Sequence[Question],
    progress: Progress,
    consent: Consent | None,
) -> None:
    """Put the held-out questions to the tuned model that it was not asked yet."""
    if capture.tuned_model is None:
        if move.capture_only and capture.job.get("status") not in DONE:
            raise HostedError(
                f"{capture.name} has made no model yet ({capture.job.get('status')}); its rows are in {capture.folder}",
                "run the same command again when it has",
            )
        progress.note(Note(f"{capture.name} {capture.job.get('status')}: it made no model that could be asked"))
        return
    book = AnswerBook(capture.answers)
    missing = book.missing(capture.tuned_model, asked, ANSWERS_LONGEST)
    if not missing:
        return
    counter, model = TokenCounter(str(capture.job["model"])), capture.tuned_model
    prices = load_prices(move.hosted, service.server.is_openais)
    cost = estimate_answers(counter, model, missing, prices.of(model), ANSWERS_LONGEST, tuned=True)
    about = "" if counter.exact else "about "
    require_consent(consent, [f"{service.address}: {answers_sentence(cost, about)} ({prices.words})"])
    asker = Asker(service, model, ANSWERS_LONGEST, logprobs=True)
    try:
        ask_all(asker, book, asked, move.hosted.parallel, progress.note)
    except HostedError as error:
        missing = book.missing(model, asked, ANSWERS_LONGEST)
        kept = f"{len(asked) - len(missing):,} of {len(asked):,} answers are kept in {capture.folder}"
        if move.capture_only or not is_gone(error):
            raise HostedError(
                f"the tuned model could not be asked: {error.message}; {kept}, with all the rest",
                f"run the same command again, or use what is there: tunery migrate {capture.folder.parent} --to MODEL",
            ) from error
        progress.note(Note(f"the tuned model does not answer any more: {error.message}; {kept}"))
    except KeyboardInterrupt:
        raise StoppedError(
            f"interrupted; the answers so far are in {capture.answers}", "run the same command again to continue"
        ) from None
