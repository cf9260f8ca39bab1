"""The same task file, trained here and hosted, gives two reports of the same form."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

import tunery
from tests.hosted.conftest import Watching, write_task
from tests.hosted.fake import KEY, Fake, serving
from tests.tiny import save_tiny_llama
from tunery.hosted import client as client_module

Both = tuple[tunery.Run, tunery.Run, list[str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """(the run here, the hosted one, what the server was asked) of one task file."""
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch, serving(Fake()) as fake:
        patch.chdir(folder)
        patch.setattr(client_module, "sleep", lambda _: None)
        patch.setenv("OPENAI_BASE_URL", fake.address)
        patch.setenv("OPENAI_API_KEY", KEY)
        write_task(folder)
        base = save_tiny_llama(folder / "base")
        here = tunery.train("task.yaml", [f"model={base}", "name=here"], progress=Watching())
        there = tunery.train("task.yaml", ["name=there"], progress=Watching(), consent=lambda _: True)
        yield here, there, [request["messages"][-1]["content"] for request in fake.asked]


def page(run: tunery.Run) -> str:
    return (run.path / "report.html").read_text()


def keys(value: Any, depth: int, at: str = "") -> set[str]:
    """The names in a structure, down to a depth."""
    if not isinstance(value, Mapping) or depth == 0:
        return set()
    return {f"{at}{key}" for key in value} | {
        name for key, inner in value.items() for name in keys(inner, depth - 1, f"{at}{key}.")
    }


def outline(run: tunery.Run) -> list[str]:
    """Sections, headings and columns of a report, in order, without those that a run may have or not."""
    found = re.findall(r'aria-labelledby="\w+"|<h[23][^>]*>[^<]*|<th scope="col"[^>]*>[^<]*', page(run))
    return [part for part in found if "warnings" not in part and "Know this" not in part]


def test_the_evaluations_have_the_same_form(runs: Both) -> None:
    here, there = (run.evaluation for run in runs[:2])
    assert here is not None
    assert there is not None
    assert keys(here, 1) <= keys(there, 1)
    assert keys(there, 1) - keys(here, 1) == {"by", "answering"}
    scores = {"accuracy", "accuracy_interval", "macro_f1", "weighted_f1", "per_label", "confusion"}
    for side in ("base", "tuned"):
        assert scores <= set(here[side]) & set(there[side])
    assert {frozenset(sample) for sample in (*here["samples"], *there["samples"])} == {
        frozenset(("where", "prompt", "reference", "base", "tuned"))
    }
    assert here["rows"] == there["rows"] == 8


def test_the_same_rows_are_held_out_and_asked_the_same(runs: Both) -> None:
    here, there = (run.evaluation for run in runs[:2])
    assert here is not None
    assert there is not None
    assert {sample["where"] for sample in here["samples"]} == {sample["where"] for sample in there["samples"]}
    assert set(runs[2]) == {f"good or bad?\n\n{sample['prompt']}" for sample in here["samples"]}


def test_the_receipts_tell_of_the_data_alike(runs: Both) -> None:
    here, there = (run.receipt for run in runs[:2])
    same = set(here["data"]) & set(there["data"]) - {"rows_sha256"}
    assert set(here["data"]) - same == {"max_length", "rows_sha256"}
    assert {key: here["data"][key] for key in same} == {key: there["data"][key] for key in same}
    own = {"template", "lora", "reload", "adapter", "device", "precision", "memory"}
    assert set(here) - set(there) == own, "what only a model that lies here can be asked"
    assert set(there) - set(here) == {"hosted"}


def test_the_pages_have_the_same_sections_and_tables(runs: Both) -> None:
    here, there = ([part for part in outline(run) if "mistakes" not in part.casefold()] for run in runs[:2])
    # mistakes are left out: only one of these models makes any
    sections = [part for part in there if part.startswith("aria-labelledby")]
    assert sections == [part for part in here if part.startswith("aria-labelledby")]
    assert len(sections) == 5
    only_here = {'<th scope="col">Tensor', '<th class="n" scope="col">Shape', '<th class="n" scope="col">Moved'}
    headings = ("Learning rate", "Model and adapter", "Machine", "Speed")
    left_out = {part for part in here if part not in there}
    assert {part for part in left_out - only_here if not part.endswith(headings)} == set()
    for table in ("Metrics of base and tuned model", "Scores by label", "Confusion of the tuned model"):
        assert all(f'aria-label="{table}"' in page(run) for run in runs[:2])


def test_the_hosted_page_says_what_is_different(runs: Both) -> None:
    here, there = (page(run) for run in runs[:2])
    for words in ("Labels are read from written answers.", "What was checked is what was sent", "Tokens billed"):
        assert words in there
        assert words not in here
