"""receipt.json: what a run trained, on what, by which numbers, and whether the adapter on disk does the same.

docs/reference.md is generated from the descriptions here.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from tunery.config import MAX_LENGTH, KindName, VariantName
from tunery.jsonl import JsonObject
from tunery.records.hosted_state import UploadedFile
from tunery.records.typed_record import Record

VERSION = 1
"""Raised when a field changes its meaning; new fields do not raise it."""


class TemplateSection(Record):
    """The chat template."""

    sha256: str = Field(description="its hash; a run is loaded with the same one only")
    source: str | None = Field(default=None, description="where it was found")
    date: str | None = Field(default=None, description="the day that it wrote into all rows, where it writes one")


class ModelSection(Record):
    """The base."""

    name: str = Field(description="as the task names it")
    source: str = Field(description="where it was loaded from")
    sha256: str = Field(description="of its weights")
    architecture: str = Field(description="class of transformers")
    parameters: int = Field(description="of the base")
    dtype: str = Field(description="that it computed in")
    quantization: str | None = Field(default=None, description="how it was held: nf4, int8, or null")
    license: str | None = Field(default=None, description="as the model names it")
    file_type: str | None = Field(
        default=None, description="of the weights in the GGUF file that they were read from, such as Q4_1"
    )


class HostedModelSection(Record):
    """The base of a hosted run."""

    name: str = Field(description="as the task names it")
    source: str = Field(description="address of the server")


class DroppedRow(Record):
    """An example that was left out."""

    where: str = Field(description="file:line")
    reason: str = Field(description="why, in words")


class RowsSection(Record):
    """The rows: what was read, left out and cut."""

    files: dict[str, str] = Field(description="file → SHA-256")
    kind: KindName = Field(description="of the rows (data.kind)")
    columns: dict[str, str] = Field(description="role → column it was read from")
    labels: list[str] = Field(description="of a classification, in order")
    instruction: str | None = Field(default=None, description="of a classification")
    rows_read: int = Field(description="in all files, invalid ones included")
    rows_skipped: int = Field(description="problems under data.on_bad_row: skip")
    skipped: list[str] = Field(description="the first hundred of them")
    converted: dict[str, int] = Field(
        default_factory=dict[str, int], description="form other than OpenAI's → rows that were written in it"
    )
    columns_ignored: dict[str, int] = Field(
        default_factory=dict[str, int], description="column set aside by the task → rows in which it held something"
    )
    columns_unused: list[str] = Field(default_factory=list[str], description="columns that no role takes")
    duplicates: int = Field(description="training rows that repeat an earlier one")
    overlap_removed: int = Field(description="training rows dropped because their text is held out")
    train_rows: int = Field(description="rows (or pairs) to train on; training.rows_seen says how many a step came to")
    validation_rows: int = Field(description="held out")
    test_rows: int = Field(description="of a test file")
    dropped: int = Field(description="examples that were too long, or had nothing to train")
    dropped_rows: list[DroppedRow] = Field(description="the first hundred, each with its reason")
    truncated: int = Field(description="rows cut to max_length")
    truncated_rows: list[str] = Field(description="the first hundred")


class DataSection(RowsSection):
    """The rows, and the hash of what of them was trained."""

    max_length: int | None = Field(default=None, description="longest row in tokens; null for a hosted run")
    rows_sha256: dict[str, str] = Field(description="split → hash of all tokens and weights")

    @property
    def limit(self) -> int:
        """The longest row in tokens; the usual one where the run does not say."""
        return self.max_length or MAX_LENGTH


class TokensSection(Record):
    """Counts over the whole run."""

    data: int = Field(description="in the rows that were trained on")
    trained: int = Field(description="with a loss")
    computed: int = Field(description="after shared prefixes are computed once")
    predicting_positions: int | None = Field(default=None, description="positions that tokens were predicted from")
    end_of_turn_token: str | None = Field(default=None, description="that ends an answer")
    end_of_turn_trained: bool | None = Field(default=None, description="whether it was among the trained tokens")


class HostedTokensSection(Record):
    """Counts over a hosted run."""

    data: int | None = Field(default=None, description="trained, as the server says")
    estimated: int | None = Field(default=None, description="expected to be billed")


class StartSection(Record):
    """The adapter that a run started from (lora.start)."""

    path: str = Field(description="its folder")
    sha256: str = Field(description="of its weights")
    config_sha256: str = Field(description="of its adapter_config.json")
    base: str | None = Field(default=None, description="the model it was trained on, as it names that")
    remark: str | None = Field(default=None, description="what to know where that is another model")


class TensorMovement(Record):
    """What training did to a tensor of the adapter."""

    shape: list[int] = Field(description="of the tensor")
    moved: float = Field(description="norm of its change, relative to its start")


class LoRASection(Record):
    """The adapter."""

    start: StartSection | None = Field(default=None, description="the adapter it started from")
    rank: int = Field(description="of most layers")
    alpha: float = Field(description="of most layers")
    scaling: float = Field(description="s in W + s · B A")
    rank_stabilized: bool = Field(default=False, description="s = alpha / sqrt(rank)")
    variant: VariantName = Field(default="lora", description="of LoRA (lora.variant)")
    dropout: float = Field(default=0.0, description="before the adapter")
    targets: str | list[str] | None = Field(default=None, description="as the task names them")
    matched: list[str] = Field(description="layers that were adapted")
    unmatched: list[str] = Field(description="weight matrices of the decoder layers that were not")
    trainable_parameters: int = Field(description="of the adapter")
    tensors: dict[str, TensorMovement] = Field(description="tensor → shape, and how far it moved relative to its start")


class TrainingSection(Record):
    """The optimisation."""

    steps: int = Field(description="optimizer steps done")
    planned_steps: int = Field(description="optimizer steps planned")
    epochs: float = Field(description="passes over the rows")
    objective: str = Field(default="", description="what was minimised (train.objective)")
    unit: str = Field(default="row", description="what a batch counts: row or pair")
    batch_size: int = Field(description="units per step")
    rows_seen: int | None = Field(default=None, description="different units that a step was computed of")
    learning_rate: float = Field(description="peak")
    scheduler: str = Field(description="how the rate falls")
    seed: int = Field(description="of everything random")
    first_loss: float = Field(description="of the first step")
    final_loss: float = Field(description="of the last step")
    valid_loss: float | None = Field(default=None, description="last validation")
    best_step: int | None = Field(default=None, description="step with the best validation loss")
    best_valid_loss: float | None = Field(default=None, description="that loss")
    stopped: str = Field(default="finished", description="why it ended: finished or early stopping")
    restored_step: int | None = Field(default=None, description="the best step, where it was restored")
    out_of_memory_retries: int = Field(default=0, description="how often the micro-batch was halved")
    micro_batch_rows: int | None = Field(default=None, description="units computed at a time, at most")
    micro_batch_tokens: int | None = Field(default=None, description="tokens computed at a time, at most")
    recomputed_activations: bool = Field(default=False, description="activation checkpointing was on")
    compiled: bool = Field(default=False, description="functions ran compiled")
    flattened: bool = Field(default=True, description="rows were packed into one sequence, not run one by one")
    resumed_from: list[int] = Field(default_factory=list, description="steps at which it was resumed")


class HostedTrainingSection(Record):
    """The optimisation of a hosted run, as far as the server tells."""

    steps: int | None = Field(default=None, description="optimizer steps done")
    planned_steps: int | None = Field(default=None, description="optimizer steps planned")
    epochs: float | None = Field(default=None, description="passes over the rows")
    batch_size: int | None = Field(default=None, description="rows per step")
    learning_rate_multiplier: float | None = Field(default=None, description="as settled")
    seed: int | None = Field(default=None, description="of everything random")
    first_loss: float | None = Field(default=None, description="of the first step")
    final_loss: float | None = Field(default=None, description="of the last step")
    valid_loss: float | None = Field(default=None, description="last validation")
    best_step: int | None = Field(default=None, description="step with the best validation loss")
    best_valid_loss: float | None = Field(default=None, description="that loss")
    stopped: str = Field(default="finished", description="why it ended")


class ReloadSection(Record):
    """The saved adapter, read back and compared."""

    rows: int = Field(description="units compared")
    loss_in_memory: float = Field(description="of the trained adapter")
    loss_from_disk: float = Field(description="of the saved one")
    difference: float = Field(description="between the two")
    ok: bool = Field(description="within 1e-6, relatively")


class AdapterSection(Record):
    """The adapter's file."""

    sha256: str = Field(description="of adapter_model.safetensors")
    bytes: int = Field(description="its size")


class DeviceSection(Record):
    """What computed."""

    kind: str = Field(description="cpu, cuda or mps")
    name: str = Field(description="of the processor or the GPU")
    threads: int = Field(description="of the CPU")
    memory_bytes: int = Field(description="of the GPU, else of the machine")
    workers: int = Field(default=1, description="processes that computed a step")


class PrecisionSection(Record):
    """The dtype, and why."""

    dtype: str = Field(description="that the base computed in")
    reason: str = Field(description="as set, or by a timed probe")
    float32_gflops: float | None = Field(default=None, description="measured by the probe")
    bfloat16_gflops: float | None = Field(default=None, description="measured by the probe")


class SpeedSection(Record):
    """Time; start-up, validation and checkpoints are not in train_seconds."""

    data_tokens_per_second: float = Field(description="tokens of the rows")
    computed_tokens_per_second: float = Field(description="tokens that were computed")
    matmul_flops_per_second: float | None = Field(default=None, description="measured on this machine")
    matmul_share: float | None = Field(default=None, description="fraction of that rate that training reached")
    train_seconds: float = Field(description="in steps")
    startup_seconds: float | None = Field(default=None, description="from the start of the process to the first step")
    total_seconds: float | None = Field(default=None, description="of everything")


class HostedSpeedSection(Record):
    """Time on the server."""

    total_seconds: float | None = Field(default=None, description="from making the job to its end")


class MemorySection(Record):
    """Bytes."""

    peak_bytes: int = Field(description="the most that was held")
    estimated_bytes: int = Field(description="the most that was expected")


class HostedSection(Record):
    """The job of a hosted run."""

    address: str = Field(description="of the server")
    job: str | None = Field(default=None, description="its id")
    model: str = Field(description="as the server names it")
    tuned_model: str | None = Field(default=None, description="name by which the tuned model answers")
    method: JsonObject = Field(default_factory=dict, description="of the job, as asked for")
    files: dict[str, UploadedFile] = Field(
        default_factory=dict, description="training, validation → id and bytes there"
    )
    result_files: list[str] | None = Field(default=None, description="ids of its metrics")
    billed_tokens: int | None = Field(default=None, description="as the server says")
    cost: float | None = Field(default=None, description="in dollars, by the price list")
    estimate: JsonObject = Field(default_factory=dict, description="that was agreed to; {} where the job was recovered")
    earlier_jobs: list[JsonObject] = Field(
        default_factory=list, description="that failed or were cancelled: id, status, error"
    )


class ReceiptBase(Record):
    """What every receipt has."""

    version: int = Field(default=VERSION, description="of this format")
    tunery: str = Field(description="version that trained")
    created: str = Field(description="time, UTC")
    name: str = Field(description="of the run")
    task_sha256: str = Field(description="of task.yaml")
    data: DataSection
    versions: dict[str, str] = Field(description="of Python and libraries")
    warnings: list[str] = Field(description="what to know before trusting the adapter")


class Receipt(ReceiptBase):
    """Of a run that was trained here."""

    model: ModelSection
    template: TemplateSection
    tokens: TokensSection
    lora: LoRASection
    training: TrainingSection
    reload: ReloadSection
    adapter: AdapterSection
    device: DeviceSection
    precision: PrecisionSection
    speed: SpeedSection
    memory: MemorySection


class HostedReceipt(ReceiptBase):
    """Of a run that was trained on a server elsewhere."""

    model: HostedModelSection
    tokens: HostedTokensSection
    training: HostedTrainingSection
    hosted: HostedSection
    speed: HostedSpeedSection


AnyReceipt = Receipt | HostedReceipt


def receipt_of(values: object) -> AnyReceipt:
    """A receipt from JSON values.

    Raises:
        tunery.records.typed_record.RecordError: they are something else.
    """
    return HostedReceipt.of(values) if isinstance(values, Mapping) and "hosted" in values else Receipt.of(values)
