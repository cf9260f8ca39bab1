"""What goes to the hub, and what is said when it cannot go. The hub itself is not reached."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest

import tunery
from tests.export.runs import QUIET, make_run, save_base
from tunery.errors import ConfigError, ResumableError, TuneryError


class Api:
    """Stands in for the library's client; notes what it is asked."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    error: Exception | None = None

    def __init__(self, **more: Any) -> None:
        self.more = more

    def create_repo(self, repo_id: str, **more: Any) -> str:
        if Api.error:
            raise Api.error
        Api.calls.append(("create", {"repo_id": repo_id, **more}))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **more: Any) -> None:
        folder = Path(more["folder_path"])
        Api.calls.append(("upload", {**more, "files": sorted(p.name for p in folder.iterdir())}))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[Api]:
    Api.calls, Api.error = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api


def push(run: Path, out: Path, **more: Any) -> Any:
    return tunery.export_run(run, "hub", repo="me/films", out=out, device="cpu", progress=QUIET, **more)


def test_an_adapter_is_verified_and_uploaded_with_its_card(
    run_of: Callable[[str], Path], api: type[Api], tmp_path: Path
) -> None:
    done = push(run_of("llama"), tmp_path / "out")
    (_, made), (_, sent) = api.calls
    assert made == {"repo_id": "me/films", "private": True, "exist_ok": True}
    assert sent["repo_id"] == "me/films"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "export.json", "tokenizer.json"} <= set(
        sent["files"]
    )
    assert done.upload["sent"] is True
    assert done.upload["address"] == "https://huggingface.co/me/films"
    assert done.record["comparison"]["runtime"].startswith("peft")


def test_nothing_that_is_uploaded_names_a_folder_of_this_machine(api: type[Api], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        facts = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**facts, key: str(base)}))  # as older releases have it
    run = make_run(tmp_path, base)
    (tmp_path / "rows.jsonl").unlink()
    for content in ("peft", "merged", "gguf"):
        done = push(run, tmp_path / content, content=content, dry_run=True)
        assert "cannot be read any more" in done.record["notes"][0]
        for file in done.path.iterdir():
            assert str(tmp_path).encode() not in file.read_bytes(), file.name
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"


def test_a_dry_run_lists_files_sizes_and_the_card(
    run_of: Callable[[str], Path], api: type[Api], tmp_path: Path
) -> None:
    done = push(run_of("llama"), tmp_path / "out", content="gguf", quantize="q8_0", dry_run=True, private=False)
    assert not api.calls
    assert done.upload["sent"] is False
    assert done.upload["files"]["films-q8_0.gguf"] == (done.path / "films-q8_0.gguf").stat().st_size
    assert done.upload["bytes"] == sum(done.upload["files"].values())
    assert "library_name: gguf" in done.upload["card"]
    assert "with a LoRA adapter merged into it" in done.upload["card"]
    assert "Fingerprints (SHA-256)" in done.upload["card"]


def test_files_of_other_formats_are_removed(run_of: Callable[[str], Path], api: type[Api], tmp_path: Path) -> None:
    push(run_of("llama"), tmp_path / "merged", content="merged")
    removed = api.calls[-1][1]["delete_patterns"]
    assert {"adapter_config.json", "adapter_model.safetensors", "*.gguf", "model-*.safetensors"} <= set(removed)
    assert not {"config.json", "model.safetensors"} & set(removed)
    done = push(run_of("llama"), tmp_path / "gguf", content="gguf", dry_run=True)
    assert {"adapter_config.json", "config.json", "model.safetensors", "Modelfile"} <= set(done.upload["removes"])
    assert "*.gguf" not in done.upload["removes"]  # other dtypes


def failure(status: int) -> Exception:
    error = OSError("no")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "offline", "kind", "words"),
    [
        (failure(401), False, ConfigError, "HF_TOKEN"),
        (huggingface_hub.errors.LocalTokenNotFoundError("none"), False, ConfigError, "HF_TOKEN"),
        (failure(403), False, ConfigError, "write access"),
        (failure(400), False, ConfigError, "the hub refuses what is sent"),
        (ValueError("- Error: license is bad"), False, ConfigError, "license is bad"),
        (OSError("no route"), False, ResumableError, "no route"),
        (OSError("offline"), True, ConfigError, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_is_said_when_it_cannot_go(
    error: Exception,
    offline: bool,
    kind: type[TuneryError],
    words: str,
    run_of: Callable[[str], Path],
    api: type[Api],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    api.error = error
    with pytest.raises(kind, match=words) as caught:
        push(run_of("llama"), tmp_path / "out")
    assert "Traceback" not in str(caught.value)
    assert (tmp_path / "out" / "export.json").is_file()  # the export is kept for another try
