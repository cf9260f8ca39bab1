"""Model names: what each stands for, and what happens to names that stand for nothing."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tunery.errors import AdapterError, ConfigError
from tunery.serve.api_errors import ApiError
from tunery.serve.records import Checkpoint, Job, Model, Work
from tunery.serve.registry import Registry, ServedModel
from tunery.serve.store import Store

JOB = "ftjob-1"
TUNED = "ft:gpt-4o-mini:local:films:abcd1234"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "server.sqlite3")


@pytest.fixture
def registry(tmp_path: Path, store: Store) -> Registry:
    """Two bases, an alias, and a finished job with checkpoints at steps 4 and 8."""
    run = tmp_path / "jobs" / JOB / "run"
    for folder in (run / "adapter", run / "checkpoints" / "step-4", run / "checkpoints" / "step-8"):
        make_adapter(folder)
    store.add(Job(JOB, 1, "gpt-4o-mini", 0, "file-a"))
    store.add(Work(JOB, "base-a", TUNED))
    store.add(Model(TUNED, "base-a", 77), owner=JOB)
    for step in (4, 8):
        store.add(Checkpoint(f"ftckpt_{step}", step, f"{TUNED}:ckpt-step-{step}", JOB, step), owner=JOB)
    return Registry(store, tmp_path / "jobs", ["base-a", "owner/base-b"], {"gpt-4o-mini": "base-a"})


def make_adapter(folder: Path, base: str = "base-a", **more: Any) -> None:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": base, **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"weights of " + folder.name.encode())


def refused(registry: Registry, name: str) -> ApiError:
    with pytest.raises(ApiError) as error:
        registry.resolve(name)
    assert (error.value.status, error.value.code, error.value.param) == (404, "model_not_found", "model")
    return error.value


def test_bases_and_aliases_answer_without_an_adapter(registry: Registry) -> None:
    for name, base in (("base-a", "base-a"), ("owner/base-b", "owner/base-b"), ("gpt-4o-mini", "base-a")):
        found = registry.resolve(name)
        assert (found.id, found.base, found.adapter, found.key, found.owned_by) == (name, base, None, "", "tunery")
        assert registry.base_of(name) == (base, None)


def test_a_dated_name_means_its_alias(registry: Registry) -> None:
    found = registry.resolve("gpt-4o-mini-2024-07-18")
    assert (found.id, found.base) == ("gpt-4o-mini-2024-07-18", "base-a")
    refused(registry, "gpt-4o-2024-08-06")
    refused(registry, "gpt-4o-mini-2024-7-18")


def test_a_fine_tuned_model_answers_with_its_jobs_adapter(registry: Registry, tmp_path: Path) -> None:
    found = registry.resolve(TUNED)
    assert found == ServedModel(TUNED, "base-a", tmp_path / "jobs" / JOB / "run" / "adapter", JOB, 77, "local")
    assert registry.base_of(TUNED) == ("base-a", found.adapter)


def test_a_checkpoint_becomes_an_adapter_when_it_is_asked_for_and_outlives_the_run(
    registry: Registry, tmp_path: Path
) -> None:
    name = f"{TUNED}:ckpt-step-4"
    found: list[ServedModel] = []
    threads = [threading.Thread(target=lambda: found.append(registry.resolve(name))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {model.key for model in found} == {f"{JOB}/step-4"}
    adapter = found[0].adapter
    assert adapter is not None
    assert (adapter / "adapter_model.safetensors").read_bytes() == b"weights of step-4"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "base-a"
    for file in (tmp_path / "jobs" / JOB / "run" / "checkpoints" / "step-4").iterdir():
        file.unlink()
    assert registry.resolve(name).adapter == adapter
    assert name not in [model.id for model in registry.list()]


def test_a_checkpoint_that_is_no_longer_kept_is_said_to_be_so(registry: Registry, tmp_path: Path) -> None:
    import shutil

    shutil.rmtree(tmp_path / "jobs" / JOB / "run" / "checkpoints" / "step-4")
    assert "no longer kept" in refused(registry, f"{TUNED}:ckpt-step-4").message
    assert not (tmp_path / "jobs" / JOB / "checkpoints" / "step-4").exists()
    assert "does not exist" in refused(registry, f"{TUNED}:ckpt-step-5").message


@pytest.mark.parametrize(
    "name", ["gpt-5", "", "../../etc", "/etc", "base-a/", "ft:", "ft:x:ckpt-step-4", f"{TUNED}:ckpt-step-../8", "a\nb"]
)
def test_other_names_are_refused_and_nothing_is_made_of_them(registry: Registry, name: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    refused(registry, name)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_error_names_what_there_is_and_what_may_have_been_meant(registry: Registry) -> None:
    message = refused(registry, "gpt-4o-mimi").message
    assert "Did you mean gpt-4o-mini?" in message
    assert "base-a, owner/base-b, gpt-4o-mini" in message
    assert "--alias gpt-9000=base-a" in refused(registry, "gpt-9000").message


def test_the_list_holds_bases_aliases_and_tuned_models_of_these_bases(registry: Registry, store: Store) -> None:
    store.add(Model("ft:other:local::zzzz", "another-base", 78), owner="ftjob-2")
    assert [model.id for model in registry.list()] == ["base-a", "owner/base-b", "gpt-4o-mini", TUNED]
    assert "started without" in refused(registry, "ft:other:local::zzzz").message


def test_deleting_a_model_removes_its_weights_and_its_names(registry: Registry, store: Store, tmp_path: Path) -> None:
    registry.resolve(f"{TUNED}:ckpt-step-4")
    registry.delete(TUNED)
    refused(registry, TUNED)
    refused(registry, f"{TUNED}:ckpt-step-8")
    refused(registry, f"{TUNED}:ckpt-step-4")
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert store.list(Checkpoint, owner=JOB).data == []
    assert store.get(Job, JOB) is not None
    with pytest.raises(ApiError) as error:
        registry.delete(TUNED)
    assert error.value.status == 404


@pytest.mark.parametrize("name", ["base-a", "gpt-4o-mini", "gpt-4o-mini-2024-07-18", f"{TUNED}:ckpt-step-8"])
def test_what_is_not_a_fine_tuned_model_cannot_be_deleted(registry: Registry, name: str) -> None:
    with pytest.raises(ApiError, match="Only models that were fine-tuned here") as error:
        registry.delete(name)
    assert error.value.status == 403
    registry.resolve(name)


def test_adapters_of_the_owner_are_served_under_their_names(store: Store, tmp_path: Path) -> None:
    make_adapter(tmp_path / "runs" / "films" / "adapter")
    make_adapter(tmp_path / "plain", base="HuggingFaceTB/SmolLM2-135M-Instruct")
    bases = ["base-a", "smollm2-135m-instruct"]
    given = {"films": tmp_path / "runs" / "films", "plain": tmp_path / "plain"}
    registry = Registry(store, tmp_path / "jobs", bases, adapters=given)
    films, plain = registry.resolve("films"), registry.resolve("plain")
    assert (films.base, films.adapter, films.key) == (
        "base-a",
        tmp_path / "runs" / "films" / "adapter",
        "adapter/films",
    )
    assert (plain.base, plain.adapter) == ("smollm2-135m-instruct", tmp_path / "plain")
    assert [model.id for model in registry.list()] == [*bases, "films", "plain"]
    with pytest.raises(ApiError) as error:
        registry.delete("films")
    assert error.value.status == 403
    assert (tmp_path / "plain" / "adapter_model.safetensors").exists()


def test_an_adapter_of_a_method_that_is_not_known_is_refused_at_the_start(store: Store, tmp_path: Path) -> None:
    make_adapter(tmp_path / "b", modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match="it uses modules_to_save") as error:
        Registry(store, tmp_path / "jobs", ["base-a"], adapters={"x": tmp_path / "b"})
    assert error.value.hint is not None
    assert "merge_and_unload()" in error.value.hint


def test_names_that_would_stand_for_two_things_are_refused_at_the_start(store: Store, tmp_path: Path) -> None:
    make_adapter(tmp_path / "b", base="base-b")
    jobs = tmp_path / "jobs"
    with pytest.raises(ConfigError, match="no base"):
        Registry(store, jobs, [])
    with pytest.raises(ConfigError, match="add --base other"):
        Registry(store, jobs, ["base-a"], {"x": "other"})
    for alias in ("base-a", "ft:mine", " "):
        with pytest.raises(ConfigError, match="cannot be the name"):
            Registry(store, jobs, ["base-a"], {alias: "base-a"})
    with pytest.raises(ConfigError, match="cannot be the name"):
        Registry(store, jobs, ["base-a"], {"x": "base-a"}, adapters={"x": tmp_path / "b"})
    with pytest.raises(ConfigError, match="trained on base-b"):
        Registry(store, jobs, ["base-a", "base-c"], adapters={"x": tmp_path / "b"})
    with pytest.raises(ConfigError, match="holds no adapter"):
        Registry(store, jobs, ["base-a"], adapters={"x": tmp_path})
