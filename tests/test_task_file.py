"""Reading a task file: every mistake is named by file, line and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunery.config import LoraConfig, all_settings
from tunery.errors import ConfigError
from tunery.task_file import load_task, resolve_task

MINIMAL = "model: smollm2-135m-instruct\ndata:\n  train: rows.csv\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "task.yaml"
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_task(path, overrides)
    assert error.value.exit_code == 2
    return str(error.value)


def test_a_minimal_file_is_enough_and_the_folder_names_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "my reviews"
    folder.mkdir()
    task = load_task(write(folder, MINIMAL))
    assert task.name == "my-reviews"
    assert task.run_dir == Path("runs/my-reviews")
    assert task.data.train == str(folder / "rows.csv")
    assert task.lora.effective_alpha == 32


def test_every_wrong_setting_is_listed_with_its_line_and_a_suggestion(tmp_path: Path) -> None:
    text = refusal(
        write(tmp_path, MINIMAL + "lora:\n  rnak: 8\ntrain:\n  batch_size: none\n  schedular: cosine\nsede: 3\n")
    )
    assert "task.yaml:5:lora.rnak: unknown setting; did you mean lora.rank?" in text
    assert "task.yaml:7:train.batch_size: input should be a valid integer" in text
    assert "task.yaml:8:train.schedular: unknown setting; did you mean train.scheduler?" in text
    assert "task.yaml:9:sede: unknown setting; did you mean seed?" in text


def test_a_setting_in_the_wrong_section_is_pointed_to_its_place(tmp_path: Path) -> None:
    assert "did you mean train.learning_rate?" in refusal(write(tmp_path, MINIMAL + "lora:\n  learning_rate: 1e-4\n"))


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    assert "task.yaml:1:model: this setting is needed" in refusal(write(tmp_path, "data:\n  train: a.csv\n"))
    assert "data: this setting is needed" in refusal(write(tmp_path, "model: a\n"))


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-5 as a string."""
    task = load_task(write(tmp_path, MINIMAL + "train:\n  learning_rate: 1e-5\n  warmup: 1e-1\n"))
    assert task.train.learning_rate == 1e-5
    assert task.train.warmup == 0.1
    assert load_task(write(tmp_path, MINIMAL), ["train.learning_rate=2e-4"]).train.learning_rate == 2e-4


def test_labels_may_be_numbers_or_words_yaml_takes_for_booleans(tmp_path: Path) -> None:
    labelled = load_task(write(tmp_path, MINIMAL + "  labels: {0: negative, 1: positive}\n"))
    assert labelled.data.labels == {"0": "negative", "1": "positive"}
    assert load_task(write(tmp_path, MINIMAL + "  labels: [1, 2]\n")).data.labels == ("1", "2")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, MINIMAL + "lora:\n  rank: 4\n  rank: 8\n"))
    assert "task.yaml:6:lora.rank: this key stands twice (first on line 5)" in text


def test_anchors_and_merges_work(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, MINIMAL + "lora: &small\n  rank: 4\n  alpha: 4\ntrain:\n  epochs: 2\n"))
    assert task.lora.rank == 4
    merged = "model: a/b\ndata:\n  <<: {train: rows.csv, max_rows: 5}\n  max_rows: 7\n"
    assert load_task(write(tmp_path, merged)).data.max_rows == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [a\n", "not valid YAML"),
        ("- a\n- b\n", "a task file holds settings"),
        ("", "model: this setting is needed"),
        ("just words\n", "a task file holds settings"),
        ("model: a\n\tdata: b\n", "task.yaml:2: not valid YAML"),
    ],
)
def test_what_is_no_task_file_is_said(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(write(tmp_path, text))


def test_a_missing_file_and_a_folder_are_said(tmp_path: Path) -> None:
    assert "tunery init" in refusal(tmp_path / "none.yaml")
    assert "is a folder" in refusal(tmp_path)


def test_overrides_come_over_the_file_and_are_named_when_wrong(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "lora:\n  rank: 4\n")
    assert load_task(path, ["lora.rank=8", "lora.targets=[q_proj, v_proj]"]).lora.targets == ("q_proj", "v_proj")
    assert "--set lora.rank: input should be greater than 0 (got 0)" in refusal(path, "lora.rank=0")
    assert "not of the form key=value" in refusal(path, "lora.rank")
    assert "--set lora.rnak: unknown setting" in refusal(path, "lora.rnak=8")


def test_paths_are_relative_to_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    path = write(there, MINIMAL + "  test: /absolute/test.csv\n  validation: 0.2\n")
    task = load_task(path, ["data.train=mine.csv"])
    assert task.data.train == str(here / "mine.csv")
    assert task.data.test == "/absolute/test.csv"
    assert load_task(path).data.train == str(there / "rows.csv")
    assert load_task(path, ["data.train=hub:owner/name"]).data.train == "hub:owner/name"
    (there / "base").mkdir()
    assert load_task(path, ["model=../there/base"]).model == str(there / "base")
    assert load_task(path, ["lora.start=old/adapter"]).lora.start == str(here / "old" / "adapter")
    path = write(there, MINIMAL + "lora:\n  start: runs/old/adapter\n")
    assert load_task(path).lora.start == str(there / "runs" / "old" / "adapter")


def test_a_task_written_out_reads_back_equal(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, MINIMAL + "  labels: {0: a, 1: b}\ntrain:\n  report_to: tensorboard\n"))
    copy = tmp_path / "copy"
    copy.mkdir()
    assert load_task(write(copy, task.to_yaml())) == task


def test_early_stopping_without_validation_is_refused(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, MINIMAL + "  validation: null\ntrain:\n  early_stopping_patience: 2\n"))
    assert "needs data.validation" in text


def test_every_setting_has_a_description() -> None:
    assert all(info.description for _, info in all_settings())


# --------------------------------------------------------------------------- what YAML takes for other than was written


@pytest.mark.parametrize(
    ("written", "labels"),
    [
        ("{0: no, 1: yes}", {"0": "no", "1": "yes"}),
        ("{true: yes, false: no}", {"true": "yes", "false": "no"}),
        ("{01: fine, 010: broken}", {"01": "fine", "010": "broken"}),
        ("{a: 1.10, b: 1e3}", {"a": "1.10", "b": "1e3"}),
        ('{a: "null", b: off}', {"a": "null", "b": "off"}),
        ("[no, yes, 2026-01-02]", ("no", "yes", "2026-01-02")),
    ],
)
def test_labels_are_as_they_are_written(tmp_path: Path, written: str, labels: object) -> None:
    assert load_task(write(tmp_path, f"{MINIMAL}  labels: {written}\n")).data.labels == labels
    assert load_task(write(tmp_path, MINIMAL), [f"data.labels={written}"]).data.labels == labels


def test_a_label_without_a_word_is_refused(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, MINIMAL + "  labels: {a: null, b: broken}\n"))
    assert ":4:data.labels.a: a label has no word" in text
    assert "in quotes" in text
    assert "data.labels: a label is blank" in refusal(write(tmp_path, MINIMAL + '  labels: {a: " ", b: broken}\n'))


def test_files_must_be_named_and_numbers_stand_without_quotes(tmp_path: Path) -> None:
    assert ":3:data.train: name at least one file" in refusal(write(tmp_path, "model: m\ndata:\n  train: []\n"))
    text = refusal(write(tmp_path, MINIMAL + '  validation: "0.5"\n'))
    assert "data.validation: a fraction or a number of rows is written without quotes" in text


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    task = load_task(write(tmp_path, "model: m\ndata:\n  train: ~/rows.csv\n"))
    assert task.data.train == str(tmp_path / "home" / "rows.csv")


def test_nested_aliases_end_at_once_and_in_few_words(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    text = refusal(write(tmp_path, "\n".join(lines)))
    assert "more than 100,000 values" in text
    assert len(text) < 500


# --------------------------------------------------------------------------- settings as values


def test_settings_as_values_say_the_same_as_overrides(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("model: m\ndata:\n  train: rows.csv\n  max_rows: 5\nlora:\n  alpha: 3\n")
    said = load_task(tmp_path / "task.yaml", ["lora.rank=8", "data.labels={0: no, 1: yes}", "seed=7"])
    given = load_task(
        tmp_path / "task.yaml",
        settings={"lora": {"rank": 8}, "data": {"labels": {"0": "no", "1": "yes"}}, "seed": 7},
    )
    assert given == said
    assert given.lora.alpha == 3
    assert given.data.max_rows == 5
    assert load_task(tmp_path / "task.yaml", settings={"lora.rank": 8, "lora": LoraConfig(alpha=3)}).lora.rank == 8


def test_overrides_come_after_settings(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("model: m\ndata:\n  train: rows.csv\n")
    assert load_task(tmp_path / "task.yaml", ["seed=2"], {"seed": 1}).seed == 2


def test_a_task_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    task = load_task(None, ["train.epochs=2"], {"model": "./base", "data": Path("some/film reviews.csv")})
    assert (task.name, task.model, task.train.epochs) == ("film-reviews", str(tmp_path / "base"), 2)
    assert task.data.train == str(tmp_path / "some" / "film reviews.csv")
    several = load_task(None, settings={"model": "m", "data": ["a.csv", "b: c #.csv"], "name": "mine"})
    assert several.data.train == (str(tmp_path / "a.csv"), str(tmp_path / "b: c #.csv"))
    assert several.name == "mine"
    assert load_task(None, settings={"model": "m", "data": "hub:me/films:test"}).name == "films"
    (tmp_path / "kept.yaml").write_text(task.to_yaml())
    assert load_task(tmp_path / "kept.yaml") == task


def test_a_wrong_value_is_named_by_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_task(None, ["lora.alpha=-1"], {"model": "m", "data": "rows.csv", "lora": {"rank": 0, "rnak": 3}})
    assert caught.value.message.splitlines() == [
        "lora.rank: input should be greater than 0 (got 0)",
        "--set lora.alpha: input should be greater than 0 (got -1)",
        "lora.rnak: unknown setting; did you mean lora.rank?",
    ]


@pytest.mark.parametrize("settings", [{"model": "m", "data": ""}, {"model": "m", "data": ["a.csv", " "]}])
def test_a_blank_name_is_not_the_current_folder(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="name at least one file"):
        load_task(None, settings=settings)


def test_a_task_takes_overrides_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task = load_task(None, settings={"model": "m", "data": "rows.csv", "lora": {"rank": 4}})
    changed = resolve_task(task, ["seed=3"], {"lora": {"alpha": 5}})
    assert (changed.seed, changed.lora.rank, changed.lora.alpha, changed.name) == (3, 4, 5, "rows")
    assert "dropout" not in changed.lora.model_fields_set
    assert resolve_task(task) == task
