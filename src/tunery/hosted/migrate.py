"""Moving house: a model that was tuned elsewhere, captured while it lives, trained anew here, and put side by side."""

from __future__ import annotations

import datetime
import importlib.metadata
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tunery.config import DataConfig
from tunery.config_hosted import HostedConfig
from tunery.data.example import DataSet, Example
from tunery.data.read import read_data
from tunery.errors import ConfigError, DataError, HostedError, StoppedError
from tunery.evaluation.tuned import TunedModel
from tunery.hosted.ask import ANSWERS_LONGEST, AnswerBook, Asker, ask_all
from tunery.hosted.capture import (
    TRAINING,
    Capture,
    fetch,
    from_files,
    is_capture,
    open_capture,
)
from tunery.hosted.client import Service
from tunery.hosted.consent import Consent, require_consent
from tunery.hosted.equivalent import HELD_OUT, Equivalent, equivalent, target_name
from tunery.hosted.estimate import answers_sentence, estimate_answers
from tunery.hosted.given import common_labels, held_out_questions, lines_from, read_answers
from tunery.hosted.here import HereAnswers, answer_here
from tunery.hosted.jsonl import append
from tunery.hosted.prices import load_prices
from tunery.hosted.questions import Question
from tunery.hosted.receipt import settled_hyperparameters
from tunery.hosted.side_by_side import Pair, compare_sides
from tunery.hosted.side_by_side_page import write_side_by_side
from tunery.hosted.tokens import TokenCounter
from tunery.paths import RunPaths, file_sha256, safe_name, write_atomic, write_json

if TYPE_CHECKING:
    from tunery.training.fit import View

SAMPLES = 24
"""Answers shown side by side."""


class Finished(Protocol):
    """A finished run (tunery.api.Run)."""

    @property
    def path(self) -> Path: ...
    @property
    def receipt(self) -> dict[str, Any]: ...
    @property
    def evaluation(self) -> dict[str, Any] | None: ...


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
    result: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        run = None if self.run is None else str(self.run.path)
        return {"folder": str(self.folder), "answers": self.answers, "run": run, "side_by_side": self.result}


def migrate(
    move: Move,
    view: View,
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
    if move.to is None and not move.capture_only:
        raise ConfigError(
            "which model is to be trained here?",
            "name it with --to, e.g. --to smollm2-135m-instruct, or save everything now with --capture-only",
        )
    capture, service = _capture(move, view)
    try:
        data = read_data(_data_config(capture), int(capture.job.get("seed") or 0))
    except DataError as error:
        if not move.capture_only:
            raise
        view.note(f"the rows are saved; the model was not asked, because they could not be read: {error}")
        return Migration(capture.folder.parent, len(read_answers(capture.answers)))
    if move.answers is not None:
        _take_own_answers(move.answers, capture, held_out_questions(data))
    elif service is not None:
        _ask(move, service, capture, held_out_questions(data, move.rows), view, consent)
    answered = len(read_answers(capture.answers))
    folder = capture.folder.parent
    if move.capture_only or move.to is None:
        return Migration(folder, answered)
    same = equivalent(capture, move.to, folder, data.kind)
    task = folder / f"{target_name(move.to)}.yaml"
    if not task.exists():  # one that a person has changed stays
        write_atomic(task, same.yaml)
    run = train(task, move.overrides)
    if not answered:
        view.note("no answer of the tuned model was captured, so there is nothing to put side by side")
        return Migration(folder, 0, run)
    result = _compare(capture, data, same, run, load, view)
    return Migration(folder, answered, run, result)


# --------------------------------------------------------------------------- capture


def _capture(move: Move, view: View) -> tuple[Capture, Service | None]:
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
    service = Service(move.hosted, view.note)
    return fetch(service, move.source, _folder(move, move.source), move.files, view.note), service


def _folder(move: Move, name: str) -> Path:
    return (move.out or Path("runs") / safe_name(name.replace(":", "-"))) / "capture"


def _data_config(capture: Capture) -> DataConfig:
    validation = capture.validation
    return DataConfig(
        train=str(capture.training),
        validation=str(validation) if validation else HELD_OUT,
        on_bad_row="skip",  # what can be asked is asked; training names the others, and stops
    )


def _take_own_answers(path: Path, capture: Capture, questions: Sequence[Question]) -> None:
    """Take the answers that a person has kept."""
    if not path.is_file():
        raise ConfigError(f"there is no file {path}", "check --answers")
    lines = lines_from(path, questions)
    if capture.answers.exists():  # captured ones were paid for
        capture.answers.replace(capture.answers.with_name(f"answers-{file_sha256(capture.answers)[:8]}.jsonl"))
    append(capture.answers, lines)


def _ask(
    move: Move, service: Service, capture: Capture, asked: Sequence[Question], view: View, consent: Consent | None
) -> None:
    """Put the held-out questions to the tuned model that it was not asked yet."""
    if capture.tuned_model is None:
        view.note(f"{capture.name} {capture.job.get('status')}: it made no model that could be asked")
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
        ask_all(asker, book, asked, move.hosted.parallel, view.note)
    except HostedError as error:
        view.note(f"the tuned model could not be asked: {error}")
    except KeyboardInterrupt:
        raise StoppedError(
            f"interrupted; the answers so far are in {capture.answers}", "run the same command again to go on"
        ) from None


# --------------------------------------------------------------------------- side by side


def _compare(
    capture: Capture,
    data: DataSet,
    same: Equivalent,
    run: Finished,
    load: Callable[[Path], TunedModel],
    view: View,
) -> dict[str, Any]:
    answered = [(question, answer) for question, answer in read_answers(capture.answers) if answer.is_text]
    tuned = load(run.path)
    questions = [question for question, _ in answered]
    tokenizer = tuned.base.tokenizer
    written = (len(tokenizer(answer.text, add_special_tokens=False)["input_ids"]) for _, answer in answered)
    longest = max((tuned.task.evaluate.max_new_tokens, *written))  # no shorter than what it is compared with
    here = answer_here(tuned, questions, longest, view.note)
    pairs = [
        Pair(question, hosted, local)
        for (question, hosted), local in zip(answered, here.answers, strict=True)
        if local.is_text
    ]
    if not pairs:
        raise ConfigError("no question fits into the model's context", "choose a base with a longer one, with --to")
    labels = common_labels(one.reference for one in (*_questions(data, data.train), *_questions(data, data.validation)))
    compared = compare_sides(pairs, labels, SAMPLES)
    result = {
        "tunery": importlib.metadata.version("tunery"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "name": capture.name,
        "kind": data.kind,
        "from": _origin(capture),
        "to": _target(run, tuned),
        "mapping": [list(entry) for entry in same.mapping],
        **compared,
        "speed": {
            "hosted_seconds": _median([pair.hosted.seconds for pair in pairs if pair.hosted.seconds]),
            "local_seconds": here.seconds / max(1, len(pairs)),
            "local_tokens_per_second": here.tokens / here.seconds if here.seconds else None,
        },
        "own_evaluation": run.evaluation,
    }
    result["warnings"] = _warnings(capture, data, pairs, here, len(answered))
    write_json(RunPaths(run.path).root / "side-by-side.json", result)
    write_side_by_side(run.path, result)
    return result


def _questions(data: DataSet, rows: Sequence[Example]) -> list[Question]:
    return held_out_questions(replace(data, validation=list(rows)))


def _keys(data: DataSet, rows: Sequence[Example]) -> set[str]:
    return {question.key for question in _questions(data, rows)}


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _origin(capture: Capture) -> dict[str, Any]:
    job = capture.job
    kept = ("id", "model", "fine_tuned_model", "created_at", "finished_at", "trained_tokens", "seed", "metadata")
    return {
        "address": capture.address,
        **{key: job.get(key) for key in kept},
        "method": (job.get("method") or {}).get("type"),
        "hyperparameters": settled_hyperparameters(job),
    }


def _target(run: Finished, tuned: TunedModel) -> dict[str, Any]:
    receipt = run.receipt
    return {
        "model": tuned.task.model,
        "run": str(run.path),
        "parameters": receipt["model"]["parameters"],
        "trainable_parameters": receipt["lora"]["trainable_parameters"],
        "adapter_bytes": receipt["adapter"]["bytes"],
        "adapter_sha256": receipt["adapter"]["sha256"],
        "dtype": receipt["precision"]["dtype"],
        "device": receipt["device"],
        "train_seconds": receipt["speed"]["train_seconds"],
        "peak_bytes": receipt["memory"]["peak_bytes"],
    }


def _warnings(capture: Capture, data: DataSet, pairs: Sequence[Pair], here: HereAnswers, answered: int) -> list[str]:
    found = []
    trained, held = _keys(data, data.train), _keys(data, data.validation)
    there = trained | held if capture.validation is None else trained
    for keys, who in ((there, "hosted"), (trained, "local")):
        if seen := sum(pair.question.key in keys for pair in pairs):
            found.append(
                f"{seen:,} of the {len(pairs):,} questions are rows that the {who} model learnt, which flatters it"
            )
    if answered > len(pairs):
        found.append(f"{answered - len(pairs):,} questions do not fit into the local model's context and are left out")
    if cut := sum(pair.hosted.finish_reason == "length" for pair in pairs):
        found.append(f"{cut:,} answers of the hosted model were cut at {ANSWERS_LONGEST} tokens")
    if cut := sum(answer.finish_reason == "length" for answer in here.answers):
        found.append(f"{cut:,} answers of the local model were cut at the length of the longest hosted one")
    if len(pairs) < 30:
        found.append(f"{len(pairs)} questions are few: small differences may be chance")
    return found
