#!/usr/bin/env python3
"""Stands in for the Python interpreter that workers run in, and does at once what a real worker takes long for.

Called as `fake_worker.py -P -m tunery.serve.jobs.worker FOLDER [--validate]`. What it does at each start is written in
FOLDER/../../fake.json: {"validate": ["ok", …], "train": ["kill", "ok", …]}; the last entry is repeated.

ok: do the work and exit 0. exit N: write error.json if N is an error's code, and exit N. kill: die by SIGKILL.
checkpoint+kill: a new checkpoint, then die. wait: train until asked to stop, then write a checkpoint and exit 143.
stubborn: hold on for good, whatever is asked.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    folder, validating = Path(sys.argv[4]), "--validate" in sys.argv
    phase = "validate" if validating else "train"
    counter = folder / f"starts-{phase}"
    starts = int(counter.read_text()) if counter.exists() else 0
    counter.write_text(str(starts + 1))
    with open(folder.parent.parent / "starts.log", "a") as log:
        log.write(f"{phase} {folder.name}\n")
    plan = json.loads((folder.parent.parent / "fake.json").read_text())[phase]
    action = plan[min(starts, len(plan) - 1)]
    sys.stderr.write(f"fake worker: {action}\n")
    sys.stderr.flush()
    with Lock(folder / "worker.lock"):
        return act(folder, validating, action)


class Lock:
    """What filelock does on POSIX, without importing it."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        import fcntl

        self.file = open(self.path, "a")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self.file.close()


def act(folder: Path, validating: bool, action: str) -> int:
    if action.startswith("checkpoint+"):
        checkpoint(folder)
        action = action.removeprefix("checkpoint+")
    if action == "ok":
        validated(folder) if validating else trained(folder)
        return 0
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "wait":
        (folder / "waiting").touch()
        while os.read(0, 1):
            pass
        if not validating:
            checkpoint(folder)
        return 143
    if action == "stubborn":
        (folder / "waiting").touch()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(300)
    code = int(action.removeprefix("exit "))
    if code < 75:
        error = {"code": "invalid_training_file", "message": "Example 4: no good", "param": "training_file"}
        (folder / "error.json").write_text(json.dumps(error))
    return code


def validated(folder: Path) -> None:
    hyperparameters = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.0}
    facts = {
        "kind": "chat",
        "examples": 10,
        "validation_examples": 0,
        "hyperparameters": hyperparameters,
        "steps": 3,
        "seconds": 1.0,
        "warnings": [],
    }
    (folder / "validated.json").write_text(json.dumps(facts))


def checkpoint(folder: Path) -> None:
    checkpoints = folder / "run" / "checkpoints"
    number = len(list(checkpoints.glob("step-*"))) + 1 if checkpoints.exists() else 1
    (checkpoints / f"step-{number}").mkdir(parents=True)


def trained(folder: Path) -> None:
    run = folder / "run"
    (run / "adapter").mkdir(parents=True, exist_ok=True)
    with open(folder / "status.jsonl", "a") as status:
        plan = {"kind": "plan", "total": 3, "done": 0, "eval_every": None, "at": time.time()}
        status.write(json.dumps(plan) + "\n")
    lines = [{"step": step, "train_loss": 3.0 - step, "seconds": 0.1} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "receipt.json").write_text(json.dumps({"tokens": {"data": 1234}, "warnings": ["a word of warning"]}))


if __name__ == "__main__":
    sys.exit(main())
