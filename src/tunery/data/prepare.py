"""From a data set and a tokenizer to tokenised rows, with everything that was cut, dropped or noticed counted."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tunery.config import MAX_LENGTH, DataConfig
from tunery.data import token_cache
from tunery.data.batching import Row
from tunery.data.dated_template import today, writes_date
from tunery.data.example import ROW, DataSet, Example, Problem, Rendered
from tunery.data.kinds import KINDS
from tunery.data.kinds.base import Encoded
from tunery.data.pace import Pace
from tunery.data.problem_list import bad_rows
from tunery.data.render import Renderer, decode
from tunery.errors import ConfigError, DataError
from tunery.progress import Say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PORTION_CHARACTERS = 1 << 19
"""Text that is rendered and tokenised before the next is rendered."""

UNPRECEDED = "the first token of an answer is not trained: its prompt is empty, and nothing precedes it"


@dataclass
class Rows:
    """The tokenised rows of one split, and what happened on the way.

    Attributes:
        rows: in the order of the examples; `Row.example` points back.
        unit: neighbouring rows that belong together: 2 for pairs of answers (the chosen one, then the rejected one),
            else 1.
        truncated: rows cut to the length limit, with their places.
        dropped: examples left out (too long, or nothing to train), with the reason: ("file:line", reason).
        refused: what is wrong with examples that the chat template does not take.
    """

    rows: list[Row] = field(default_factory=list[Row])
    unit: int = 1
    truncated: list[str] = field(default_factory=list[str])
    dropped: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    refused: list[Problem] = field(default_factory=list[Problem])

    @property
    def units(self) -> int:
        """Rows, or pairs of rows."""
        return len(self.rows) // self.unit

    def first(self, units: int | None) -> list[Row]:
        """The rows of the first so many units; all for None."""
        return self.rows if units is None else self.rows[: units * self.unit]

    @property
    def tokens(self) -> int:
        """All tokens of all rows."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def trained(self) -> int:
        """Trained tokens of all rows."""
        return sum(row.trained for row in self.rows)

    def sha256(self) -> str:
        """Hash of all tokens and weights: what was trained, to the bit."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(len(row.ids).to_bytes(8, "little"))
            digest.update(row.ids.astype("<i4").tobytes())
            digest.update(row.weights.astype("<f4").tobytes())
            if self.unit == 1 and row.desirable is not None:  # of a pair it follows from the order
                digest.update(bytes([row.desirable]))
        return digest.hexdigest()


@dataclass
class Prepared:
    """A data set ready for the loop: each split tokenised, and the renderer that did it."""

    data: DataSet
    renderer: Renderer
    max_length: int
    too_long: str
    train: Rows
    validation: Rows
    test: Rows

    @property
    def splits(self) -> dict[str, Rows]:
        """All three by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def held_out(self) -> tuple[str, list[Example], Rows]:
        """The rows the final evaluation uses: test if there are any, else validation. (name, examples, rows)."""
        split, examples = self.data.held_out
        return split, examples, self.splits[split]


def make_renderer(tokenizer: PreTrainedTokenizerBase, config: DataConfig, labels: Sequence[str]) -> Renderer:
    """The renderer of a task."""
    return Renderer(tokenizer, labels=labels, instruction=config.instruction, system=config.system, date=config.date)


def dated(config: DataConfig, tokenizer: PreTrainedTokenizerBase, begun: datetime.date | None = None) -> DataConfig:
    """The settings with the day that a chat template which writes the date is told: today, if nothing else is said.

    Args:
        begun: what a run that has begun was told.
    """
    if config.date is not None or not writes_date(tokenizer):
        return config
    return config.model_copy(update={"date": begun or today(tokenizer)})


def prepare(
    data: DataSet, config: DataConfig, tokenizer: PreTrainedTokenizerBase, context: int, say: Say | None = None
) -> Prepared:
    """Tokenise all splits.

    Args:
        data: the rows read.
        tokenizer: of the base model, with its chat template.
        context: the longest row the model takes, in tokens.
        say: told how far it is, where it lasts.

    Raises:
        DataError: rows that the template refuses (`data.on_bad_row`), or no row left to train.
    """
    limit = min(config.max_length or MAX_LENGTH, context)
    renderer = make_renderer(tokenizer, config, data.labels)
    train, validation, test = (
        tokenize_once(renderer, examples, limit, config.too_long, config.on_bad_row, say)
        for examples in (data.train, data.validation, data.test)
    )
    if not train.rows:
        raise DataError(
            f"no row is left to train: all {len(data.train):,} were dropped ({train.dropped[0][1]})",
            f"raise data.max_length (now {limit}) or shorten the rows",
        )
    if data.validation and not validation.rows:
        raise DataError(f"no validation row is left: {validation.dropped[0][1]}", "raise data.max_length")
    return Prepared(data, renderer, limit, config.too_long, train, validation, test)


def tokenize_once(
    renderer: Renderer,
    examples: Sequence[Example],
    limit: int,
    too_long: str,
    on_bad_row: str = "stop",
    say: Say | None = None,
) -> Rows:
    """As `tokenize`; taken from the cache when the same rows were tokenised before (tunery.data.token_cache).

    Raises:
        DataError: the chat template refuses rows, and `on_bad_row` is "stop" and not "skip", which counts them among
            those that are dropped.
    """
    if not examples:
        return Rows()
    key = token_cache.entry_key(renderer, examples, limit, too_long)
    if (found := token_cache.load(key, examples)) is not None:
        attributes, remarks = found
        renderer.remarks.add_all(remarks)
        return Rows(**attributes)
    before = dict(renderer.remarks.counts)
    result = tokenize(renderer, examples, limit, too_long, say)
    if not result.refused:
        token_cache.store(key, vars(result), examples, renderer.remarks.since(before))
        return result
    _refuse_system(renderer, examples, result.refused[0])
    if on_bad_row == "stop":
        many = len(result.refused)
        raise bad_rows(
            result.refused, many, len(examples), "fix these rows, or drop and count them with data.on_bad_row: skip"
        )
    result.dropped += [(f"{problem.file}:{problem.line}", problem.message) for problem in result.refused]
    return result


def _refuse_system(renderer: Renderer, examples: Sequence[Example], refused: Problem) -> None:
    """Raise ConfigError where it is the task's system message that the chat template does not take."""
    if not renderer.system:
        return
    example = next(row for row in examples if row.where == f"{refused.file}:{refused.line}")
    bare = Renderer(renderer.tokenizer, labels=renderer.labels, instruction=renderer.instruction, date=renderer.date)
    with contextlib.suppress(DataError):
        bare.render(example)
        raise ConfigError(
            f"data.system: {refused.message}",
            "remove data.system, or choose a model whose template takes such messages",
        )


def tokenize(
    renderer: Renderer, examples: Sequence[Example], limit: int, too_long: str, say: Say | None = None
) -> Rows:
    """Tokenise the examples of one split; rows of more than `limit` tokens are cut or dropped (`data.too_long`)."""
    if not examples:
        return Rows()
    kind = KINDS[examples[0].kind]
    result, pace = Rows(unit=2 if kind.pairs else 1), Pace(say, "tokenising rows")
    for some in _portions(render_all(renderer, examples, result.refused)):
        encoded = iter(renderer.encode([row for _, rows in some for row in rows]))
        for number, rows in some:
            pace.at(number, len(examples))
            example = examples[number]
            tokens = [Encoded(*next(encoded), row.desirable) for row in rows]
            if not kind.plain_text and any(row.trained[:1] == [True] for row in tokens):
                renderer.remarks.add(UNPRECEDED)
            for fitted in kind.fit(renderer, example, tokens, limit, too_long):
                if fitted.reason:
                    result.dropped.append((example.where, fitted.reason))
                if fitted.truncated:
                    result.truncated.append(example.where)
                result.rows += [make_row(row, example.where, number) for row in fitted.rows]
    return result


def _portions(rendered: Iterable[tuple[int, list[Rendered]]]) -> Iterator[list[tuple[int, list[Rendered]]]]:
    """Rendered examples, so many at a time that their tokens take little memory."""
    portion: list[tuple[int, list[Rendered]]] = []
    size = 0
    for number, rows in rendered:
        portion.append((number, rows))
        size += sum(len(row.text) for row in rows)
        if size > PORTION_CHARACTERS:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def render_all(
    renderer: Renderer, examples: Sequence[Example], refused: list[Problem]
) -> Iterator[tuple[int, list[Rendered]]]:
    """The number of each example, and its rows; what the chat template refuses is added to `refused` instead."""
    for number, example in enumerate(examples):
        try:
            rows = renderer.render(example)
        except DataError as error:
            place, message = example.where, error.message.removeprefix(f"{example.where}: ")
            refused.append(Problem(place.file, place.line, ROW, message, error.hint or "change the row, or remove it"))
            continue
        yield number, rows


def make_row(tokens: Encoded, where: str = "", number: int = 0) -> Row:
    """A row of tokens, the trained ones with weight 1."""
    weights = np.asarray(tokens.trained, dtype=np.float32)
    if len(weights):
        weights[0] = 0  # nothing stands before the first token to predict it from
    return Row(np.asarray(tokens.ids, dtype=np.int32), weights, where, number, tokens.desirable)


def pieces(renderer: Renderer, row: Row) -> list[tuple[str, bool]]:
    """A row's text in stretches of trained and untrained tokens: (text, whether it is trained)."""
    on = row.weights > 0
    borders = [0, *(np.flatnonzero(np.diff(on)) + 1).tolist(), len(on)]
    return [(decode(renderer.tokenizer, row.ids[a:b].tolist()), bool(on[a])) for a, b in itertools.pairwise(borders)]
