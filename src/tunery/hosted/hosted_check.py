"""`tunery check` for a hosted model: the rows as they would be sent, their tokens, and the cost. No server is asked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tunery.config import Task
from tunery.hosted.hosted_plan import make_plan
from tunery.training.build_receipt import read_section
from tunery.training.check import histogram, label_counts


def check_hosted(task: Task, samples: int) -> dict[str, Any]:
    """As tunery.training.check.check; "hosted" stands in the place of "training".

    Raises:
        ConfigError, DataError: as tunery.hosted.hosted_plan.make_plan.
    """
    plan = make_plan(task)
    data, lengths = plan.data, np.asarray(plan.lengths)
    return {
        "name": task.name,
        "notes": data.notes,
        "data": {
            **read_section(data, plan.prompts.instruction),
            **{
                f"{name}_rows": len(rows)
                for name, rows in (("train", data.train), ("validation", data.validation), ("test", data.test))
            },
            "dropped": 0,
            "dropped_rows": [],
            "truncated": len(plan.too_long),
            "truncated_rows": plan.too_long,
        },
        "tokens": {
            "all": int(lengths.sum()),
            "exact": plan.counter.exact,
            "shortest": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "longest": int(lengths.max()),
            "histogram": histogram(lengths),
        },
        "labels": label_counts(data),
        "hosted": {
            "model": plan.model,
            "address": plan.address,
            "method": plan.method,
            "estimate": plan.estimate.as_json(),
            "sentences": plan.estimate.sentences(),
        },
        "remarks": plan.remarks,
        "samples": [_pieces(json.loads(line)) for line in plan.files["training"][:samples]],
        "sample_names": [example.where for example in data.train[:samples]],
        "sample_sides": [None for _ in data.train[:samples]],
        "sample_lines": [example.where.line for example in data.train[:samples]],
    }


def _pieces(row: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """A row's text in stretches that are trained and that are not."""
    if "input" not in row:
        return list(_conversation(row["messages"]))
    answers = (("preferred", row["preferred_output"]), ("not preferred", row["non_preferred_output"]))
    prompt = [(text, False) for text, _ in _conversation(row["input"]["messages"])]
    return [*prompt, *(piece for name, answer in answers for piece in ((f"({name}) ", False), *_conversation(answer)))]


def _conversation(messages: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, bool]]:
    for message in messages:
        yield f"{message['role']}: ", False
        calls = "".join(json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ())
        yield f"{message.get('content') or ''}{calls}", message["role"] == "assistant" and message.get("weight", 1) != 0
        yield "\n", False
