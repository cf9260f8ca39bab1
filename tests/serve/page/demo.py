"""Jobs to look at: one runs, one waits, one succeeded, one failed, one is paused. Made for pictures of the page."""

from __future__ import annotations

import json
import time

from tests.serve.page.fake_jobs import BASE, FakeJob, StoredFile
from tests.serve.page.fake_server import State

QUESTIONS = (
    ("My delivery is late, where is it?", "I'm sorry about that. Please give me the order number, and I will look."),
    ("How do I send something back?", "Print the label from your account, and bring the parcel to any post office."),
    ("I was charged twice.", "I'm sorry. Please send me both amounts and the date; I will have one of them paid back."),
    ("Do you ship to Norway?", "Yes, in four to six days. The customs fee is shown before you pay."),
)

PLANS = (
    ("tone", 1.0, 90_000),
    ("export", 0.0, 50_000),
    ("returns", 0.34, 9_000),
    ("desk", 0.56, 130),
    ("", 0.0, 40),
)
"""Suffix, share of the steps that are done, and age in seconds."""


def chat_rows(count: int) -> bytes:
    """JSON lines of a help desk."""
    lines = []
    for index in range(count):
        question, answer = QUESTIONS[index % len(QUESTIONS)]
        messages = [
            {"role": "system", "content": "You are the help desk of a shop. Answer briefly."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines).encode()


def bad_rows() -> bytes:
    """Twelve rows with three mistakes, on the lines 3, 5 and 8."""
    lines = chat_rows(12).decode().splitlines()
    lines[2] = lines[2].replace('"role": "assistant"', '"role": "asistant"')
    lines[4] = lines[4][:-9]
    lines[7] = json.dumps({"messages": [{"role": "user", "content": 42}, {"role": "assistant", "content": "Hi"}]})
    return "\n".join(lines).encode()


PLANS = (
    ("tone", 1.0, 90_000),
    ("export", 0.0, 50_000),
    ("returns", 0.34, 9_000),
    ("desk", 0.56, 130),
    ("", 0.0, 40),
)
"""Suffix, share of the steps that are done, and age in seconds."""


def fill(state: State) -> None:
    """Put the jobs into `state`."""
    desk, held, bad = (
        StoredFile("help-desk.jsonl", chat_rows(1200)),
        StoredFile("help-desk-held-out.jsonl", chat_rows(120)),
        StoredFile("export-2026-11.jsonl", bad_rows()),
    )
    state.files[held.id] = held
    for suffix, share, age in PLANS:
        job = add_job(state, bad if suffix == "export" else desk, suffix, share, age, validation_file=held.id)
        if suffix == "returns":
            job.status = "paused"
            job.say("The job was paused")


def add_job(state: State, file: StoredFile, suffix: str, share: float, age: int = 60, **more: str) -> FakeJob:
    """A job of which this share of the steps is done; one on a bad file has failed."""
    state.files[file.id] = file
    asked = {"model": BASE, "training_file": file.id, "suffix": suffix or None, "seed": 7, **more}
    job = FakeJob(asked, file, state.seconds_a_step)
    job.created_at = int(time.time()) - age
    state.jobs[job.id] = job
    problems = file.problems("supervised")
    if problems:
        job.fail(problems)
        job.finished_at = job.created_at + 2
    elif share:
        job.say("Files validated, moving job to queued state")
        job.say("Fine-tuning job started")
        job.status, job.trained = "running", share * job.total * job.seconds_a_step
        job.advance(free=True)
        _set_times(job, age, share)
    return job


def _set_times(job: FakeJob, age: float, share: float) -> None:
    """Spread the events over the time since the job was made."""
    lasted = min(age, 420) if share == 1 else min(age, 120)
    for index, event in enumerate(job.events):
        event["created_at"] = int(job.created_at + lasted * index / len(job.events))
    if share == 1:
        job.finished_at = int(job.created_at + lasted)
