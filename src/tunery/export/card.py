"""The model card: README.md beside the adapter, in the form the Hugging Face Hub reads.

Front matter: https://huggingface.co/docs/hub/model-cards#model-card-metadata. Only what is known is written: a base
that is a folder or file on this machine is named in the text by its last part, never as a hub id or with its path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tunery.data.kinds import KINDS
from tunery.evaluation.proof import Fact, facts, hashes, last_part, warnings_of
from tunery.evaluation.record import RunRecord, headline, interval_of, items, metric_rows, pick, read_run, show, unit_of
from tunery.export.hub_name import hub_id, task_of
from tunery.export.licences import front_matter
from tunery.export.targets import TARGETS
from tunery.paths import safe_name, write_atomic

_PATH = re.compile(
    r"""(?P<url>\bhttps?://[^\s'"`<>]+)
    | (?:(?<![\w/\\.]) | (?<=-[IL]))  # not within a word, but after a compiler's -I and -L
    (?:file://)? (?:~ | [A-Za-z]: | \.{1,2} | \\)? [\\/]  # where it begins
    (?:[^\s'"`,;()\[\]{}<>“”‘’]*[\\/])? (?P<last>[^\s'"`,;()\[\]{}<>“”‘’\\/]+)""",
    re.VERBOSE,
)
"""An address, which stays, or a path of the machine, of which the last part does."""


def _places(record: RunRecord) -> list[str]:
    """Paths that the run names, longest first. A text may name them too, and one with blanks is found by no pattern."""
    receipt = record.receipt
    named = [
        pick(receipt, "model", "name"),
        pick(receipt, "model", "source"),
        pick(receipt, "template", "source"),
        pick(receipt, "lora", "start", "path"),
        *(path for path, _ in items(pick(receipt, "data", "files"))),
        record.root.resolve(),
    ]
    places = {str(place) for place in named if place}
    places |= {str(Path(place).absolute()) for place in places if not place.startswith(("hub:", "http"))}
    return sorted((place for place in places if re.search(r"[/\\]", place)), key=len, reverse=True)


def _public_text(record: RunRecord, text: str) -> str:
    """A text without paths of the machine, fit to stand in Markdown."""
    for place in _places(record):
        text = text.replace(place, last_part(place))
    text = text.replace(str(Path.home()), "~")
    return _plain(_PATH.sub(lambda found: found["url"] or found["last"], text))


def write_card(run_dir: Path, folder: Path, form: str = "peft") -> Path:
    """Write the model card of a run.

    Args:
        run_dir: the run directory it is drawn from.
        folder: where README.md goes, usually the folder of the adapter.
        form: what lies in the folder, a key of tunery.export.targets.TARGETS.

    Returns:
        The path of README.md.

    Raises:
        ConfigError: `run_dir` is no run directory.
        CheckpointError: a file in it is damaged.
    """
    path = Path(folder) / "README.md"
    write_atomic(path, render_card(read_run(Path(run_dir)), form))
    return path


def render_card(record: RunRecord, form: str = "peft") -> str:
    """The card's Markdown. Texts of the user's are escaped so that they stay text."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    # not HTML: what needs escaping for Markdown goes through _plain
    environment = Environment(autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = (files("tunery.export") / "card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(_content(record, form)).rstrip("\n") + "\n"


def _front_matter(record: RunRecord, form: str) -> str:
    base, license_ = hub_id(record), pick(record.receipt, "model", "license")
    relation = "finetune" if TARGETS[form].holds_base else "adapter"
    tags = ["lora", "tunery", *([f"base_model:{relation}:{base}"] if base else [])]
    values: dict[str, Any] = {}
    if base:
        values["base_model"] = base
    values |= {"library_name": TARGETS[form].hub_library, "pipeline_tag": "text-generation", "tags": tags}
    if license_:
        values |= front_matter(str(license_))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _plain(text: str) -> str:
    """Text that Markdown and HTML leave as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!])", r"\\\1", " ".join(text.split()))


def _quoted(text: str) -> str:
    """A block quote of a text, line by line."""
    return "\n".join(f"> {_plain(line)}" for line in text.splitlines())


def _content(record: RunRecord, form: str) -> dict[str, Any]:
    receipt, task = record.receipt, task_of(record)
    name = pick(receipt, "model", "name") or pick(receipt, "model", "source") or pick(task, "model") or "its base model"
    base = hub_id(record)
    last = last_part(str(name))
    interval = interval_of(record.evaluation, "tuned")
    instruction = pick(task, "data", "instruction")
    return {
        "front_matter": _front_matter(record, form),
        "form": form,
        "merged": TARGETS[form].holds_base,
        "name": _plain(record.name),
        "base": f"[{base}](https://huggingface.co/{base})" if base else _plain(last),
        "base_python": json.dumps(base or f"path/to/{last}", ensure_ascii=False),
        "version": _plain(str(pick(receipt, "tunery") or "")),
        "created": _plain(str(pick(receipt, "created") or "")[:10]),
        "headline": _plain(headline(record)),
        "rows": show(pick(record.evaluation, "rows"), "count"),
        "metrics": metric_rows(record.evaluation),
        "interval": f"{interval[1]:.1%} to {interval[2]:.1%}" if interval else "",
        "unit": unit_of(record.evaluation),
        "chat": (kind := KINDS.get(pick(receipt, "data", "kind"))) is not None and kind.templated,
        "run": f"runs/{safe_name(record.name)}",
        "short": safe_name(record.name).lower(),
        "instruction": _quoted(instruction) if isinstance(instruction, str) else "",
        "facts": [(title, public) for title, found in facts(receipt) if (public := _public(record, found))],
        "limits": _limits(record),
        "hashes": [
            (_plain(f"{each.label}: {last_part(each.file)}" if each.file else each.label), _digest(each.digest))
            for each in hashes(record)
        ],
    }


def _public(record: RunRecord, found: Sequence[Fact]) -> list[tuple[str, str]]:
    return [(fact.label, _public_text(record, fact.public)) for fact in found if fact.public is not None]


def _digest(text: str) -> str:
    return re.sub(r"[^\w:.-]", "", text)


def _limits(record: RunRecord) -> list[str]:
    kind = _plain(show(pick(record.receipt, "data", "kind"), "words"))
    rows = show(pick(record.receipt, "data", "train_rows"), "count")
    unit = unit_of({"unit": pick(record.receipt, "training", "unit"), "kind": pick(record.receipt, "data", "kind")})
    limits = [
        f"It was trained for one task ({kind}, {rows} {unit}) and measured on held-out rows of the same data only; "
        "expect less on other data.",
        "It keeps the base model's knowledge, biases and licence terms.",
    ]
    return limits + [_public_text(record, f"{warning}.") for warning in warnings_of(record.receipt)]
