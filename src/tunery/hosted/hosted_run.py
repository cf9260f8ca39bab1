"""A task on a server that speaks OpenAI's API: sent, followed, evaluated, left in a run directory like any other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunery.config import Task
from tunery.data.read import read_more
from tunery.errors import ConfigError, DataError, HostedError, StoppedError
from tunery.evaluation.answers import AnswerBook
from tunery.evaluation.compare import HeldOutResult
from tunery.evaluation.record import show
from tunery.evaluation.report import write_report
from tunery.evaluation.tuned import read_evaluation
from tunery.hosted.client import Consent, Service, require_consent
from tunery.hosted.costs import answers_sentence, estimate_answers
from tunery.hosted.earlier_run import is_job, load_state, put_aside, recover
from tunery.hosted.hosted_evaluation import Exam, evaluate, make_exam
from tunery.hosted.hosted_plan import HostedPlan, make_plan
from tunery.hosted.hosted_receipt import build_receipt
from tunery.hosted.job import FAILED, cancel, create, failure, find, follow, require_access, upload
from tunery.hosted.job_settings import suffix, to_yaml
from tunery.paths import RunPaths, safe_name, write_atomic
from tunery.progress import Note
from tunery.records.evaluation_record import Evaluation
from tunery.records.hosted_state import HostedState
from tunery.records.run_receipt import HostedReceipt
from tunery.task_file import load_task
from tunery.training.metrics import read_metrics

if TYPE_CHECKING:
    from tunery.progress import Progress


def train_hosted(
    task: Task, paths: RunPaths, resume: str, progress: Progress, consent: Consent | None
) -> tuple[HostedReceipt, Evaluation | None]:
    """Have a task trained; or resume where an earlier call stopped, at whatever point that was.

    Returns:
        The receipt, and the evaluation if there is one.

    Raises:
        TuneryError: see tunery.errors. StoppedError: interrupted; the job on the server continues.
    """
    if resume not in ("auto", "never") and not is_job(resume):
        raise ConfigError(
            "a hosted run has no checkpoints here to resume from", "leave --resume out, or name the run's job: ftjob-…"
        )
    plan = make_plan(task)
    for text in (*plan.data.notes, *plan.remarks):
        progress.note(Note(text))
    if is_job(resume):
        recover(Service(plan.task.hosted, progress.note), plan, paths, resume)
    state = _taken_up(plan, paths)
    if paths.receipt.exists():
        return _finished(plan, state, paths, progress, consent)
    if not state.job_id and not _is_agreed(plan, state, paths):
        require_consent(consent, _what_is_sent(plan))
    service = Service(plan.task.hosted, progress.note)
    with _interruptible(state):
        if not state.job_id:
            _begin(service, plan, state, paths, progress)
        job = follow(service, plan, state, paths, progress)
    state.job = job
    state.save(paths)
    if job["status"] in FAILED:
        raise failure(job, plan)
    receipt = build_receipt(plan, state, read_metrics(paths.metrics))
    receipt.write(paths.receipt)
    evaluation = _evaluate_own(service, plan, state, paths, progress, consent)
    write_report(paths.root)
    return receipt, evaluation


def _taken_up(plan: HostedPlan, paths: RunPaths) -> HostedState:
    """Where the run stands; a new beginning where its last job came to nothing.

    Raises:
        ConfigError: the run belongs to another task.
    """
    now, then = plan.state(), load_state(paths)
    if then is None:
        if left := [path.name for path in (paths.receipt, paths.checkpoints, paths.metrics) if path.exists()]:
            raise ConfigError(
                f"{paths.root} holds a run that was trained here ({', '.join(left)})",
                "give this run its own name with --set name=NAME, or start over with --resume never",
            )
        return now
    if then.status in FAILED:
        now.earlier = [*then.earlier, then.job]
        return now
    if changed := then.differences(now):
        what = f"follows {then.job_id}" if then.job_id else "has begun"
        raise ConfigError(
            f"the run in {paths.root} {what}, and was asked for otherwise: {'; '.join(changed)}",
            "give this run its own name with --set name=NAME, or start over with --resume never (the earlier run is "
            "kept under another name, and its job continues)",
        )
    return then


def _is_agreed(plan: HostedPlan, state: HostedState, paths: RunPaths) -> bool:
    """Whether a person has agreed to just what the plan sends and asks; the run's task and state say what to."""
    if state.estimate != plan.estimate.as_json():
        return False
    then = load_task(paths.task)
    return then.evaluate == plan.task.evaluate and all(
        getattr(then.hosted, name) == getattr(plan.task.hosted, name)
        for name in ("base_deployment", "tuned_deployment")
    )


def _what_is_sent(plan: HostedPlan) -> list[str]:
    rows = " and ".join(
        f"{len(lines):,} {name} rows ({show(len(plan.content(name).encode()), 'bytes')})"
        for name, lines in plan.files.items()
    )
    settings = plan.method[plan.method["type"]]["hyperparameters"]
    how = ", ".join(f"{name} {value}" for name, value in settings.items())
    return [
        f"to be sent to {plan.address}: {rows}, to train {plan.model} ({plan.method['type']}: {how})",
        *plan.cost_sentences(),
    ]


def _begin(service: Service, plan: HostedPlan, state: HostedState, paths: RunPaths, progress: Progress) -> None:
    """Send the files and make the job; each step is written down before the next."""
    if not state.uploaded:
        require_access(service, plan.model)
        put_aside(paths)
    state.estimate = plan.estimate.as_json()
    write_atomic(paths.task, to_yaml(plan.task))
    state.save(paths)
    for name in plan.files:
        if name in state.uploaded:
            continue
        path = paths.root / "sent" / f"{name}.jsonl"
        write_atomic(path, plan.content(name))
        state.uploaded[name] = upload(service, path)
        state.save(paths)
        progress.note(Note(f"sent {name}.jsonl as {state.uploaded[name].id}"))
    validation = {"validation_file": state.uploaded["validation"].id} if "validation" in state.uploaded else {}
    state.job = create(
        service,
        {
            "model": plan.model,
            "training_file": state.uploaded["training"].id,
            **validation,
            "method": state.method,
            "seed": state.seed,
            "suffix": suffix(plan.task),
        },
    )
    state.save(paths)
    progress.note(
        Note(f"{state.job_id} is made; it runs by itself, and the same command follows it again after a break")
    )


@contextlib.contextmanager
def _interruptible(state: HostedState) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if not state.job_id:
            raise StoppedError(
                "interrupted while starting" + ("; a job may have been made all the same" if state.uploaded else ""),
                "run the same command again: it finds a job that was made, and otherwise continues; with --cancel it "
                "is cancelled",
            ) from None
        raise StoppedError(
            f"no longer following {state.job_id}, which continues at {state.address}",
            "run the same command again to follow it; with --cancel it is cancelled",
        ) from None


def cancel_hosted(task: Task, paths: RunPaths, progress: Progress) -> str:
    """Cancel the job of a task; what became of it, in words.

    Raises:
        ConfigError: there is none.
    """
    state = load_state(paths)
    no_job = ConfigError(f"{paths.root} has no job to cancel", "it is made by `tunery train`")
    if state is None or not (state.job_id or "training" in state.uploaded):
        raise no_job
    service = Service(task.hosted.model_copy(update={"base_url": state.address}), progress.note)
    if not state.job_id:  # the answer that told of it may have been lost
        state.job = find(service, state.uploaded["training"].id) or {}
    if not state.job_id:
        raise no_job
    state.job = cancel(service, state.job_id)
    state.save(paths)
    return f"{state.job_id} at {state.address}: {state.status}"


# --------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class _Asking:
    """What an evaluation needs besides its questions."""

    service: Service
    plan: HostedPlan
    state: HostedState
    paths: RunPaths
    progress: Progress
    consent: Consent | None

    def run(self, exam: Exam, agreed: int) -> HeldOutResult:
        """Ask and score; for more than `agreed` questions a side, after asking the person again."""
        task, tuned = self.plan.task, self.state.tuned_model or ""
        names = self.plan.names(tuned)
        book = AnswerBook(self.paths.root / "answers.jsonl")
        longest = task.evaluate.max_new_tokens
        missing = {side: book.missing(name, exam.questions, longest) for side, name in names.items()}
        if max(map(len, missing.values())) > agreed:
            asked = [
                estimate_answers(
                    self.plan.counter, names[side], missing[side], self.plan.price, longest, tuned=side == "tuned"
                )
                for side in missing
            ]
            require_consent(self.consent, [answers_sentence(one) for one in asked if one.questions])
        try:
            return evaluate(self.service, book, exam, names, task.evaluate, task.hosted.parallel, self.progress.note)
        except KeyboardInterrupt:
            raise StoppedError(
                "interrupted while evaluating; the model is trained, and the answers so far are kept",
                "run the same command again to continue",
            ) from None
        except HostedError as error:
            raise HostedError(
                f"{tuned} is trained, and could not be evaluated: {error.message}",
                "run the same command again later; where models must be deployed before they answer (Azure), deploy "
                "base and tuned model and name them: --set hosted.base_deployment=NAME "
                "--set hosted.tuned_deployment=NAME",
            ) from None


def _evaluate_own(
    service: Service, plan: HostedPlan, state: HostedState, paths: RunPaths, progress: Progress, consent: Consent | None
) -> Evaluation | None:
    """The run's own evaluation, written down; None where there is none to make."""
    if plan.exam is None:
        return None
    agreed = len(plan.exam.questions) if _is_agreed(plan, state, paths) else 0
    result = _Asking(service, plan, state, paths, progress, consent).run(plan.exam, agreed)
    result.write(paths.evaluation)
    return result.evaluation


def _finished(
    plan: HostedPlan, state: HostedState, paths: RunPaths, progress: Progress, consent: Consent | None
) -> tuple[HostedReceipt, Evaluation | None]:
    """A run whose job is done: evaluated if that is missing or was asked for in another way."""
    receipt, then = HostedReceipt.read(paths.receipt), load_task(paths.task)
    if plan.exam is not None and (plan.task.evaluate != then.evaluate or not paths.evaluation.exists()):
        progress.note(Note(f"{paths.root} is trained; evaluating it"))
        service = Service(plan.task.hosted, progress.note)
        evaluation = _evaluate_own(service, plan, state, paths, progress, consent)
        write_atomic(paths.task, to_yaml(plan.task))
        write_report(paths.root)
        return receipt, evaluation
    progress.note(Note(f"{paths.root} is already finished; to start over use --resume never"))
    if not paths.report.exists():
        write_report(paths.root)
    return receipt, read_evaluation(paths)


def evaluate_hosted(paths: RunPaths, data: Path | None, progress: Progress, consent: Consent | None) -> Evaluation:
    """Ask base and tuned model of a finished run again, or put other questions to them.

    Args:
        data: a file of further rows; its result is written to evaluation-FILE.json.

    Raises:
        TuneryError: the run is not finished, its rows have changed, or the server refuses.
    """
    plan, state = make_plan(load_task(paths.task)), load_state(paths)
    if state is None or not state.tuned_model:
        raise ConfigError(f"{paths.root} holds no finished run", "finish it with `tunery train` and the same task file")
    if data is None:
        if changed := [text for text in state.differences(plan.state()) if text.endswith(" rows")]:
            raise DataError(f"{' and '.join(changed)} have changed since {paths.root} was trained", "restore the data")
        exam, target = plan.exam, paths.evaluation
    else:
        exam, target = _further(plan, data, progress), paths.root / f"evaluation-{safe_name(data.stem)}.json"
    if exam is None:
        raise DataError("there is no held-out row to evaluate on", "set data.validation or data.test")
    result = _Asking(Service(plan.task.hosted, progress.note), plan, state, paths, progress, consent).run(exam, 0)
    result.write(target)
    if data is None:
        write_report(paths.root)
    return result.evaluation


def _further(plan: HostedPlan, data: Path, progress: Progress) -> Exam:
    more = read_more(str(data), plan.task.data, plan.data.kind, plan.data.labels, plan.data.columns)
    for text in more.notes:
        progress.note(Note(text))
    return make_exam(more, data.name, more.test, plan.prompts, plan.task.evaluate)
