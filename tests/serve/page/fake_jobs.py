"""Jobs that only pretend: a loss curve by formula and a clock. Everything a page needs, nothing trained."""

from __future__ import annotations

import json
import math
import random
import secrets
import string
import time
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

BASE = "smollm2-135m-instruct"
ALIASES = {"gpt-4o-mini": BASE}
FINAL = ("succeeded", "failed", "cancelled")
FEWEST_ROWS = 10


def new_id(prefix: str) -> str:
    """An id as the real server makes them."""
    return prefix + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(24))


# --------------------------------------------------------------------------- files


@dataclass
class StoredFile:
    """An upload, as OpenAI's file object and its bytes."""

    filename: str
    content: bytes
    id: str = field(default_factory=lambda: new_id("file-"))
    purpose: str = "fine-tune"
    created_at: int = field(default_factory=lambda: int(time.time()))

    def wire(self) -> Json:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.content),
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }

    def rows(self) -> list[tuple[int, Any]]:
        """(line, value) of each row; a line that is no JSON is None."""
        found = []
        for line, text in enumerate(self.content.decode(errors="replace").splitlines(), start=1):
            if text.strip():
                try:
                    found.append((line, json.loads(text)))
                except ValueError:
                    found.append((line, None))
        return found

    def problems(self, method: str, fewest: int = FEWEST_ROWS) -> list[Json]:
        """What is wrong with the rows, for a few kinds of mistakes."""
        found = [each for line, row in self.rows() for each in _row_problems(line, row, method)]
        count = len(self.rows())
        if not found and count < fewest:
            message = f"{count} rows, and at least {fewest} are needed"
            found.append(_problem(0, "(file)", message, "add rows"))
        return found

    def check(self, method: str, asked: Json) -> Json:
        """What /api/files/{id}/check answers."""
        problems = self.problems(method, 1 if asked.get("use") == "validation" else FEWEST_ROWS)
        if problems:
            return {"problems": problems[:200], "problems_total": len(problems), "rows": len(self.rows())}
        previews = [_preview(line, row) for line, row in self.rows()[:3]]
        words = [
            (len(piece["text"].split()) + 2, piece["trained"])
            for line, row in self.rows()
            for piece in _preview(line, row)["pieces"]
        ]
        settled = settle(asked, len(self.rows()))
        steps = steps_of(settled, len(self.rows()))
        return {
            "problems": [],
            "rows": len(self.rows()),
            "kind": "preference" if method == "dpo" else "chat",
            "tokens": sum(count for count, _ in words),
            "trained_tokens": sum(count for count, trained in words if trained),
            "previews": previews,
            "steps": steps,
            "hyperparameters": settled,
            "notes": [],
            "seconds_estimate": steps * 1.4,
        }


def _problem(line: int, path: str, message: str, fix: str) -> Json:
    return {"line": line, "field": path, "message": message, "fix": fix}


def _row_problems(line: int, row: Any, method: str) -> list[Json]:
    if not isinstance(row, dict):
        return [_problem(line, "(row)", "not valid JSON", "write one JSON object on the line")]
    key = "input" if method == "dpo" else "messages"
    if key not in row:
        return [_problem(line, key, "missing", f"add {key} to the row")]
    messages = row["input"].get("messages", []) if method == "dpo" else row["messages"]
    found = []
    for index, message in enumerate(messages):
        path = f"{key}[{index}]"
        if message.get("role") not in ("system", "developer", "user", "assistant", "tool"):
            what = f"{message.get('role')!r} is not a role"
            found.append(_problem(line, f"{path}.role", what, "did you mean assistant?"))
        if not isinstance(message.get("content"), str):
            found.append(_problem(line, f"{path}.content", "a text is needed, not a number", "put it in quotes"))
    return found


def _preview(line: int, row: Json) -> Json:
    pieces = []
    messages = row.get("messages") or [*row["input"]["messages"], *row["preferred_output"]]
    for message in messages:
        trained = message["role"] == "assistant"
        pieces.append({"text": f"<|im_start|>{message['role']}\n", "trained": False})
        pieces.append({"text": f"{message['content']}<|im_end|>", "trained": trained})
        pieces.append({"text": "\n", "trained": False})
    return {"line": line, "pieces": pieces}


def settle(asked: Json, rows: int) -> Json:
    """Numbers for what was left to auto."""
    auto = {"n_epochs": 3, "batch_size": max(4, rows // 100), "learning_rate_multiplier": 1.0}
    given = {name: value for name, value in asked.items() if name in auto and value not in (None, "", "auto")}
    return {name: type(auto[name])(given.get(name, value)) for name, value in auto.items()}


def steps_of(numbers: Json, rows: int) -> int:
    """Steps of a run."""
    return numbers["n_epochs"] * math.ceil(rows / numbers["batch_size"])


# --------------------------------------------------------------------------- jobs


@dataclass
class FakeJob:
    """A job that moves with the clock. `seconds_a_step` is its speed; it trains only while it is running."""

    asked: Json
    file: StoredFile
    seconds_a_step: float
    waits: float = 0.1
    id: str = field(default_factory=lambda: new_id("ftjob-"))
    created_at: int = field(default_factory=lambda: int(time.time()))
    status: str = "validating_files"
    error: Json | None = None
    model: str | None = None
    deleted: bool = False
    finished_at: int | None = None
    result_files: list[str] = field(default_factory=list)
    lines: list[Json] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)
    checkpoints: list[Json] = field(default_factory=list)
    trained: float = 0.0
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.kind: str = self.asked.get("method", {}).get("type", "supervised")
        asked = self.asked.get("method", {}).get(self.kind, {}).get("hyperparameters", {})
        self.numbers = settle(asked, len(self.file.rows()))
        self.total = steps_of(self.numbers, len(self.file.rows()))
        self.noise = random.Random(self.id)
        self.say(f"Created fine-tuning job: {self.id}")
        self.say(f"Validating training file: {self.file.id}")

    @property
    def step(self) -> int:
        """Steps done."""
        return len([line for line in self.lines if "train_loss" in line])

    @property
    def name(self) -> str:
        """The ft: name it will have."""
        return f"ft:{self.asked['model']}:local:{self.asked.get('suffix') or ''}:{self.id[-8:]}"

    def advance(self, free: bool) -> None:
        """Do what the time since the last call allows. `free`: there is a place for it to run."""
        now = time.monotonic()
        passed, self.since = now - self.since, now
        if self.status in ("validating_files", "queued"):
            self.waits -= passed
            if self.waits <= 0:
                self._go_on(free)
        elif self.status == "running":
            self.trained += passed
            while self.step < min(self.total, int(self.trained / self.seconds_a_step)):
                self._train_step()
            if self.step >= self.total:
                self._succeed()

    def _go_on(self, free: bool) -> None:
        self.waits = 0.1
        if self.status == "validating_files":
            problems = self.file.problems(self.kind)
            if problems:
                self.fail(problems)
                return
            self.status = "queued"
            self.say("Files validated, moving job to queued state")
        elif free:
            self.status = "running"
            self.say("Fine-tuning job started" if not self.lines else "Fine-tuning job resumed")

    def fail(self, problems: list[Json]) -> None:
        """End with the problems of the training file."""
        first = problems[0]
        message = f"Invalid file format. Example {first['line']}: {first['field']}: {first['message']}. {first['fix']}."
        if len(problems) > 1:
            message += f"\n{len(problems) - 1} more problems."
        self.error = {"code": "invalid_training_file", "param": "training_file", "message": message}
        self.status, self.finished_at = "failed", int(time.time())
        self.say(message, level="error")

    def _train_step(self) -> None:
        step = self.step + 1
        share = step / self.total
        level = 0.42 + 2.1 * math.exp(-5.5 * share)
        loss = level * (1 + self.noise.gauss(0, 0.07))
        accuracy = min(0.99, 0.92 - 0.42 * math.exp(-4 * share) + self.noise.gauss(0, 0.012))
        line: Json = {"step": step, "epoch": round(share * self.numbers["n_epochs"], 4), "train_loss": loss}
        if self.kind == "dpo":
            line |= {"rewards_margin": 2.4 * share + self.noise.gauss(0, 0.2), "rewards_accuracy": accuracy}
        else:
            line["train_token_accuracy"] = accuracy
        self.lines.append(
            {**line, "learning_rate": 4e-4 * (1 - share), "data_tokens_per_second": 1900 / self.seconds_a_step}
        )
        data = {"step": step, "total_steps": self.total, "train_loss": loss, "train_mean_token_accuracy": accuracy}
        self.say(f"Step {step}/{self.total}: training loss={loss:.2f}", kind="metrics", data=data)
        if step % max(1, self.total // 8) == 0 or step == self.total:
            self._validate(step, level * 1.12 + 0.05 * share, accuracy - 0.03, data)

    def _validate(self, step: int, loss: float, accuracy: float, data: Json) -> None:
        other = {"valid_rewards_margin": 2 * step / self.total} if self.kind == "dpo" else {}
        self.lines.append({"step": step, "valid_loss": loss, **(other or {"valid_token_accuracy": accuracy})})
        metrics = {**data, "valid_loss": loss, "valid_mean_token_accuracy": accuracy}
        self.checkpoints.append(
            {
                "id": new_id("ftckpt_"),
                "object": "fine_tuning.job.checkpoint",
                "created_at": int(time.time()),
                "fine_tuned_model_checkpoint": f"{self.name}:ckpt-step-{step}",
                "fine_tuning_job_id": self.id,
                "step_number": step,
                "metrics": {name: value for name, value in metrics.items() if name != "total_steps"},
            }
        )
        self.say(f"Checkpoint created at step {step}")

    def _succeed(self) -> None:
        self.status, self.finished_at, self.model = "succeeded", int(time.time()), self.name
        self.say("New fine-tuned model created")
        self.say("The job has successfully completed")

    def say(self, message: str, level: str = "info", kind: str = "message", data: Json | None = None) -> None:
        """Add an event."""
        event = {
            "id": new_id("ftevent-"),
            "object": "fine_tuning.job.event",
            "created_at": int(time.time()),
            "level": level,
            "message": message,
            "type": kind,
            "data": data,
        }
        self.events.append(event)

    def wire(self) -> Json:
        """OpenAI's job object."""
        left = (self.total - self.step) * self.seconds_a_step
        return {
            "id": self.id,
            "object": "fine_tuning.job",
            "created_at": self.created_at,
            "error": self.error,
            "fine_tuned_model": self.model,
            "finished_at": self.finished_at,
            "hyperparameters": self.numbers,
            "model": self.asked["model"],
            "organization_id": "local",
            "result_files": self.result_files,
            "seed": self.asked.get("seed") or 42,
            "status": self.status,
            "trained_tokens": self.step * 640 if self.status in FINAL and self.step else None,
            "training_file": self.asked["training_file"],
            "validation_file": self.asked.get("validation_file"),
            "method": {"type": self.kind, self.kind: {"hyperparameters": self.numbers}},
            "metadata": self.asked.get("metadata") or {},
            "integrations": [],
            "user_provided_suffix": self.asked.get("suffix"),
            "estimated_finish": int(time.time() + left) if self.status == "running" else None,
        }
