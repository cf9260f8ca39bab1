"""Records: typed, validated on reading, and read as the JSON that they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tunery.errors import AdapterError, CheckpointError
from tunery.evaluation.tuned import read_evaluation, read_receipt
from tunery.paths import RunPaths
from tunery.records.evaluation_record import Evaluation
from tunery.records.run_receipt import Receipt, receipt_of
from tunery.records.typed_record import Record, RecordError

EARLIER = Path(__file__).parent / "earlier" / "runs" / "labels" / "receipt.json"


def test_an_earlier_receipt_is_read_and_written_back_as_it_was() -> None:
    values = json.loads(EARLIER.read_text())
    receipt = receipt_of(values)
    assert isinstance(receipt, Receipt)
    assert receipt.as_json() == values
    assert receipt.lora.variant == "lora"  # that version did not say
    assert "variant" not in receipt["lora"]


def test_a_record_is_an_object_and_the_json_that_it_is(tmp_path: Path) -> None:
    receipt = Receipt.read(EARLIER)
    assert receipt.training.steps == receipt["training"]["steps"] == 12
    assert receipt.get("nothing") is None
    with pytest.raises(KeyError):
        receipt["nothing"]
    assert isinstance(receipt, Mapping)
    assert dict(receipt)["name"] == "labels"
    assert list(receipt)[:2] == ["tunery", "created"] or set(receipt) == set(json.loads(EARLIER.read_text()))
    receipt.write(tmp_path / "receipt.json")
    assert json.loads((tmp_path / "receipt.json").read_text()) == receipt
    assert receipt != {**receipt.as_json(), "name": "other"}


def test_fields_of_a_later_version_are_kept() -> None:
    values = json.loads(EARLIER.read_text())
    values["training"]["planet"] = "Mars"
    values["moon"] = {"phase": 3}
    receipt = receipt_of(values)
    assert receipt.as_json() == values
    assert receipt["training"]["planet"] == "Mars"


def test_a_damaged_receipt_is_refused_with_its_field(tmp_path: Path) -> None:
    values = json.loads(EARLIER.read_text())
    values["training"]["steps"] = "many"
    with pytest.raises(RecordError, match=r"training\.steps"):
        receipt_of(values)
    (tmp_path / "receipt.json").write_text(json.dumps(values))
    with pytest.raises(AdapterError, match=r"receipt\.json cannot be read: training\.steps"):
        read_receipt(RunPaths(tmp_path))
    (tmp_path / "receipt.json").write_text("[1")
    with pytest.raises(AdapterError, match="cannot be read"):
        read_receipt(RunPaths(tmp_path))


def test_a_record_cannot_be_made_from_something_else() -> None:
    with pytest.raises(RecordError):
        Record.of([1, 2])


def test_an_earlier_evaluation_is_read_and_written_back_as_it_was(tmp_path: Path) -> None:
    file = EARLIER.with_name("evaluation.json")
    values = json.loads(file.read_text())
    evaluation = Evaluation.read(file)
    assert evaluation.as_json() == values
    assert evaluation.rows == 8
    (tmp_path / "evaluation.json").write_text(json.dumps({**values, "rows": None}))
    with pytest.raises(CheckpointError, match=r"evaluation\.json cannot be read: rows"):
        read_evaluation(RunPaths(tmp_path))
    assert read_evaluation(RunPaths(tmp_path / "nowhere")) is None
