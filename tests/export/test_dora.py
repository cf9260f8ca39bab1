"""A DoRA adapter exported: merged, as GGUF and for PEFT; and refused where it cannot stand by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

import tunery
from tests.export.runs import QUIET, make_run, save_base
from tunery.errors import ConfigError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dora")
    return make_run(folder, save_base(folder / "base", "llama"), "chat", "lora.variant=dora")


@pytest.fixture(scope="module")
def gpt2_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dora-gpt2")
    return make_run(folder, save_base(folder / "base", "gpt2"), "completion", "lora.variant=dora")


@pytest.mark.parametrize("form", ["peft", "merged", "gguf"])
def test_it_is_exported_and_every_update_is_there(run: Path, form: str, tmp_path: Path) -> None:
    export = tunery.export_run(run, form, out=tmp_path / form, progress=QUIET)
    comparison = export.record["comparison"]
    assert comparison["difference"]["agreement"] == 1.0
    assert comparison["update"]["least_share"] == pytest.approx(1.0, abs=0.05)


def test_a_base_that_stores_its_weights_the_other_way_round_is_merged_too(gpt2_run: Path, tmp_path: Path) -> None:
    export = tunery.export_run(gpt2_run, "merged", out=tmp_path / "merged", progress=QUIET)
    assert export.record["comparison"]["difference"]["agreement"] == 1.0


def test_the_adapter_alone_is_refused_with_what_works_instead(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="DoRA rescales them too") as error:
        tunery.export_run(run, "gguf-adapter", out=tmp_path / "x", progress=QUIET)
    assert "--to merged or --to gguf" in str(error.value)
    assert not (tmp_path / "x").exists()


def test_it_is_known_before_any_training(run: Path) -> None:
    found = tunery.check_destinations(run / "task.yaml", ["vllm", "gguf-adapter", "merged", "peft"])
    refused = {finding.destination for finding in found if finding.refused}
    assert refused == {"vllm", "gguf-adapter"}


def test_the_receipt_names_the_variant(run: Path) -> None:
    from tunery.paths import read_json

    receipt = read_json(run / "receipt.json")
    assert receipt["lora"]["variant"] == "dora"
    assert any(name.endswith("lora_magnitude_vector") for name in receipt["lora"]["tensors"])
    assert receipt["reload"]["ok"]


def test_a_half_precision_base_that_stores_its_weights_the_other_way_round(tmp_path: Path) -> None:
    import torch

    base = save_base(tmp_path / "base", "gpt2", torch.bfloat16)
    run = make_run(tmp_path / "run", base, "completion", "lora.variant=dora")
    export = tunery.export_run(run, "merged", out=tmp_path / "merged", progress=QUIET)
    assert export.record["comparison"]["difference"]["agreement"] > 0.9


def test_a_server_refuses_it_at_once(run: Path) -> None:
    from tunery.serve.jobs.translate import check_defaults

    with pytest.raises(ConfigError, match=r"lora\.variant: dora cannot be served"):
        check_defaults({"lora": {"variant": "dora"}})
