"""TRL + PEFT: SFTTrainer for rows, DPOTrainer for pairs. At TRL's defaults, tuned by hand, or so with Liger's kernels.

Set for both: batch size, rank, targets, alpha, learning rate (constant), seed, number of steps, rows in their order,
no files. Tuned by hand means: base weights in bfloat16, no gradient checkpointing, a smaller micro-batch with
accumulation, and for pairs one micro-batch for policy and reference. TRL's entropy and accuracy cannot be switched off.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from bench.peers.common import IGNORED, Lines, Workload, finish, options

PACKAGES = ("trl", "peft", "transformers", "accelerate", "datasets", "torch")


class _Counting:
    """Mixed into a trainer: remembers, over the micro-batches of a step, the loss and how many tokens there were."""

    loss: torch.Tensor | float = 0.0
    data_tokens = 0
    trained_tokens = 0

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> torch.Tensor:
        self.data_tokens += int(inputs["attention_mask"].sum())
        trained = (
            inputs["completion_mask"][:, 1:] if "completion_mask" in inputs else inputs["labels"][:, 1:] != IGNORED
        )
        self.trained_tokens += int(trained.sum())
        loss = super().training_step(model, inputs, *rest, **more)  # type: ignore[misc]
        self.loss = self.loss + loss.detach()
        return loss


class _RowTrainer(_Counting, SFTTrainer):
    """SFTTrainer takes tokenised rows as they are."""


class _PairTrainer(_Counting, DPOTrainer):
    """DPOTrainer tokenises text itself; these pairs are tokenised already."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class _Steps(TrainerCallback):
    """Waits before each step and reports it afterwards. The batch is fetched before `on_step_begin`: not counted."""

    def __init__(self, lines: Lines, packages: Sequence[str]) -> None:
        self.lines, self.packages = lines, packages
        self.trainer: Any = None
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            trainable = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
            self.lines.ready(*self.packages, trainable=trainable)
        self.lines.wait()
        self.trainer.loss, self.trainer.data_tokens, self.trainer.trained_tokens = 0.0, 0, 0
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        loss = float(trainer.loss)
        finish()
        seconds = time.perf_counter() - self.started
        self.lines.step(state.global_step - 1, seconds, loss, trainer.data_tokens, trainer.trained_tokens)


def settings(work: Workload, variant: str, steps: int, out: str, micro: int) -> dict[str, Any]:
    """Arguments of SFTConfig and DPOConfig that both variants set, and those of the tuned one; `micro` rows at a time.

    TRL 1.16 switches bf16 on by itself, whatever the processor, and refuses to start without a GPU until `use_cpu` is
    set. On a processor that would emulate it bf16 is off: it takes ten times the processor time (docs/lab.md).
    """
    given: dict[str, Any] = {
        "output_dir": out,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": work.batch_size // micro,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": work.max_grad_norm,
        "seed": work.seed,
        "max_steps": steps,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": work.precision == "bfloat16",
    }
    if variant != "defaults":
        given["gradient_checkpointing"] = False
        given["model_init_kwargs"] = {"dtype": work.precision}
    if variant == "liger":
        given["use_liger_kernel"] = True
    return given


def build(
    work: Workload,
    variant: str,
    lines: Lines,
    out: str,
    model: Any = None,
    packages: Sequence[str] = PACKAGES,
    peer: str | None = None,
) -> Any:
    """The trainer, its adapter the workload's, ready to train.

    Args:
        model: already loaded and with an adapter on it; otherwise the trainer loads the base and puts one on.
        packages: whose versions are reported.
        peer: whose micro-batch it takes, if not that of TRL in this variant.
    """
    micro = work.micro(peer or f"trl-{variant}")
    tokenizer = AutoTokenizer.from_pretrained(work.base)
    lora = LoraConfig(r=work.rank, lora_alpha=int(work.alpha), target_modules="all-linear", task_type="CAUSAL_LM")
    if work.kind == "pairs":
        pairs = work.pairs()
        columns = {f"{part}_ids": [getattr(pair, part) for pair in pairs] for part in ("prompt", "chosen", "rejected")}
        steps = len(pairs) // work.batch_size
        config: Any = DPOConfig(**settings(work, variant, steps, out, micro), beta=work.beta)
        trainer_class: type = _PairTrainer
    else:
        rows = work.rows()
        columns = {
            "input_ids": [row.ids for row in rows],
            "completion_mask": [[int(t) for t in row.trained] for row in rows],
        }
        steps = len(rows) // work.batch_size
        config = SFTConfig(**settings(work, variant, steps, out, micro), completion_only_loss=True)
        if (longest := max(len(row.ids) for row in rows)) > (config.max_length or longest):
            config.max_length = longest
        trainer_class = _RowTrainer
    if model:
        config.model_init_kwargs = None  # it is loaded
    callback = _Steps(lines, packages)
    # With a fingerprint of ours: a hash of the table is not needed, and dill cannot take every version of pyarrow's.
    dataset = Dataset(InMemoryTable.from_pydict(columns), fingerprint="rows")
    trainer = trainer_class(
        model=model or work.base,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=None if model else lora,
        callbacks=[callback],
    )
    callback.trainer = trainer
    set_peft_model_state_dict(trainer.model, load_file(Path(work.adapter) / "adapter_model.safetensors"))
    return trainer


def main() -> None:
    """Train, a step at a time."""
    chosen = options(__doc__ or "", "defaults", "tuned", "liger")
    lines, work = Lines(), Workload.read(chosen.workload, precision=chosen.precision)
    with tempfile.TemporaryDirectory() as out:
        build(work, chosen.variant, lines, out).train()
    lines.wait()


if __name__ == "__main__":
    main()
