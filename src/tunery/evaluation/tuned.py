"""A finished run, loaded: the base with its adapter, ready to answer."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.config import Task
from tunery.data.example import Message, Place
from tunery.data.kinds import KINDS
from tunery.data.kinds.base import Kind
from tunery.data.prepare import make_renderer
from tunery.data.render import Renderer
from tunery.errors import AdapterError, CheckpointError, ConfigError
from tunery.evaluation.labels import label_rows, score_labels
from tunery.evaluation.predict import predictions_of
from tunery.fast.packed_model import PackedModel, optimize_model
from tunery.inference.generate import Sampling, generate, stream
from tunery.jsonl import JsonMapping
from tunery.lora.adapter import load_adapter
from tunery.lora.attach import disabled
from tunery.models.load import Base, load_base
from tunery.paths import RunPaths, read_json
from tunery.records.evaluation_record import Evaluation
from tunery.records.prediction_record import Prediction
from tunery.records.run_receipt import AnyReceipt, HostedReceipt, Receipt, receipt_of
from tunery.records.typed_record import RecordError
from tunery.task_file import load_task
from tunery.training.scoring import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class TunedModel:
    """The base and the adapter of a run in one model.

    Attributes:
        base: model, tokenizer and facts about them. The adapter is attached and active.
        flat: the same model as the loop runs it.
        task: the run's settings.
        renderer: turns messages into prompts exactly as in training.
        receipt: the run's receipt.
    """

    base: Base
    flat: PackedModel
    task: Task
    renderer: Renderer
    receipt: Receipt = field(repr=False)

    def __repr__(self) -> str:
        return f"<TunedModel {self.task.name}: {self.kind.name} on {self.base.info.name}, {self.base.info.dtype}>"

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model, adapter active."""
        return self.base.model

    @property
    def limit(self) -> int:
        """The longest row of the run, in tokens."""
        return self.receipt.data.limit

    @property
    def kind(self) -> Kind:
        """Of the rows it was trained on."""
        return KINDS[self.receipt.data.kind]

    @contextlib.contextmanager
    def untuned(self) -> Iterator[TunedModel]:
        """Within this context the base answers alone, bit for bit."""
        with disabled(self.model):
            yield self

    def _prompt(self, asked: str | Sequence[Message]) -> list[int]:
        if not asked or not (isinstance(asked, str) or all("role" in m and "content" in m for m in asked)):
            raise ConfigError(
                "nothing to answer", 'give a text, or messages such as [{"role": "user", "content": "…"}]'
            )
        messages = self.kind.ask(self.renderer, asked) if isinstance(asked, str) else self.renderer.with_system(asked)
        if messages is None:
            return self.renderer.encode_prompt(str(asked), begin=True)
        return self.renderer.encode_prompt(self.renderer.prompt(messages))

    def answer(self, asked: str | Sequence[Message], **sampling: Any) -> str:
        """The answer to a text or a conversation.

        Raises:
            ConfigError: nothing is asked, or it does not fit into the model's context.
            DataError: the chat template refuses the conversation.

        Args:
            asked: messages ({role, content}), or a text: put to the model as the run's rows were (a text to classify, a
                prompt to complete, a text to go on with, or a user message).
            sampling: fields of tunery.inference.generate.Sampling (max_new_tokens, temperature, top_p, seed).
        """
        ids = [self._prompt(asked)]
        return generate(self.model, self.base.tokenizer, ids, _sampling(sampling), self.renderer.stop_ids)[0]

    def stream(self, asked: str | Sequence[Message], **sampling: Any) -> Generator[str]:
        """As `answer`, piece by piece. Closing the iterator ends the answer."""
        ids = self._prompt(asked)
        return stream(self.model, self.base.tokenizer, ids, _sampling(sampling), self.renderer.stop_ids)

    def classify(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """The probability of each label for each text, by scoring the labels' tokens.

        Raises:
            ConfigError: the run is not a classification.
        """
        labels = self.renderer.labels
        if not labels:
            raise ConfigError(f"{self.task.name} is not a classification run: it has no labels", "use answer() instead")
        examples = [self.kind.make(Place("text", i + 1), text, labels[0]) for i, text in enumerate(texts)]
        given = label_rows(self.renderer, examples, self.limit)
        if len(given.examples) < len(texts):
            raise ConfigError("a text is empty or too long to classify", f"the limit is {self.limit} tokens")
        shares = score_labels(Scorer(self.flat), given, len(labels)).probability
        return [dict(zip(labels, map(float, row), strict=True)) for row in shares]

    def predict(self, rows: Iterable[object], **sampling: Any) -> list[Prediction]:
        """What the model says of each row: the label with its probabilities, or the answer.

        Args:
            rows: objects in the form of the run's rows (their own answers need not be there), or texts, put as `answer`
                puts them. A DataFrame's rows will do.
            sampling: as in `answer`; of a classification nothing is drawn.

        Returns:
            One for each row. `prediction` is None where a row is too long or the chat template refuses it; `reason`
            then says why.

        Raises:
            DataError: rows that cannot be read, all of them listed.
        """
        return predictions_of(self, rows, _sampling(sampling), lambda note: None)


def _sampling(given: JsonMapping) -> Sampling:
    known = [f.name for f in fields(Sampling)]
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(f"unknown: {', '.join(unknown)}", f"an answer takes {', '.join(known)}")
    return Sampling(**given)


def read_receipt(paths: RunPaths) -> AnyReceipt:
    """The receipt of a finished run.

    Raises:
        ConfigError: there is no finished run in that folder.
    """
    if not paths.root.is_dir():
        raise ConfigError(f"no run directory at {paths.root}", "train one with `tunery train task.yaml`")
    try:
        return receipt_of(read_json(paths.receipt))
    except FileNotFoundError:
        hint = "finish it with `tunery train` and the same task file" if paths.checkpoints.is_dir() else None
        raise ConfigError(f"{paths.root} holds no finished run (receipt.json is missing)", hint) from None
    except ValueError as error:
        raise AdapterError(f"{paths.receipt} cannot be read: {error}", "restore it, or train again") from None


def read_local_receipt(paths: RunPaths) -> Receipt:
    """The receipt of a finished run that was trained here.

    Raises:
        ConfigError: there is no finished run in that folder, or it was trained elsewhere.
    """
    receipt = read_receipt(paths)
    if isinstance(receipt, HostedReceipt):
        raise ConfigError(
            f"{paths.root} was trained elsewhere: {receipt.hosted.tuned_model} answers at {receipt.hosted.address}",
            "ask it there, or move it here with `tunery migrate`",
        )
    return receipt


def read_evaluation(paths: RunPaths) -> Evaluation | None:
    """evaluation.json of a run; None if it has none.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return Evaluation.read(paths.evaluation)
    except FileNotFoundError:
        return None
    except RecordError as error:
        raise CheckpointError(
            f"{paths.evaluation} cannot be read: {error}", "make it anew with `tunery eval`, or remove it"
        ) from None


def require_same_base(paths: RunPaths, task: Task, receipt: Receipt, sha256: str) -> None:
    """Refuse a base whose weights have another hash than those of the training.

    Raises:
        AdapterError: they have.
    """
    if sha256 != receipt.model.sha256:
        raise AdapterError(
            f"the base {task.model} has changed since {paths.root} was trained (its weights have another hash)",
            "use the base it was trained on, or train again",
        )


def same_renderer(paths: RunPaths, task: Task, receipt: Receipt, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """What turned the run's rows into text, made anew.

    Raises:
        AdapterError: the tokenizer's chat template is not the one of the training.
    """
    renderer = make_renderer(tokenizer, task.data, receipt.data.labels)
    if renderer.template_sha256 != receipt.template.sha256:
        raise AdapterError(
            f"the chat template of {task.model} is not the one {paths.root} was trained with",
            "a model answers badly under another template: restore the tokenizer it had, or train again",
        )
    return renderer


def load_run(run: str | Path, *, device: str = "auto") -> TunedModel:
    """Load a run directory.

    Raises:
        ConfigError: no finished run there, or its base cannot be found.
        AdapterError: base, chat template or adapter are not those of the training.
    """
    paths = RunPaths(Path(run))
    receipt = read_local_receipt(paths)
    task = load_task(paths.task)
    base = load_base(task.model, precision=receipt.precision.dtype, device=device, quantize=task.train.quantize)
    require_same_base(paths, task, receipt, base.info.sha256)
    renderer = same_renderer(paths, task, receipt, base.tokenizer)
    load_adapter(base.model, paths.adapter)
    flat = optimize_model(base.model)
    return TunedModel(base, flat, task, renderer, receipt)
