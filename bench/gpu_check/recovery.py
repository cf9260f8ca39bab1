"""What a run must survive: AdamW's state through a checkpoint and back, and memory that runs out within a step."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu_check.check import Check
from bench.gpu_check.trainer import random_llama, random_rows, trainer_of
from tunery.config import TrainConfig
from tunery.fast.trial import relative_difference
from tunery.training.checkpoint import _optimizer_tensors, _restore_optimizer
from tunery.training.guard import MicroBatchLimit
from tunery.training.loop import StepResult, make_optimizer, train_step

MEMORY = 0.4
"""Part of a step's memory, beyond what is held between steps, that is left to it so that it runs out."""

Adapter = dict[str, Tensor]


def resume(check: Check) -> None:
    """One step, AdamW's state out of the optimizer and into another, one more step with each: the same to the bit."""
    torch.manual_seed(0)
    one: Adapter = {name: torch.nn.Parameter(check.noise(16, 64, dtype=torch.float32)) for name in ("a", "b")}
    optimizer = make_optimizer(one, TrainConfig())
    _update(one, optimizer)
    two: Adapter = {name: torch.nn.Parameter(tensor.detach().clone()) for name, tensor in one.items()}
    resumed = make_optimizer(two, TrainConfig())
    kept = {name: tensor.clone() for name, tensor in _optimizer_tensors(one, optimizer).items()}
    _restore_optimizer(two, resumed, kept)
    _update(one, optimizer)
    _update(two, resumed)
    check.wait()
    check.say("resume", same=all(torch.equal(one[name], two[name]) for name in one))


def _update(adapter: Adapter, optimizer: torch.optim.Optimizer) -> None:
    for number, parameter in enumerate(adapter.values()):
        parameter.grad = torch.full_like(parameter, 0.1 + number)
    optimizer.param_groups[0]["lr"] = 1e-2
    optimizer.step()


def oom(check: Check) -> None:
    """A step in all the memory it wants, and one for which it runs out: the micro-batch is halved, and the gradient is
    the same. A rehearsal has enough both times."""
    trainer = trainer_of(random_llama(check, {**check.shape("8b"), "num_hidden_layers": 2 if check.tiny else 8}))
    parameters, rows = list(trainer.adapter.values()), random_rows(check, 8)

    def run(limit: MicroBatchLimit) -> StepResult:
        return train_step(trainer.model, parameters, rows, limit, trainer.clock, (0, 0), None)

    wanted = run(MicroBatchLimit(8))
    gradients = [p.grad.clone() for p in parameters if p.grad is not None]
    peak, limit = check.peak_bytes(), MicroBatchLimit(8)
    if peak is not None:
        held = torch.cuda.memory_allocated()
        torch.cuda.empty_cache()
        allowed = held + MEMORY * (peak - held)
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
    got = run(limit)
    if peak is not None:
        torch.cuda.set_per_process_memory_fraction(1.0)
    again = [p.grad for p in parameters if p.grad is not None]
    check.say(
        "out of memory",
        halvings=limit.halvings,
        rows=limit.rows,
        loss=[wanted.loss, got.loss],
        gradient_differs=max(_difference(a, b) for a, b in zip(again, gradients, strict=True)),
    )


def _difference(a: Tensor, b: Tensor) -> float:
    return relative_difference(a, b, floor=1e-12)
