"""Uploading an export to the Hugging Face hub.

The token comes from HF_TOKEN or `hf auth login`, and is never written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunery.errors import ConfigError, ResumableError, TuneryError
from tunery.export.targets import TARGETS
from tunery.models.hf_logging import first_line

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def obsolete(folder: Path, form: str) -> list[str]:
    """Patterns of files that make no sense beside an export: transformers, say, puts an adapter that it finds beside a
    merged model on top of it. GGUF files of other number formats may stay beside a GGUF file.

    Args:
        folder: of the export; what is in it is not named.
        form: its format.
    """
    kept = {"*.gguf"} & set(TARGETS[form].files)
    patterns = {pattern for target in TARGETS.values() for pattern in target.files} - kept
    return sorted(pattern for pattern in patterns if not (folder / pattern).exists())


def check_repository(name: str | None) -> str:
    """The repository's name, if it is one.

    Raises:
        ConfigError: there is none, or it has another form than owner/name.
    """
    if not name or not _REPOSITORY.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no repository on the hub" if name else "where on the hub should it go?",
            "name it with --repo OWNER/NAME",
        )
    return name


def what_would_go(folder: Path, form: str) -> dict[str, Any]:
    """The files that an upload of this folder would send, with their sizes, those it would remove, as patterns, and the
    model card's text."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    card = folder / "README.md"
    return {
        "files": files,
        "bytes": sum(files.values()),
        "removes": obsolete(folder, form),
        "card": card.read_text(encoding="utf-8") if card.is_file() else "",
    }


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def upload(folder: Path, repository: str, *, private: bool, facts: Mapping[str, Any]) -> str:
    """Send a folder to the hub; the repository is made if it is not there.

    Args:
        private: a repository made now can be seen only by its owner.
        facts: for the commit's message: "format" and "run".

    Returns:
        The address of the repository.

    Raises:
        ConfigError: not logged in, not allowed, or the hub refuses what is sent.
        ResumableError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="tunery")
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"Upload {facts['format']} of {facts['run']} with tunery",
            ignore_patterns=[".*"],
            delete_patterns=obsolete(folder, facts["format"]),
        )
    except Exception as error:  # the network library's own classes differ between versions
        raise _hub_error(repository, error) from error
    return str(address)


def _hub_error(repository: str, error: Exception) -> TuneryError:
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_OFFLINE

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return ConfigError(
            "the hub does not know who you are", "set HF_TOKEN to a token with write access, or run `hf auth login`"
        )
    if status == 403:
        return ConfigError(
            f"your token may not write to {repository}", "use a token with write access, or another owner's name"
        )
    if status == 400 or isinstance(error, ValueError):  # the library refuses a card with a ValueError
        return ConfigError(
            f"the hub refuses what is sent to {repository}: {first_line(error)}", "the export is kept; put that right"
        )
    if HF_HUB_OFFLINE:
        return ConfigError("HF_HUB_OFFLINE is set, so nothing can be uploaded", "unset it")
    return ResumableError(
        f"the upload to {repository} failed: {first_line(error)}", "run the same command again; the export is kept"
    )
