"""tunery: the step of its own training loop, in the settings of a task that says nothing about them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from bench.peers.common import Lines, Workload, batches, finish, options
from tunery.config import TrainConfig
from tunery.data.batching import Row, flatten
from tunery.fast.packed_model import PackedModel, optimize_model
from tunery.lora.attach import adapter_state, attach
from tunery.lora.dropout import DropoutClock
from tunery.models.device import matmul_rate
from tunery.models.load import load_base
from tunery.training.data_parallel import Workers, start_workers
from tunery.training.flops import step_flops
from tunery.training.guard import MicroBatchLimit
from tunery.training.loop import StepResult, make_optimizer, train_step
from tunery.training.objectives.base import Objective, StepStats
from tunery.training.objectives.sft import CROSS_ENTROPY
from tunery.training.sizing import SAMPLED_STEPS
from tunery.training.worker_pool import wanted_workers

PACKAGES = ("tunery", "torch", "transformers")
RATE_SECONDS = 0.3
"""Time given to matrix products before each step."""


class Trainer:
    """A base with an adapter and an optimizer, trained step by step as tunery's loop does.

    Args:
        work: the workload's settings.
        model: the base, frozen.
        targets: of a fresh adapter.
    """

    def __init__(self, work: Workload, model: Any, targets: str | Sequence[str] = "all-linear"):
        self.work, self.clock = work, DropoutClock()
        attach(model, rank=work.rank, alpha=work.alpha, targets=targets, seed=work.seed, clock=self.clock)
        self.adapter = adapter_state(model)
        self.model: PackedModel = optimize_model(model)
        self.optimizer = make_optimizer(self.adapter, TrainConfig())
        for group in self.optimizer.param_groups:
            group["lr"] = work.learning_rate
        self.objective: Objective = preference(work.beta) if work.kind == "pairs" else CROSS_ENTROPY
        self.workers: Workers | None = None

    def start(self, batches: Sequence[Sequence[Row]]) -> None:
        """Start as many workers as a task with these batches would, in place of those there are."""
        self.close()
        parameters, unit = list(self.adapter.values()), self.objective.unit
        count = wanted_workers(self.model, batches, unit, torch.get_num_threads())
        self.workers = start_workers(self.model, parameters, self.clock, self.objective, count)

    def close(self) -> None:
        """End the workers."""
        if self.workers is not None:
            self.workers.close()
            self.workers = None

    def load(self, folder: Path) -> None:
        """Start from the adapter in a folder."""
        given = load_file(folder / "adapter_model.safetensors")
        if given.keys() != self.adapter.keys():
            raise SystemExit("the workload's adapter has other layers than tunery's targets")
        with torch.no_grad():
            for name, tensor in given.items():
                self.adapter[name].copy_(tensor)

    @property
    def trainable(self) -> int:
        """Numbers in the adapter."""
        return sum(tensor.numel() for tensor in self.adapter.values())

    def step(self, number: int, rows: Sequence[Row]) -> StepResult:
        """One optimizer step; of pairs, the rows of each side by side."""
        limit = MicroBatchLimit(len(rows))
        key, norm = (self.work.seed, number), self.work.max_grad_norm
        parameters = list(self.adapter.values())
        result = train_step(
            self.model, parameters, rows, limit, self.clock, key, norm, self.objective, workers=self.workers
        )
        self.optimizer.step()
        return result

    def needed(self, rows: Sequence[Row]) -> StepStats:
        """What a step over these rows must compute: each shared prefix once, even where workers repeat one."""
        return StepStats.of(torch.zeros(()), {}, self.model, [flatten(rows)])

    def flops(self, sums: StepStats) -> float:
        """Floating-point operations of the products that a step needs (tunery.training.flops.step_flops)."""
        return self._flops(sums.computed_tokens, sums.positions, sums.pairs, self.model.last_layer_parameters)

    def plain_flops(self, rows: Sequence[Row]) -> float:
        """The same for a program that computes every row in full and the head where something is predicted."""
        each = [flatten([row]) for row in rows]
        pairs = sum(self.model.visible_pairs(batch) for batch in each)
        return self._flops(sum(len(row.ids) for row in rows), sum(row.trained for row in rows), pairs, 0)

    def _flops(self, tokens: int, positions: int, pairs: int, last_layer: int) -> float:
        passes = self.objective.passes
        return step_flops(self.model.model, tokens, positions, self.trainable, passes, pairs, last_layer)


def preference(beta: float) -> Any:
    """tunery's loss of preference pairs."""
    try:
        from tunery.training.objectives.dpo import DPO
    except ImportError:
        raise SystemExit("this version of tunery trains no preference pairs") from None
    return DPO(beta)


def rows_of(work: Workload) -> list[list[Row]]:
    """The batches; a pair becomes two rows, the better one first."""
    if work.kind == "rows":
        rows = [make_row(row.ids, row.trained) for row in work.rows()]
        return list(batches(rows, work.batch_size))
    rows = [
        make_row(pair.prompt + answer, [False] * len(pair.prompt) + [True] * len(answer))
        for pair in work.pairs()
        for answer in (pair.chosen, pair.rejected)
    ]
    return list(batches(rows, 2 * work.batch_size))


def make_row(ids: Sequence[int], trained: Sequence[bool]) -> Row:
    """A row as tunery's loop takes it."""
    return Row(np.asarray(ids, np.int32), np.asarray(trained, np.float32))


def main() -> None:
    """Train, a step at a time; with each, the rate of matrix products just before it."""
    chosen = options(__doc__ or "")
    lines, work = Lines(), Workload.read(chosen.workload, precision=chosen.precision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base(work.base, precision=work.precision, device=device)
    trainer = Trainer(work, base.model)
    trainer.load(Path(work.adapter))
    steps = rows_of(work)
    trainer.start(steps[:SAMPLED_STEPS])
    lines.ready(*PACKAGES, trainable=trainer.trainable, dtype=base.info.dtype)
    for number, rows in enumerate(steps):
        lines.wait()
        rate = matmul_rate(base.model.device, base.model.dtype, RATE_SECONDS)
        started = time.perf_counter()
        result = trainer.step(number, rows)
        finish()
        seconds = time.perf_counter() - started
        sums = trainer.needed(rows)
        facts = {
            "computed_tokens": sums.computed_tokens,
            "matmul_rate": rate,
            "flops": trainer.flops(sums),
            "plain_flops": trainer.plain_flops(rows),
            "workers": trainer.workers.count if trainer.workers else 1,
            "workers_peak_bytes": trainer.workers.pool.peak_bytes if trainer.workers else 0,
        }
        lines.step(number, seconds, result.loss, sums.data_tokens, sums.trained_tokens, **facts)
    lines.wait()


if __name__ == "__main__":
    main()
