"""Bases in 4 and 8 bits: the same gradient as with the unpacked weights, from the task file to the receipt."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import tunery
from tests.support.shapes import tiny_model, token_ids
from tests.test_api import QUIET, adapter, project, same  # noqa: F401
from tests.tiny import save_tiny_llama
from tests.training.test_gradients import make_rows, relative
from tunery.data.batching import pack
from tunery.errors import ConfigError, ModelError
from tunery.fast.adapters import apply_lora, merge
from tunery.fast.packed_model import optimize_model
from tunery.lora.attach import adapter_state, disabled
from tunery.models import quantized
from tunery.models.load import load_base
from tunery.training.flops import step_flops
from tunery.training.loss import batch_loss
from tunery.versions import install_command

needs_library = pytest.mark.skipif(not quantized.installed(), reason="needs bitsandbytes")
MODES = ("nf4", "int8")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("plain"))


def load(folder: Path | str, mode: str, precision: str = "float32") -> Any:
    return load_base(str(folder), precision=precision, device="cpu", quantize=mode)


def adapted(model: Any) -> Any:
    """With an adapter that does something."""
    apply_lora(model, rank=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter_state(model).values():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


def unpacked(model: Any) -> Any:
    """The same model with plain layers that hold the unpacked weights."""
    plain = copy.deepcopy(model)
    for name, layer in list(quantized.quantized_layers(plain)):
        plain.set_submodule(name, quantized.plain_layer(layer, quantized.unpacked_weight(layer)))
    return plain.requires_grad_(False)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    ids = token_ids(3, 20)
    logits = model(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    found = {name: tensor.grad for name, tensor in adapter_state(model).items() if tensor.grad is not None}
    assert found.keys() == adapter_state(model).keys()
    return found


# --------------------------------------------------------------------------- numbers


@needs_library
@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_that_of_plain_layers_with_the_unpacked_weights(saved: Path, mode: str) -> None:
    model = load(saved, mode).model
    plain = adapted(unpacked(model))
    assert not list(quantized.quantized_layers(plain))
    with torch.no_grad():
        model(token_ids(1, 5))  # a first pass without gradients must leave the weights as they are
    got, wanted = gradients(adapted(model)), gradients(plain)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.norm() > 0
        assert (got[name] - gradient).norm() < 1e-5 * gradient.norm(), name


@needs_library
@pytest.mark.parametrize("mode", MODES)
def test_the_fused_functions_unpack_a_weight_and_keep_what_those_of_plain_layers_keep(
    saved: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunery.fast.fused_linear.FUSES_QUANTIZED", {"cpu"})  # as on a GPU
    model = load(saved, mode).model
    plain = adapted(unpacked(model))
    rows = make_rows(3, 6)
    kept, found = [], []
    for each in (adapted(model), plain):
        flat, parameters = optimize_model(each), list(adapter_state(each).values())
        bytes_kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal bytes_kept
            bytes_kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = batch_loss(flat, pack(rows)).total
        kept.append(bytes_kept)
        found.append(torch.autograd.grad(loss, parameters))
        query = each.model.layers[0].self_attn.q_proj
        assert query.part(torch.zeros(1, query.in_features)) is not None
        assert query.shared is not None
    assert kept[0] == kept[1]
    assert relative(found[0], found[1]) < 1e-5


@needs_library
@pytest.mark.parametrize("mode", MODES)
def test_somebodys_hook_on_a_quantised_layer_is_run(saved: Path, mode: str) -> None:
    layer = adapted(load(saved, mode).model).model.layers[0].self_attn.q_proj
    calls = []
    layer.base.register_forward_pre_hook(lambda *_: calls.append(1))
    layer(torch.zeros(1, layer.in_features))
    assert calls == [1]


@needs_library
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_row_gives_the_same_alone_and_beside_others(saved: Path, mode: str, precision: str) -> None:
    model, ids = load(saved, mode, precision).model, token_ids(4, 12)
    alone, together = model(ids[:1]).logits[0], model(ids).logits[0]
    assert (alone - together).norm() < (1e-5 if precision == "float32" else 2e-2) * together.norm()
    assert optimize_model(model).flattened


@needs_library
@pytest.mark.parametrize("mode", MODES)
def test_without_gradients_the_answer_is_the_same(saved: Path, mode: str) -> None:
    model = adapted(load(saved, mode, "bfloat16").model)
    with torch.no_grad():
        quiet = model(token_ids()).logits
    assert torch.equal(quiet, model(token_ids()).logits.detach())
    with torch.no_grad():
        assert torch.equal(quiet, model(token_ids()).logits)


@needs_library
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", MODES)
def test_a_merged_copy_is_plain_and_answers_as_the_adapter(tmp_path: Path, mode: str, shape: str) -> None:
    tiny_model(shape).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=quantized.load_settings(mode, torch.float32),
        dtype=torch.float32,
        device_map={"": "cpu"},
    ).eval()
    quantized.make_ready(model, torch.float32)
    apply_lora(model, rank=4, targets=["attention"])  # other layers stay quantised and have no adapter
    for tensor in adapter_state(model).values():
        nn.init.normal_(tensor, std=0.2)
    with torch.no_grad():
        tuned = model(token_ids()).logits
        with disabled(model):
            assert (model(token_ids()).logits - tuned).norm() > 0.1
    merged = merge(model)
    with torch.no_grad():
        assert (merged(token_ids()).logits - tuned).norm() < 1e-4 * tuned.norm()
        assert torch.equal(model(token_ids()).logits, tuned)
    assert {type(m) for m in merged.modules()} == {type(m) for m in tiny_model(shape).modules()}
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (again(token_ids()).logits - tuned).norm() < 1e-4 * tuned.norm()


# --------------------------------------------------------------------------- what is counted


@needs_library
@pytest.mark.parametrize("mode", MODES)
def test_weights_are_counted_whole_and_memory_as_packed(tmp_path: Path, mode: str) -> None:
    folder = save_tiny_llama(tmp_path / "m", width=256)
    plain, packed = load(folder, "none"), load(folder, mode)
    assert packed.info.quantization == mode
    assert plain.info.quantization is None
    assert packed.info.parameters == plain.info.parameters
    assert packed.info.sha256 == plain.info.sha256
    assert step_flops(packed.model, 100, 10, 50) == step_flops(plain.model, 100, 10, 50)
    held, expected = quantized.held_bytes(packed.model, 4), quantized.expected_bytes(plain.model, mode, 4)
    assert abs(held - expected) < 0.01 * expected
    assert held < 0.6 * quantized.held_bytes(plain.model, 4)
    assert quantized.held_bytes(plain.model, 4) == 4 * plain.info.parameters
    assert torch.is_floating_point(packed.model.get_output_embeddings().weight)


@needs_library
@pytest.mark.parametrize("mode", MODES)
def test_a_base_that_lies_quantised_on_disk_is_taken_as_it_is(saved: Path, tmp_path: Path, mode: str) -> None:
    base = load(saved, mode)
    base.model.save_pretrained(tmp_path / "q")
    base.tokenizer.save_pretrained(tmp_path / "q")
    again = load(tmp_path / "q", "none")
    assert again.info.quantization == mode
    assert again.info.parameters == base.info.parameters
    assert torch.equal(again.model(token_ids()).logits, base.model(token_ids()).logits)
    assert same(gradients(adapted(again.model)), gradients(adapted(base.model)))
    other = MODES[1 - MODES.index(mode)]
    with pytest.raises(ModelError, match=f"quantised already .{mode}."):
        load(tmp_path / "q", other)


# --------------------------------------------------------------------------- a whole run


@needs_library
@pytest.mark.parametrize("mode", MODES)
def test_a_run_on_a_quantised_base(project: Path, mode: str) -> None:  # noqa: F811
    checked = tunery.check("task.yaml", [f"train.quantize={mode}"])["training"]
    assert checked["quantization"] == mode
    assert checked["memory_bytes"] < tunery.check("task.yaml")["training"]["memory_bytes"]
    run = tunery.train("task.yaml", [f"train.quantize={mode}"], progress=QUIET)
    receipt = run.receipt
    assert receipt["model"]["quantization"] == mode
    assert receipt["model"]["parameters"] == checked["parameters"]
    assert receipt["training"]["final_loss"] < 0.5 * receipt["training"]["first_loss"]
    assert all(tensor["moved"] > 0 for tensor in receipt["lora"]["tensors"].values())
    assert set(adapter(run.path)) == set(receipt["lora"]["tensors"])
    assert receipt["reload"]["ok"]
    assert run.evaluation is not None
    assert run.evaluation["tuned"]["accuracy"] == 1.0
    tuned = run.load()
    assert tuned.base.info.quantization == mode
    assert tuned.classify(["film 3 is fine"])[0]["good"] > 0.9
    assert tunery.evaluate(run.path, progress=QUIET)["tuned"] == run.evaluation["tuned"]


@needs_library
def test_only_the_adapter_moves(saved: Path) -> None:
    model = load(saved, "nf4").model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    gradients(model)
    optimizer.step()
    after = {name: t for name, t in model.state_dict().items() if "lora_" not in name}
    assert same(before, after)


# --------------------------------------------------------------------------- refusals


def test_without_the_library_the_error_names_the_command(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="bitsandbytes, which is not installed") as caught:
        load(saved, "nf4")
    assert caught.value.hint == install_command("quantized")
    assert load(saved, "none").info.quantization is None


def test_float64_is_refused(project: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=r"train\.quantize computes in float32 or bfloat16"):
        tunery.check("task.yaml", ["train.quantize=nf4", "train.precision=float64"])


@needs_library
def test_float64_is_refused_from_python(saved: Path) -> None:
    with pytest.raises(ConfigError, match="does not compute in float64"):
        load(saved, "nf4", "float64")


@needs_library
def test_the_library_fetches_no_code_while_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')")
    program = "import sys; from tunery.models.quantized import bitsandbytes; bitsandbytes(); import kernels"
    search = os.pathsep.join([str(tmp_path), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True
    )
    assert result.stderr.strip() == "kernels was imported"  # by the last statement, not before
    assert result.returncode == 1
    early = program.replace("import kernels", "print('done')")
    done = subprocess.run(
        [sys.executable, "-c", early], env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("done", "")
