"""The model card."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.evaluation.test_report import evaluation, receipt, run_dir
from tunery.evaluation import proof
from tunery.evaluation.proof import last_part
from tunery.evaluation.record import read_run
from tunery.export.hub import write_card
from tunery.export.subject import hub_id
from tunery.models.model_source import locate


def card(tmp_path: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    root = run_dir(tmp_path / "run", evaluated=evaluation(), proof=receipt(**changes))
    return split(write_card(root, tmp_path / "adapter").read_text(encoding="utf-8"))


def split(text: str) -> tuple[dict[str, Any], str]:
    _, front, body = re.split(r"^---$\n", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front), body


def test_front_matter_of_a_base_from_the_hub(tmp_path: Path):
    front, body = card(tmp_path, model={"name": "x", "source": "Qwen/Qwen3-0.6B", "license": "Apache-2.0"})
    assert front == {
        "base_model": "Qwen/Qwen3-0.6B",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "tunery", "base_model:adapter:Qwen/Qwen3-0.6B"],
        "license": "apache-2.0",
    }
    assert 'from_pretrained("Qwen/Qwen3-0.6B")' in body


def test_a_built_in_name_becomes_its_hub_id(tmp_path: Path):
    front, _ = card(tmp_path, model={"name": "smollm2-135m-instruct"})
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_local_base_is_no_hub_id_and_its_folder_stays_private(tmp_path: Path):
    front, body = card(tmp_path, model={"name": "/home/ada/secret/my-model", "source": "/home/ada/secret/my-model"})
    assert "base_model" not in front
    assert front["tags"] == ["lora", "tunery"]
    assert "my-model" in body
    assert "/home/ada" not in body


def python_of(body: str) -> str:
    match = re.search(r"```python\n(.*?)```", body, re.DOTALL)
    assert match
    return match[1]


def test_the_revision_of_a_base_from_the_hub_is_loaded(tmp_path: Path):
    front, body = card(tmp_path, model={"name": "Qwen/Qwen3-0.6B", "source": f"Qwen/Qwen3-0.6B@{'ab' * 20}"})
    assert front["base_model"] == "Qwen/Qwen3-0.6B"
    assert f'from_pretrained("Qwen/Qwen3-0.6B", revision="{"ab" * 20}")' in python_of(body)


def test_a_base_from_a_file_of_few_bits_says_so_and_is_loaded_from_it(tmp_path: Path):
    _, body = card(tmp_path, model={"name": "m.gguf", "source": "/home/ada/m.gguf", "file_type": "Q4_K_M"})
    assert "read from the file m.gguf, which holds about 4 bits a weight (Q4\\_K\\_M)" in body
    assert 'from_pretrained("path/to/its/folder", gguf_file="m.gguf")' in python_of(body)
    assert "/home/ada" not in body
    _, body = card(tmp_path / "b", model={"name": "m.gguf", "source": "/home/ada/m.gguf", "file_type": "F16"})
    assert "bits a weight" not in body


def test_the_packaged_base_is_loaded_from_its_package(tmp_path: Path, smollm2: str):
    source = locate(smollm2)
    assert source.file_type == "Q4_1"
    about = {"name": smollm2, "source": source.origin, "file_type": source.file_type}
    front, body = card(tmp_path, model=about)
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "about 4 bits a weight" in body
    code = python_of(body)
    ast.parse(code)
    place = next(line for line in code.splitlines() if line.startswith("folder = "))
    found: dict[str, Any] = {}
    exec(f"import importlib.util\n{place}", found)
    assert f'from_pretrained(folder, gguf_file="{Path(source.origin).name}")' in code
    assert (Path(found["folder"]) / Path(source.origin).name).samefile(source.origin)


def test_data_files_are_named_without_their_folder(tmp_path: Path):
    _, body = card(tmp_path, data={"kind": "classification", "files": {"/home/ada/reviews.csv": "cd" * 32}})
    assert f"reviews.csv: `{'cd' * 32}`" in body
    assert "/home/ada" not in body


def test_results_and_hashes(tmp_path: Path):
    _, body = card(tmp_path)
    assert "| Accuracy (higher is better) | 60.0% | 90.0% | +30.0 points |" in body
    assert "tunery chat runs/sentiment" in body
    assert f"Receipt: `{read_run(tmp_path / 'run').receipt_sha256}`" in body


@pytest.mark.parametrize(
    ("stated", "front"),
    [
        ("MIT", {"license": "mit"}),
        ("mit, Apache-2.0", {"license": ["mit", "apache-2.0"]}),
        ("tongyi-qianwen-research", {"license": "other", "license_name": "tongyi-qianwen-research"}),
        ("Our Terms, v2", {"license": "other", "license_name": "our-terms-v2"}),
    ],
)
def test_a_licence_is_named_as_the_hub_takes_it(tmp_path: Path, stated: str, front: dict[str, Any]):
    found, _ = card(tmp_path, model={"name": "x", "license": stated})
    assert {key: value for key, value in found.items() if key.startswith("license")} == front


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_the_python_shown_parses(tmp_path: Path, kind: str):
    _, body = card(tmp_path, data={"kind": kind}, model={"name": 'odd "name"'})
    match = re.search(r"```python\n(.*?)```", body, re.DOTALL)
    assert match
    ast.parse(match[1])


def test_texts_stay_text_in_markdown_and_yaml(tmp_path: Path):
    evil = "<script>x</script>\n---\n# big `code` | cell"
    front, body = card(tmp_path, name=evil, warnings=[evil], model={"name": "a", "license": "x: [y\n---\n# z"})
    assert (front["license"], front["license_name"]) == ("other", "x-y-z")
    assert "<script>" not in body
    assert body.count("\n# ") == 1


def test_no_evaluation_and_no_receipt_still_make_a_card(tmp_path: Path):
    front, body = split(write_card(run_dir(tmp_path / "run"), tmp_path).read_text(encoding="utf-8"))
    assert front["library_name"] == "peft"
    assert "Not evaluated" in body
    assert "None" not in body


def test_an_existing_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    root = run_dir(tmp_path / "run", proof=receipt(model={"name": "models/mine"}))
    (root / "task.yaml").write_text(json.dumps({"name": "x"}))
    assert hub_id(read_run(root)) is None


PRIVATE = "/home/zyxq/qqhidden"


def test_no_path_of_the_machine_reaches_a_card_whatever_a_label_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed = tuple(
        (title, tuple(replace(entry, label=f"Label {number}") for number, entry in enumerate(entries)))
        for title, entries in proof._FACTS
    )
    monkeypatch.setattr(proof, "_FACTS", renamed)
    _, body = card(
        tmp_path,
        model={"name": f"{PRIVATE}/my-model", "source": f"{PRIVATE}/my-model", "sha256": "ab" * 32},
        template={"source": f"{PRIVATE}/template.jinja"},
        lora={"start": {"path": f"{PRIVATE}/qqolder/adapter", "sha256": "cd" * 32}, "rank": 8},
        data={"kind": "classification", "files": {f"{PRIVATE}/qq mine/reviews.csv": "ef" * 32}},
        precision={"dtype": "float32", "reason": f"timed, kept in {PRIVATE}/cache/probe.json"},
        warnings=[f"rows of {PRIVATE}/qq mine/reviews.csv ('{PRIVATE}/more.csv') were cut", "see https://a.org/qa/b"],
    )
    assert "zyxq" not in body
    assert "qq" not in body
    assert body.count("my-model") >= 2
    for shown in ("template.jinja", "reviews.csv", "more.csv", "probe.json", "cd" * 32, "https://a.org/qa/b"):
        assert shown in body


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("g++ -I/home/zyxq/.venv/include x.cpp", "g++ -Iinclude x.cpp"),
        ("path=/home/zyxq/x/y.csv", "path=y.csv"),
        ("at file:///home/zyxq/x", "at x"),
        ("[/home/zyxq/x/y] and “/home/zyxq/z”", "[y] and “z”"),
        (r"\\zyxq\share\x", "x"),
        (r"in C:\zyxq\share\x.csv.", "in x.csv."),
        ("../zyxq/secret/x.csv", "x.csv"),
        ("~/zyxq/x.csv", "x.csv"),
        ("12 of 20 words/tokens, owner/name, 3/4, https://example.org/zy/x", None),
    ],
)
def test_a_text_that_is_published_names_the_last_part_of_a_path(tmp_path: Path, said: str, shown: str | None) -> None:
    _, body = card(tmp_path, warnings=[said])
    limits = re.sub(r"\\([^\w\s])", r"\1", body.partition("## Limits")[2].partition("## ")[0])
    assert f"- {shown or said}." in limits
    assert "zyxq" not in body


def test_the_home_folder_is_not_named(tmp_path: Path) -> None:
    _, body = card(tmp_path, warnings=[f"made by {Path.home()}"])
    assert str(Path.home()) not in body


def test_a_windows_path_is_a_path() -> None:
    assert last_part(r"C:\Users\ada\models\mine") == "mine"
    assert last_part("owner/name/") == "name"
