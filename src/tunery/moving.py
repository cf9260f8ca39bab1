"""`tunery migrate`, as a function: what tunery.hosted captures, trained and loaded by tunery.api."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from tunery import api
from tunery.config_hosted import HostedConfig
from tunery.console import Console
from tunery.errors import ConfigError
from tunery.hosted.client import Consent
from tunery.hosted.migrate import Migration, Move
from tunery.hosted.migrate import migrate as move_here
from tunery.progress import Progress


def migrate(
    source: str | None = None,
    to: str | None = None,
    *,
    out: str | Path | None = None,
    files: Mapping[str, str | Path] | None = None,
    answers: str | Path | None = None,
    rows: int = 200,
    capture_only: bool = False,
    overrides: Sequence[str] = (),
    hosted: HostedConfig | None = None,
    progress: Progress | None = None,
    consent: Consent | None = None,
) -> Migration:
    """Move a model that was tuned elsewhere here: capture its job and its answers, train a base of your own on the same
    rows, and put both side by side.

    Args:
        source: a job ("ftjob-…"), the model it made ("ft:…"), or a folder captured earlier; None for `files` alone.
        to: the base to train; None only with `capture_only`.
        out: the folder for everything; left out, runs/ and the job's name.
        files: your own copies of the rows: "training", and "validation" if there is one.
        answers: your own record of what the tuned model answered (docs/how-to.md).
        rows: most held-out rows that the tuned model is asked.
        overrides: "key=value" settings over those that follow from the job.
        hosted: where the server is; left out, OPENAI_BASE_URL or OpenAI's own.
        progress, consent: as in `train`.
    """
    progress = progress or Console()
    move = Move(
        source,
        to,
        out=None if out is None else Path(out),
        files={f"{name}.jsonl": Path(path) for name, path in (files or {}).items()},
        answers=None if answers is None else Path(answers),
        rows=rows,
        capture_only=capture_only,
        overrides=tuple(overrides),
        hosted=hosted or HostedConfig(),
    )
    return move_here(
        move, progress, consent, lambda task, settings: api.train(task, settings, progress=progress), api.load
    )


def hosted_config(base_url: str | None, key_variable: str, prices: Path | None) -> HostedConfig:
    """Where a server is, from options of the command line.

    Raises:
        ConfigError: one of them is not what it should be.
    """
    try:
        return HostedConfig(
            base_url=base_url, key_variable=key_variable, prices=None if prices is None else str(prices.resolve())
        )
    except ValidationError as error:
        fields = ", ".join(f"--{str(item['loc'][0]).replace('_', '-')}" for item in error.errors())
        raise ConfigError(f"{fields}: not of the form that is needed", "see `tunery migrate --help`") from None
