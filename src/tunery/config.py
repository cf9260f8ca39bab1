"""Every setting of a task, in one place. docs/reference.md and `tunery settings` are the descriptions here."""

from __future__ import annotations

import codecs
import datetime
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from tunery.config_hosted import HOSTED_PREFIX, STRICT, HostedConfig
from tunery.jsonl import JsonObject

KindName = Literal["chat", "completion", "text", "classification", "preference", "feedback"]
"""What rows can be; tunery.data.kinds has a file for each."""

ObjectiveName = Literal["sft", "dpo", "kto"]
"""What a run can minimise; tunery.training.objectives has a file for each."""

VariantName = Literal["lora", "dora"]
"""Variants of LoRA; tunery.lora.variants has a file for each."""

Auto = Literal["auto"]

USUAL_OBJECTIVE: dict[KindName, ObjectiveName] = {
    "chat": "sft",
    "completion": "sft",
    "text": "sft",
    "classification": "sft",
    "preference": "dpo",
    "feedback": "kto",
}
"""Kind → `train.objective: auto`."""

BUILT_IN_MODELS = {
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
}
"""Short name → hub id. The first is served from its Python package when that is installed (no network needed)."""

DEFAULT_BETA = 0.1

MAX_LENGTH = 2048
"""`data.max_length` left out, where the model's context is no shorter."""


_OBJECTIVES = "objectives"


def _of(*objectives: ObjectiveName) -> JsonObject:
    """For a field: the objectives that use the setting; others refuse it."""
    return {_OBJECTIVES: list(objectives)}


class _Settings(BaseModel):
    model_config = STRICT


class Columns(_Settings):
    """Which column (CSV) or key (JSONL) holds what. Left out, they are found by their usual names, and printed."""

    text: str | None = Field(default=None, description="the text of a row (kinds text and classification)")
    label: str | None = Field(
        default=None,
        description="the class of a row (kind classification), or whether its answer is good (kind feedback)",
    )
    prompt: str | None = Field(
        default=None, description="what the model is given (kinds completion, chat, preference and feedback)"
    )
    completion: str | None = Field(
        default=None, description="what the model should answer (kinds completion and chat), or has (kind feedback)"
    )
    chosen: str | None = Field(default=None, description="the better of two answers (kind preference)")
    rejected: str | None = Field(default=None, description="the worse of two answers (kind preference)")
    messages: str | None = Field(
        default=None, description="the conversation, a list of {role, content} (kinds chat and feedback)"
    )
    tools: str | None = Field(
        default=None, description="the tools offered in the conversation (kinds chat, preference and feedback)"
    )
    system: str | None = Field(
        default=None, description="the system message of a row (kinds chat, preference and feedback)"
    )
    history: str | None = Field(
        default=None,
        description="earlier turns, as [question, answer] pairs or messages (kinds chat, preference and feedback)",
    )
    context: str | None = Field(
        default=None,
        description="what the answer is drawn from; it follows the prompt (kinds completion, chat, preference and "
        "feedback)",
    )


Labels = dict[str, str] | tuple[str, ...] | None

QUOTED_NUMBER = re.compile(r"\s*[\d.,_]+\s*%?\s*")
"""What may be a number of rows, but was written as a text."""


class DataConfig(_Settings):
    """The rows, what they mean, and how they are split."""

    train: str | tuple[str, ...] = Field(
        description="file(s) to learn from: .jsonl, .ndjson, .json, .csv, .tsv, .txt, .md, .parquet, a "
        "`datasets` folder, or hub:OWNER/NAME (with :SPLIT if you like)"
    )
    validation: Annotated[float, Field(gt=0)] | str | None = Field(
        default=0.1,
        description="held-out rows: a fraction below 1, a number of rows, a file, or null for none. "
        "The same text is never on both sides",
    )
    test: str | None = Field(
        default=None, description="file for the final evaluation; the validation rows serve if left out"
    )
    kind: KindName | Auto = Field(
        default="auto",
        description="chat, completion, text, classification, preference or feedback; auto looks at the rows",
    )
    columns: Columns = Field(default_factory=Columns)
    ignore_columns: tuple[str, ...] = Field(
        default=(),
        description="columns, and unknown keys of messages, to leave aside. A column whose name says that it matters "
        "(a system message, a context, a weight, …) is an error where the kind has no use for it, unless it stands "
        "here",
    )
    encoding: str = Field(
        default="utf-8", description="of text files, as Python names it, e.g. cp1252; UTF-8 with or without a mark"
    )
    labels: Labels = Field(
        default=None,
        description="classification: a map from the value in the file to the word the model answers, "
        "e.g. {0: negative, 1: positive}, or just the list of values; left out, the values themselves",
    )
    instruction: str | None = Field(
        default=None,
        description="classification: what the model is told before each text; left out, it lists the labels",
    )
    system: str | None = Field(
        default=None,
        description="system message put before every conversation that has none (chat, classification, preference, "
        "feedback)",
    )
    date: datetime.date | None = Field(
        default=None,
        description="the day that a chat template which writes the date is told; left out, the day on which the run is "
        "begun",
    )
    max_length: PositiveInt | None = Field(
        default=None, description="longest row in tokens; left out, 2048 or the model's context, whichever is smaller"
    )
    too_long: Literal["cut", "drop"] = Field(
        default="cut",
        description="a longer row is cut (chat, completion, feedback: the front of the prompt, so that the last answer "
        "is kept whole; preference: the front of the prompt, for both answers alike; classification: the end of the "
        "text; "
        "text: continued in a further row), or dropped. A row whose answer alone is too long is dropped. All are "
        "counted",
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        default="stop", description="stop: list every bad row and end with exit code 3; skip: drop and count them"
    )
    duplicates: Literal["keep", "drop"] = Field(
        default="keep", description="rows of the training data that repeat an earlier one"
    )
    max_rows: PositiveInt | None = Field(
        default=None, description="use only this many rows for training, drawn with the seed"
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _label_keys_are_text(cls, value: object) -> object:
        if isinstance(value, dict):
            return {_as_label(key): _as_label(name) for key, name in value.items()}
        if isinstance(value, list):
            return tuple(_as_label(name) for name in value)
        return value

    @field_validator("labels")
    @classmethod
    def _labels_are_words(cls, value: Labels) -> Labels:
        names = value.values() if isinstance(value, dict) else value or ()
        if any(not name.strip() for name in names):
            raise ValueError("a label is blank; name the word that the model is to answer")
        return value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            return codecs.lookup(value).name
        except (LookupError, ValueError):
            raise ValueError(f"{value[:40]!r} is not an encoding; usual ones are utf-8, cp1252 and utf-16") from None

    @field_validator("train")
    @classmethod
    def _some_file(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or any(not name.strip() for name in ((value,) if isinstance(value, str) else value)):
            raise ValueError("name at least one file, each by its path")
        return value

    @field_validator("validation", mode="before")
    @classmethod
    def _no_zero_validation(cls, value: object) -> object:
        if isinstance(value, str) and QUOTED_NUMBER.fullmatch(value):
            raise ValueError("a fraction or a number of rows is written without quotes, such as 0.1 or 500")
        return None if value in (0, False) else value

    @field_validator("validation")
    @classmethod
    def _whole_count(cls, value: object) -> object:
        if isinstance(value, float) and value >= 1 and not value.is_integer():
            raise ValueError("a number of rows must be whole (or give a fraction below 1)")
        return value

    @property
    def train_files(self) -> tuple[str, ...]:
        """`train` as a tuple."""
        return (self.train,) if isinstance(self.train, str) else self.train


def _as_label(value: object) -> str:
    if isinstance(value, bool):  # YAML reads yes, no, on, off as booleans
        return str(value).lower()
    return str(value)


OF_THE_START = ("rank", "alpha", "targets", "exclude", "rank_stabilized", "variant")
"""Settings of the adapter that one from `lora.start` brings with it."""


class LoraConfig(_Settings):
    """The adapter (Hu et al. 2021, arXiv:2106.09685)."""

    start: str | None = Field(
        default=None,
        description="an adapter to start from: a folder in PEFT's format, such as a run's adapter or one of its "
        f"checkpoints. It brings its own {', '.join(OF_THE_START)}, so these are left out. Objectives dpo and kto: the "
        "reference is then that adapter, not the base",
    )
    rank: PositiveInt = Field(default=16, description="r, the width of the low-rank update")
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="the update is scaled by alpha / rank; left out, alpha is twice the rank"
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the adapter's inputs set to zero while training. Above 0 the "
        "masks, and so the update, depend on how a step's rows are split into micro-batches",
    )
    targets: str | tuple[str, ...] = Field(
        default="all-linear",
        description="which layers: all-linear, attention, mlp, a layer name (q_proj) or list of names, or a pattern "
        "with * over full names (model.layers.1*.mlp.*). Nothing matched is an error that lists what could be",
    )
    exclude: tuple[str, ...] = Field(default=(), description="layer names or patterns left out of `targets`")
    variant: VariantName = Field(
        default="lora",
        description="how the low-rank matrices change a layer. lora: they are added to its weight. dora: its rows are "
        "also scaled by a trained vector (Liu et al. 2024, arXiv:2402.09353); slower, and not for embeddings",
    )
    rank_stabilized: bool = Field(
        default=False, description="scale by alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)"
    )

    @model_validator(mode="after")
    def _start_brings_its_own(self) -> LoraConfig:
        given = [f"lora.{name}" for name in OF_THE_START if name in self.model_fields_set]
        if self.start is not None and given:
            them = "it" if len(given) == 1 else "them"
            raise ValueError(
                f"{', '.join(given)} cannot be set together with lora.start, whose adapter brings its own; "
                f"leave {them} out, or lora.start"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_the_start_brings(self, handler: SerializerFunctionWrapHandler) -> JsonObject:
        values = handler(self)
        left_out = set(OF_THE_START) - self.model_fields_set if self.start is not None else ()
        return {name: value for name, value in values.items() if name not in left_out}

    @property
    def effective_alpha(self) -> float:
        """`alpha`, or twice the rank when it was left out."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class TrainConfig(_Settings):
    """The optimisation."""

    epochs: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="passes over the training rows; ignored with max_steps"
    )
    max_steps: PositiveInt | None = Field(default=None, description="stop after this many optimizer steps instead")
    batch_size: PositiveInt = Field(
        default=16,
        description="rows (objective dpo: pairs) per optimizer step, however they are split to fit in memory",
    )
    objective: ObjectiveName | Auto = Field(
        default="auto",
        description="what is minimised. sft: the cross-entropy of the answers (supervised fine-tuning); of pairs, of "
        "the better ones alone. dpo: direct preference optimisation, for kind preference. kto: Kahneman-Tversky "
        "optimisation (Ethayarajh et al. 2024, arXiv:2402.01306), for kinds feedback and preference. auto: what suits "
        "the kind",
    )
    beta: Annotated[float, Field(gt=0, le=2)] | None = Field(
        default=None,
        json_schema_extra=_of("dpo", "kto"),
        description="objectives dpo and kto: how closely the tuned model is held to the base, their β (Rafailov et al. "
        f"2023, arXiv:2305.18290); left out, {DEFAULT_BETA}. Higher holds it closer",
    )
    desirable_weight: Annotated[float, Field(gt=0)] | Auto = Field(
        default="auto",
        json_schema_extra=_of("kto"),
        description="objective kto: how much a good answer counts, λ_D. auto: 1, or as much more as makes good answers "
        "count together as much as bad ones, where they are fewer",
    )
    undesirable_weight: Annotated[float, Field(gt=0)] | Auto = Field(
        default="auto", json_schema_extra=_of("kto"), description="objective kto: the same of a bad answer, λ_U"
    )
    micro_batch_size: PositiveInt | Auto = Field(
        default="auto",
        description="rows (objective dpo: pairs) computed at a time; does not change the result. auto: as many as "
        "memory allows",
    )
    learning_rate: Annotated[float, Field(gt=0)] | Auto = Field(
        default="auto",
        description="peak rate of AdamW. auto: a rule from the model's width, which `tunery check` tells",
    )
    learning_rate_multiplier: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="the rate, be it auto or a number, is multiplied by this"
    )
    scheduler: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="how the rate falls after warm-up"
    )
    warmup: Annotated[float, Field(ge=0)] = Field(
        default=0.05,
        description="steps over which the rate rises from zero: a fraction of all steps if below 1, else a number",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="clip the gradient to this global norm; null for no clipping"
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW: decay of the first moment")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW: decay of the second moment")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(default=1e-8, description="AdamW: added to the denominator")
    logging_steps: PositiveInt = Field(default=1, description="write a line to metrics.jsonl every so many steps")
    eval_steps: PositiveInt | Auto | None = Field(
        default="auto",
        description="measure the validation loss every so many steps. auto: ten times a run and at its end; "
        "null: never",
    )
    eval_rows: PositiveInt | None = Field(
        default=100,
        description="validation rows used while training (the first so many); null for all. "
        "The final evaluation uses all",
    )
    early_stopping_patience: PositiveInt | None = Field(
        default=None, description="stop after this many validations in a row without a better loss"
    )
    early_stopping_threshold: float = Field(
        default=0.0, ge=0, description="how much lower the loss must be to count as better"
    )
    restore_best: bool | Auto = Field(
        default="auto",
        description="at the end, go back to the step with the best validation loss. auto: when early stopping is on",
    )
    save_steps: PositiveInt | Auto | None = Field(
        default="auto",
        description="checkpoint every so many steps. auto: with each validation; null: only when stopped "
        "and at the end",
    )
    save_limit: PositiveInt = Field(default=2, description="checkpoints kept, besides the best one")
    gradient_checkpointing: bool | Auto = Field(
        default="auto",
        description="recompute activations instead of keeping them. auto: only when memory would not suffice, or "
        "when it runs out with a single row",
    )
    compile: bool | Auto = Field(
        default="auto",
        description="compile element-wise functions (norms, rotations, gated units, the cross-entropy) with "
        "torch.compile; does not change the result beyond rounding. auto: on a GPU; true: on a CPU too, where it "
        "seldom pays",
    )
    cpu_workers: PositiveInt | Auto = Field(
        default="auto",
        description="processes that compute and score rows side by side on a CPU, each with its part of the cores. "
        "auto: what is estimated to be fastest; 1 elsewhere than under Linux and for quantised bases",
    )
    precision: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        default="auto",
        description="dtype of the base; the adapter is float32. auto: the faster one, by a short timed probe",
    )
    quantize: Literal["none", "nf4", "int8"] = Field(
        default="none",
        description="hold the base's linear layers in 4 bits (nf4, about 0.5 bytes a weight) or 8 (int8); products are "
        "taken in `precision`, embedding and head stay in it. Saves memory, not time; needs `pip install bitsandbytes`",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="auto: a GPU when there is one")
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(), description="also send metrics there (metrics.jsonl is always written)"
    )

    @field_validator("quantize", mode="before")
    @classmethod
    def _null_is_none(cls, value: object) -> object:
        return "none" if value in (None, False) else value

    @property
    def effective_beta(self) -> float:
        """`beta`, or the default when it was left out."""
        return DEFAULT_BETA if self.beta is None else self.beta

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_name(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class EvaluateConfig(_Settings):
    """What is measured at the end, on the base and on the tuned model alike."""

    enabled: bool = Field(default=True, description="false: train only; `tunery eval RUN` can follow at any time")
    max_rows: PositiveInt | None = Field(default=None, description="held-out rows used; left out, all")
    generate_rows: Annotated[int, Field(ge=0)] = Field(
        default=24,
        description="held-out rows answered by generating (all kinds but classification), for the overlap scores",
    )
    samples: Annotated[int, Field(ge=0)] = Field(default=8, description="rows shown side by side in the report")
    max_new_tokens: PositiveInt = Field(default=96, description="longest generated answer")


class Task(_Settings):
    """A whole task file."""

    name: str = Field(
        default="run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="name of the run, written to OUTPUT/NAME; left out, the name of the task file's folder",
    )
    model: str = Field(
        description="the base: a hub id (Qwen/Qwen3-0.6B), a folder, a .gguf file, a built-in name "
        f"({', '.join(BUILT_IN_MODELS)}), or {HOSTED_PREFIX}NAME for a model that is trained elsewhere"
    )
    output: str = Field(default="runs", description="folder for run directories, relative to the current folder")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="everything random follows from it: adapter, order of rows, dropout, split"
    )
    data: DataConfig
    lora: LoraConfig = Field(default_factory=LoraConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    hosted: HostedConfig = Field(default_factory=HostedConfig)

    @model_validator(mode="after")
    def _settings_that_need_validation(self) -> Task:
        if self.data.validation is None and self.train.early_stopping_patience is not None:
            raise ValueError("train.early_stopping_patience needs data.validation, which is null")
        if self.train.eval_steps is None and self.train.early_stopping_patience is not None:
            raise ValueError("train.early_stopping_patience needs train.eval_steps, which is null")
        if self.train.restore_best is True and (self.data.validation is None or self.train.eval_steps is None):
            raise ValueError("train.restore_best needs data.validation and train.eval_steps, and one of them is null")
        if self.train.quantize != "none" and self.train.precision == "float64":
            raise ValueError("train.quantize computes in float32 or bfloat16; train.precision is float64")
        return self

    @model_validator(mode="after")
    def _settings_of_one_objective(self) -> Task:
        if self.data.kind != "auto" or self.train.objective != "auto":
            self.objective_for(self.data.kind)
        return self

    def objective_for(self, kind: KindName | Auto) -> ObjectiveName:
        """What a run on rows of this kind minimises; of "auto", `train.objective` is set.

        Raises:
            ValueError: a setting that this objective has no use for.
        """
        train = self.train
        name: ObjectiveName = USUAL_OBJECTIVE[kind] if train.objective == "auto" else train.objective  # type: ignore[index]
        for setting, info in TrainConfig.model_fields.items():
            extra = info.json_schema_extra
            users = extra.get(_OBJECTIVES) if isinstance(extra, dict) else None
            if isinstance(users, list) and name not in users and getattr(train, setting) != info.default:
                whose = f"kind {kind}" if train.objective == "auto" else f"objective {name}"
                raise ValueError(f"train.{setting} has no meaning for {whose}: it belongs to {' and '.join(users)}")  # type: ignore[arg-type]
        return name

    @property
    def run_dir(self) -> Path:
        """OUTPUT/NAME."""
        return Path(self.output) / self.name

    @property
    def hosted_model(self) -> str | None:
        """What the server that trains it calls the model; None for one that is trained here."""
        return self.model.removeprefix(HOSTED_PREFIX) if self.model.startswith(HOSTED_PREFIX) else None

    def to_yaml(self) -> str:
        """The task with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def sections(model: type[BaseModel]) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """Every section of a model's settings, by its path: () is the model itself, ("lora",) a section of the task."""
    yield (), model
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            for path, section in sections(info.annotation):
                yield (name, *path), section


def all_settings() -> list[tuple[str, FieldInfo]]:
    """("lora.rank", FieldInfo) of every setting that is not itself a section, in file order."""
    known = dict(sections(Task))
    return [
        (".".join((*path, name)), info)
        for path, section in known.items()
        for name, info in section.model_fields.items()
        if (*path, name) not in known
    ]
