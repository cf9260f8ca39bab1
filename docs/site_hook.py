"""For mkdocs: the README is the first page, and what lies outside docs/ is named without a link."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the README as index.md, with its links as seen from docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Take links off that lead out of docs/."""
    inside = {file.src_uri for file in files}
    return _LINK.sub(lambda link: link[0] if link[2] in inside else link[1], markdown)
