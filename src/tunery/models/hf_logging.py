"""transformers without its progress bars, log lines and warnings: what matters to the user we say ourselves."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*, stderr: bool = False) -> Iterator[None]:
    """Silence transformers within this context, unless TUNERY_DEBUG is set; what was set before is set again after.

    Args:
        stderr: also swallow what Python writes to stderr: the bar of the GGUF reader, which no switch reaches.
    """
    if os.environ.get("TUNERY_DEBUG"):
        yield
        return
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    level, bars, hub_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    swallow = contextlib.redirect_stderr(io.StringIO()) if stderr else contextlib.nullcontext()
    with warnings.catch_warnings(), swallow:
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()  # the hub's bars too
                if not hub_bars:
                    disable_progress_bars()


def first_line(error: BaseException) -> str:
    """An error of another library in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
