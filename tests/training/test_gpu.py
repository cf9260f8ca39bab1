"""What only a GPU can show: its attention, its compiler and a whole run on it. Skipped elsewhere."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tunery
from tests.support.shapes import tiny_model
from tests.tiny import save_tiny_llama
from tests.training.test_gradients import make_rows, relative
from tunery.console import Console
from tunery.data.batching import Row, pack
from tunery.fast import attention_gpu
from tunery.fast.adapters import apply_lora
from tunery.fast.compile import compiling
from tunery.fast.packed_model import PackedModel, optimize_model
from tunery.lora.attach import adapter_state
from tunery.models.load import load_base
from tunery.training.decoder_layers import running_layers, try_compiling
from tunery.training.loss import batch_loss
from tunery.training.scoring import score

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
SHAPES = ("llama", "gpt2", "qwen3", "gemma2", "gpt_oss")
WIDER = {"hidden_size": 128, "head_dim": 32}
"""FlexAttention takes heads from 16 numbers on."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Models of other shapes were compiled in the test before."""
    torch.compiler.reset()
    attention_gpu.forget()
    yield
    torch.compiler.reset()


def lora(name: str, dtype: torch.dtype, device: str) -> tuple[PackedModel, list[Tensor]]:
    """The same random model and adapter in every format and on every device."""
    changes: dict[str, Any] = {"n_embd": 128} if name == "gpt2" else WIDER
    model = tiny_model(name, torch.float64, **changes)
    apply_lora(model, rank=4, targets="attention" if name == "gpt_oss" else "all-linear", seed=1)
    with torch.no_grad():
        for number, tensor in enumerate(adapter_state(model).values()):
            noise = torch.Generator().manual_seed(number)
            tensor.add_(torch.randn(tensor.shape, generator=noise, dtype=tensor.dtype) * 0.05)
    adapter = adapter_state(model)
    model.to(dtype).to(device)  # type: ignore[arg-type]
    if dtype != torch.float64:
        for tensor in adapter.values():
            tensor.data = tensor.data.float()
    return optimize_model(model), list(adapter.values())


def gradient(model: PackedModel, parameters: Sequence[Tensor], rows: Sequence[Row], share: bool) -> list[Tensor]:
    with model.running():
        total = batch_loss(model, pack(rows, share=share)).total
        found = torch.autograd.grad(total, list(parameters))
    return [total.detach()[None].cpu().double(), *(g.cpu().double().flatten() for g in found)]


def padded(model: PackedModel, parameters: Sequence[Tensor], rows: Sequence[Row]) -> list[Tensor]:
    """One padded batch through the model's own forward pass; behind a row, padding needs no mask."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    weights = torch.zeros(len(rows), width, dtype=torch.float64)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.from_numpy(row.ids.astype(np.int64))
        weights[number, : len(row.ids)] = torch.from_numpy(row.weights)
    device = model.device
    logits = model.model(input_ids=ids.to(device), use_cache=False).logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).to(wide), ids[:, 1:].to(device), reduction="none"
    )
    total = (each * weights[:, 1:].to(device, wide)).sum()
    found = torch.autograd.grad(total, list(parameters))
    return [total.detach()[None].cpu().double(), *(g.cpu().double().flatten() for g in found)]


@pytest.mark.parametrize("share", [True, False], ids=["shared", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_the_gradient_is_as_near_to_float64_as_that_of_a_padded_batch(
    name: str, dtype: torch.dtype, share: bool
) -> None:
    rows = make_rows(3, 24)  # more than the 256 tokens below which attention pads
    exact = padded(*lora(name, torch.float64, "cpu"), rows)
    model, parameters = lora(name, dtype, DEVICE)
    assert model.flattened, attention_gpu.refusals()
    ours = relative(gradient(model, parameters, rows, share), exact)
    theirs = relative(padded(model, parameters, rows), exact)
    assert attention_gpu.refusals() == []
    assert ours < max(2 * theirs, 1e-4)


def test_the_kernels_meant_for_each_case_are_the_ones_that_run() -> None:
    model, parameters = lora("llama", torch.bfloat16, DEVICE)
    gradient(model, parameters, make_rows(3, 24), share=True)
    gradient(model, parameters, make_rows(3, 24), share=False)
    tried = {key[0] for key in attention_gpu._tried}
    assert tried == {attention_gpu.by_tree, attention_gpu.by_lengths, attention_gpu.by_equal_lengths}
    assert attention_gpu.refusals() == []


def test_batches_of_many_lengths_do_not_each_compile_a_kernel() -> None:
    model, _ = lora("gemma2", torch.bfloat16, DEVICE)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before > 0, "kernels are tried, and so compiled, before the first batch"
    for seed in range(12):
        score(model, make_rows(seed, 30 + 5 * seed))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_compiled_functions_give_the_same_gradient(recompute: bool) -> None:
    model, parameters = lora("llama", torch.float32, DEVICE)
    rows = make_rows(3, 24)
    with compiling(False):
        wanted = gradient(model, parameters, rows, share=True)
    with running_layers(model.model, recompute):
        said = try_compiling(model, parameters)
        assert said == ["element-wise functions are compiled (train.compile)"]
        assert relative(gradient(model, parameters, rows, share=True), wanted) < 1e-4


def test_a_model_is_loaded_straight_onto_the_gpu(tmp_path: Path) -> None:
    folder = str(save_tiny_llama(tmp_path / "base"))
    there = load_base(folder, precision="float32", device=DEVICE).model
    here = load_base(folder, precision="float32", device="cpu").model
    assert there.device.type == DEVICE
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there.parameters(), here.parameters(), strict=True))
    assert all(buffer.device.type == DEVICE for buffer in there.buffers())


@pytest.mark.parametrize("compiled", ["true", "false"])
def test_a_whole_run_learns_and_its_adapter_reads_back(
    compiled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open("rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"film {i} is {'fine' if i % 2 else 'dull'}", "good" if i % 2 else "bad"] for i in range(80))
    folder = save_tiny_llama(tmp_path / "base")
    (tmp_path / "task.yaml").write_text(
        f"name: films\nmodel: {folder}\ndata:\n  train: rows.csv\n  validation: 16\n  instruction: good or bad?\n"
        f"lora:\n  rank: 4\ntrain:\n  epochs: 3\n  batch_size: 8\n  learning_rate: 0.02\n  device: {DEVICE}\n"
        f"  compile: {compiled}\n"
    )
    run = tunery.train("task.yaml", progress=Console(quiet=True))
    assert run.receipt["device"]["kind"] == DEVICE
    assert run.receipt["reload"]["ok"]
    assert run.receipt["training"]["compiled"] is (compiled == "true")
    assert run.receipt["training"]["final_loss"] < run.receipt["training"]["first_loss"] / 2
    assert run.evaluation is not None
    assert run.evaluation["tuned"]["accuracy"] > 0.9
