"""Texts about a run without the folders of the machine that trained it, for pages that are shared."""

from __future__ import annotations

import re
from pathlib import Path

from tunery.evaluation.proof import last_part
from tunery.evaluation.record import RunRecord, items, pick

_PATH = re.compile(
    r"""(?P<url>\bhttps?://[^\s'"`<>]+)
    | (?:(?<![\w/\\.]) | (?<=-[IL]))  # not within a word, but after a compiler's -I and -L
    (?:file://)? (?:~ | [A-Za-z]: | \.{1,2} | \\)? [\\/]  # where it begins
    (?:[^\s'"`,;()\[\]{}<>“”‘’]*[\\/])? (?P<last>[^\s'"`,;()\[\]{}<>“”‘’\\/]+)""",
    re.VERBOSE,
)
"""An address, which stays, or a path of the machine, of which the last part does."""

_ABSOLUTE = re.compile(r"(?:file:)?[\\/]|[A-Za-z]:[\\/]")


def without_paths(record: RunRecord, text: str, *, absolute: bool = False) -> str:
    """A text in which paths and hub ids are their last part, and the home folder is "~".

    Args:
        absolute: only of paths from the root of the file system on; what leads from the reader's own folder stays.
    """
    for place in _places(record):
        if not absolute or _ABSOLUTE.match(place):
            text = text.replace(place, last_part(place))
    text = text.replace(str(Path.home()), "~")
    return _PATH.sub(
        lambda found: found["url"] or (found[0] if absolute and not _ABSOLUTE.match(found[0]) else found["last"]), text
    )


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
