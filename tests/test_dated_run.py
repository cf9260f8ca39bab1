"""A run whose chat template writes the date keeps the date on which it was begun."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

import tunery
from tests.tiny import CHATML, save_tiny_llama, tiny_tokenizer
from tunery.console import Console
from tunery.errors import CheckpointError

DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML
QUIET = Console(quiet=True)


def test_a_run_that_goes_on_another_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    days = iter([datetime.date(2026, 11, 27), datetime.date(2026, 12, 24), datetime.date(2026, 12, 25)])
    monkeypatch.setattr("tunery.data.prepare.today", lambda tokenizer: next(days))
    save_tiny_llama(tmp_path / "model", tiny_tokenizer(DATED))
    talk = [
        [{"role": "user", "content": f"what is {n}"}, {"role": "assistant", "content": f"it is {n}"}] for n in range(8)
    ]
    rows = [{"messages": messages} for messages in talk]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {"model": "model", "data": {"train": "rows.jsonl", "validation": 2}, "name": "dated"}
    steps = {"batch_size": 2, "max_steps": 3, "save_steps": 1, "precision": "float32"}
    run = tunery.train(**settings, train=steps, evaluate={"enabled": False}, progress=QUIET)
    assert run.receipt["template"]["date"] == "2026-11-27"
    assert any("which is 2026-11-27 throughout" in warning for warning in run.receipt["warnings"])

    (run.path / "receipt.json").unlink()  # as if it had been stopped at its last checkpoint
    resumed = tunery.train(**settings, train=steps, evaluate={"enabled": False}, progress=QUIET)
    assert resumed.receipt["template"]["date"] == "2026-11-27"
    assert resumed.receipt["data"]["rows_sha256"] == run.receipt["data"]["rows_sha256"]

    other = tunery.train(**{**settings, "name": "later"}, train=steps, evaluate={"enabled": False}, progress=QUIET)
    assert other.receipt["template"]["date"] == "2026-12-24"
    assert other.receipt["data"]["rows_sha256"] != run.receipt["data"]["rows_sha256"]
    (other.path / "receipt.json").unlink()
    set_to = {**settings["data"], "date": "2026-12-31"}
    with pytest.raises(CheckpointError, match=r"data\.date: '2026-12-24' → '2026-12-31'"):
        tunery.train(**{**settings, "name": "later", "data": set_to}, train=steps, progress=QUIET)
