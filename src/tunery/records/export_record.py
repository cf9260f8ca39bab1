"""export.json: what was exported, from which run, and how far it is from the adapter."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tunery.records.typed_record import Record

VERSION = 1


class ExportRecord(Record):
    """Of one export."""

    version: int = Field(default=VERSION, description="of this format")
    tunery: str = Field(description="version that exported")
    created: str = Field(description="time, UTC")
    run: str = Field(description="name of the run")
    format: str = Field(description="the target: peft, merged, gguf, …")
    numbers: str = Field(description="dtype of the weights")
    base: dict[str, Any] = Field(description="name, sha256 and licence of the base")
    adapter_sha256: str = Field(description="of the run's adapter")
    template_sha256: str = Field(description="of the chat template")
    rows: dict[str, Any] = Field(description="origin and count of the rows compared")
    comparison: dict[str, Any] = Field(description="differences, limits, tokens, and what is left of each update")
    notes: list[str] = Field(description="what to know about it")
    files: dict[str, dict[str, Any]] = Field(description="file → bytes and sha256")
