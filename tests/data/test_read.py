import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiny import tiny_tokenizer
from tunery.config import Columns, DataConfig
from tunery.data.example import DataSet
from tunery.data.prepare import prepare
from tunery.data.read import read_data, read_more
from tunery.data.split import text_key
from tunery.errors import ConfigError, DataError, TuneryError
from tunery.progress import Note


@pytest.fixture
def put(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str) -> str:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return str(tmp_path / name)

    return write


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def reviews(count: int, start: int = 0) -> list[dict]:
    return [{"text": f"review {number}", "label": number % 2} for number in range(start, start + count)]


def test_a_csv_of_reviews(put):
    path = put("reviews.csv", "review,stars,id\n" + "".join(f'"film {n}, seen",{n % 2},{n}\n' for n in range(100)))
    data = read_data(
        DataConfig(
            train=path, columns=Columns(label="stars"), labels={"0": "negative", "1": "positive"}, validation=20
        ),
        seed=1,
    )
    assert (data.kind, data.columns) == ("classification", {"text": "review", "label": "stars"})
    assert data.labels == ("negative", "positive")
    assert (len(data.train), len(data.validation), data.test, data.rows_read) == (80, 20, [], 100)
    assert data.train[0].text.startswith("film ")
    assert {row.label for row in data.validation} == {"negative", "positive"}
    assert data.files == {"reviews.csv": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    assert any("text from review" in note for note in data.notes)
    assert any("not used: id" in note for note in data.notes)
    first = data.train[0]
    assert first.where == f"reviews.csv:{int(first.text.split()[1].rstrip(',')) + 2}"


def test_labels_are_collected_from_the_training_rows(put):
    path = put("a.jsonl", jsonl(*reviews(10)))
    assert read_data(DataConfig(train=path), 0).labels == ("0", "1")


def test_a_label_that_only_the_validation_file_has_is_a_problem(put):
    train = put("a.jsonl", jsonl(*reviews(10)))
    validation = put("v.jsonl", jsonl({"text": "new", "label": 2}))
    with pytest.raises(DataError, match=r"v\.jsonl:1:label: '2' is not one of the labels"):
        read_data(DataConfig(train=train, validation=validation), 0)


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [(range(150), ConfigError, "150 different values"), ([1] * 5, DataError, "at least two")],
)
def test_a_column_that_cannot_be_a_class(put, labels, error, words):
    path = put("a.jsonl", jsonl(*({"text": f"t{n}", "label": label} for n, label in enumerate(labels))))
    with pytest.raises(error, match=words):
        read_data(DataConfig(train=path), 0)


def test_merged_classes_and_a_class_without_rows(put):
    path = put("a.jsonl", jsonl(*({"text": f"t{n}", "label": n % 2} for n in range(10))))
    data = read_data(DataConfig(train=path, labels={"0": "bad", "1": "bad", "2": "good"}), 0)
    assert data.labels == ("bad", "good")
    assert "No training row has the label good." in data.notes


class TestBadRows:
    def test_stop_lists_all_of_all_files(self, put):
        train = put("a.jsonl", jsonl({"text": "", "label": None}, *reviews(5)) + "{\n[1]\n")
        test = put("t.jsonl", jsonl({"text": " ", "label": 1}))
        with pytest.raises(DataError) as error:
            read_data(DataConfig(train=train, test=test, labels=("0", "1")), 0)
        lines = error.value.message.splitlines()
        assert lines[0] == "5 problems in 4 of 9 rows:"
        assert [line.split(" ")[0] for line in lines[1:]] == [
            "a.jsonl:1:text:",
            "a.jsonl:1:label:",
            "a.jsonl:7:column",
            "a.jsonl:8:(row):",
            "t.jsonl:1:text:",
        ]
        assert all("→" in line for line in lines[1:])
        assert "data.on_bad_row: skip" in str(error.value)
        assert error.value.exit_code == 3

    def test_one_cause_is_shown_three_times_and_counted(self, put):
        path = put("a.jsonl", jsonl({"text": "fine"}, *({"text": ""} for _ in range(250))))
        with pytest.raises(DataError) as error:
            read_data(DataConfig(train=path), 0)
        lines = error.value.message.splitlines()
        assert lines[0] == "250 problems in 250 of 251 rows:"
        assert [line.split(": ")[0] for line in lines[1:4]] == ["a.jsonl:2:text", "a.jsonl:3:text", "a.jsonl:4:text"]
        assert lines[4].startswith("  … and 247 more like these (lines 5, 6, 7,")
        assert len(lines) == 5

    def test_skip_drops_and_counts(self, put):
        path = put("a.jsonl", jsonl({"text": "", "label": 1}, *reviews(10)) + "{\n")
        data = read_data(DataConfig(train=path, on_bad_row="skip", validation=None), 0)
        assert (len(data.train), data.rows_read) == (10, 12)
        assert [problem.line for problem in data.skipped] == [1, 12]
        assert "Rows skipped, as data.on_bad_row says: 2 of 12." in data.notes

    def test_the_empty_file_is_the_one_that_is_named(self, put):
        train = put("a.jsonl", jsonl({"text": "", "label": 1}, *reviews(10)))
        with pytest.raises(DataError, match=r"^v\.jsonl holds no rows"):
            read_data(DataConfig(train=train, validation=put("v.jsonl", ""), on_bad_row="skip"), 0)

    def test_bad_rows_come_before_what_follows_from_them(self, put):
        path = put("a.jsonl", jsonl({"text": "good", "label": 1}, {"text": "", "label": 0}))
        with pytest.raises(DataError, match=r"a\.jsonl:2:text: empty"):
            read_data(DataConfig(train=path), 0)

    @pytest.mark.parametrize("content", ["{\n", jsonl({"text": ""}), jsonl({"text": None}) * 1500])
    def test_skip_needs_one_good_row(self, put, content):
        with pytest.raises(DataError, match=r"a\.jsonl:"):
            read_data(DataConfig(train=put("a.jsonl", content), on_bad_row="skip"), 0)

    def test_good_rows_after_a_long_stretch_of_broken_ones(self, put):
        path = put("a.jsonl", "x\n" * 1500 + jsonl(*reviews(10)))
        assert len(read_data(DataConfig(train=path, on_bad_row="skip", validation=None), 0).train) == 10

    def test_what_a_file_says_cannot_command_the_terminal(self, put):
        path = put("a.jsonl", jsonl({"text": "a", "label": "\x1b[2J\u202e"}))
        with pytest.raises(DataError) as error:
            read_data(DataConfig(train=path, labels=("x", "y")), 0)
        assert "\x1b" not in str(error.value)
        assert "\u202e" not in str(error.value)

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"])
    def test_an_empty_file(self, put, name):
        with pytest.raises(DataError, match=r"a\.\w+ holds no rows"):
            read_data(DataConfig(train=put(name, "")), 0)

    def test_an_empty_validation_file(self, put):
        config = DataConfig(train=put("a.jsonl", jsonl(*reviews(4))), validation=put("v.jsonl", "\n"))
        with pytest.raises(DataError, match=r"v\.jsonl holds no rows"):
            read_data(config, 0)


class TestSides:
    def test_files_take_their_texts_out_of_training(self, put):
        config = DataConfig(
            train=put("a.jsonl", jsonl(*reviews(20))),
            validation=put("v.jsonl", jsonl({"text": "REVIEW  3", "label": 0}, {"text": "other", "label": 0})),
            test=put("t.jsonl", jsonl({"text": "review 4", "label": 0}, {"text": "Other", "label": 1})),
        )
        data = read_data(config, 0)
        assert (len(data.train), data.overlap_removed) == (18, 2)
        assert [row.text for row in data.validation] == ["REVIEW  3"]
        assert sorted(row.text for row in data.test) == ["Other", "review 4"]
        assert "Validation rows left out because their text is in the test file: 1." in data.notes

    def test_a_fraction_is_taken_from_what_the_test_file_leaves(self, put):
        config = DataConfig(
            train=put("a.jsonl", jsonl(*reviews(20))), validation=0.5, test=put("t.jsonl", jsonl(*reviews(10)))
        )
        data = read_data(config, 0)
        assert (len(data.train), len(data.validation), len(data.test), data.overlap_removed) == (5, 5, 10, 10)
        sides = [{text_key(row) for row in side} for side in (data.train, data.validation, data.test)]
        assert not sides[0] & sides[1]
        assert not (sides[0] | sides[1]) & sides[2]

    def test_the_training_file_as_its_own_test(self, put):
        path = put("a.jsonl", jsonl(*reviews(4)))
        with pytest.raises(DataError, match="every training row"):
            read_data(DataConfig(train=path, test=path), 0)

    def test_duplicates_are_counted_and_dropped_when_asked(self, put):
        path = put("a.jsonl", jsonl(*reviews(10), *reviews(3), {"text": "review 0", "label": 1}))
        keep = read_data(DataConfig(train=path, validation=None), 0)
        drop = read_data(DataConfig(train=path, validation=None, duplicates="drop"), 0)
        assert (len(keep.train), keep.duplicates) == (14, 3)
        assert (len(drop.train), drop.duplicates) == (11, 3)

    def test_max_rows(self, put):
        path = put("a.jsonl", jsonl(*reviews(50)))
        data = read_data(DataConfig(train=path, max_rows=7, validation=10), 0)
        assert (len(data.train), len(data.validation)) == (7, 10)
        assert data.train == read_data(DataConfig(train=path, max_rows=7, validation=10), 0).train
        assert data.train != read_data(DataConfig(train=path, max_rows=7, validation=10), 1).train

    def test_one_prompt_for_all_rows(self, put):
        rows = [{"prompt": "A line:", "completion": f"line {number}"} for number in range(5)]
        data = read_data(DataConfig(train=put("a.jsonl", jsonl(*rows))), 0)
        assert (len(data.train), data.validation) == (5, [])
        assert any("none is held out" in note for note in data.notes)


class TestSeveralFiles:
    def test_of_different_formats(self, put):
        config = DataConfig(
            train=(put("a.jsonl", jsonl(*reviews(4))), put("b.csv", "label,text\n1,film\n")), validation=None
        )
        data = read_data(config, 0)
        assert [row.where for row in data.train][-1] == "b.csv:2"
        assert set(data.files) == {"a.jsonl", "b.csv"}

    def test_each_must_have_the_columns(self, put):
        config = DataConfig(train=(put("a.jsonl", jsonl(*reviews(4))), put("b.csv", "text,stars\nx,1\n")))
        with pytest.raises(ConfigError, match=r"b\.csv has no column 'label'"):
            read_data(config, 0)

    def test_plain_text(self, put):
        config = DataConfig(train=(put("a.md", "one\n"), put("b.txt", "two\n")), validation=None)
        data = read_data(config, 0)
        assert (data.kind, [row.text for row in data.train]) == ("text", ["one", "two"])


def test_conversations_whose_end_is_not_trained_are_noted(put):
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = put("a.jsonl", jsonl({"messages": turn}, {"messages": [*turn, {"role": "user", "content": "Thanks"}]}))
    data = read_data(DataConfig(train=path, validation=None), 0)
    assert "Conversations whose end, after the last trained answer, was left out: 1." in data.notes


def test_tools_that_appear_late_are_not_lost(put):
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    path = put("a.jsonl", jsonl(*[{"messages": turn}] * 1200, {"messages": turn, "tools": tools}))
    assert read_data(DataConfig(train=path, validation=None), 0).train[-1].tools == tuple(tools)


class TestReadMore:
    LIKE = DataConfig(train="/gone/a.csv", labels={"0": "negative", "1": "positive"})

    def read(self, path: str, like: DataConfig = LIKE) -> DataSet:
        return read_more(path, like, "classification", ("negative", "positive"), {"text": "text", "label": "label"})

    def test_rows_are_read_as_the_task_read_them(self, put):
        data = self.read(put("more.csv", "text,label\na,1\nb,0\n"))
        assert [row.label for row in data.test] == ["positive", "negative"]
        assert (data.train, data.validation, data.rows_read) == ([], [], 2)
        assert list(data.files) == ["more.csv"]

    def test_collected_labels(self, put):
        path = put("more.csv", "text,label\na,positive\n")
        assert self.read(path, DataConfig(train="/gone/a.csv")).test[0].label == "positive"

    def test_bad_rows_and_columns(self, put):
        with pytest.raises(DataError, match=r"more\.csv:2:label"):
            self.read(put("more.csv", "text,label\na,7\n"))
        with pytest.raises(ConfigError, match="no column 'label'"):
            self.read(put("other.csv", "text,labl\na,1\n"))
        with pytest.raises(DataError, match="holds no rows"):
            self.read(put("empty.csv", "text,label\n"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "weight", "tool_calls", "type", "function", "id"]), inner)
    ),
    max_leaves=8,
)


class TestAnything:
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        content=st.binary(max_size=200) | st.text("[]{}\",:;'\n\r\t\\ue ab1-\x00", max_size=80).map(str.encode),
        extension=st.sampled_from(["jsonl", "json", "csv", "tsv", "txt", "parquet"]),
        skip=st.booleans(),
    )
    def test_bytes_give_rows_or_a_clear_error(self, tmp_path, content, extension, skip):
        path = tmp_path / f"a.{extension}"
        path.write_bytes(content)
        self.check(path, skip)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        rows=st.lists(
            st.dictionaries(st.sampled_from(["messages", "tools", "text", "label", "prompt"]), JSON), min_size=1
        ),
        skip=st.booleans(),
    )
    def test_json_gives_rows_or_a_clear_error(self, tmp_path, rows, skip):
        path = tmp_path / "a.jsonl"
        path.write_text(jsonl(*rows))
        self.check(path, skip)

    def check(self, path: Path, skip: bool) -> None:
        try:
            data = read_data(DataConfig(train=str(path), on_bad_row="skip" if skip else "stop"), 0)
        except TuneryError as error:
            str(error).encode()  # what is shown can be shown
            return
        assert len(data.train) >= 1
        assert skip or not data.skipped
        json.dumps([[row.text, row.messages, row.tools] for row in data.train], ensure_ascii=False).encode()


def test_a_hundred_thousand_rows_take_seconds(put):
    import time

    path = put("a.jsonl", jsonl(*reviews(100_000)))
    start = time.process_time()
    data = read_data(DataConfig(train=path), 0)
    assert len(data.validation) == 10_000
    assert time.process_time() - start < 15


def test_reading_and_tokenising_that_last_say_how_far_they_are(put, monkeypatch):
    monkeypatch.setattr("tunery.data.pace.FIRST_SECONDS", 0.0)
    monkeypatch.setattr("tunery.data.pace.EVERY_SECONDS", 0.0)
    config = DataConfig(train=put("a.jsonl", jsonl(*({"text": f"unlike others {n}"} for n in range(20)))))
    notes: list[Note] = []
    data = read_data(config, 0, notes.append)
    prepare(data, config, tiny_tokenizer(), 64, notes.append)
    said = [note.message for note in notes]
    assert "reading rows: 20" in said
    assert "tokenising rows: 9 of 18" in said


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_text_that_is_too_long_to_be_a_row(put, monkeypatch, name):
    monkeypatch.setattr("tunery.data.json_rows.MOST_CHARACTERS", 1000)
    monkeypatch.setattr("tunery.data.rows.MOST_CHARACTERS", 1000)
    rows = ["short", "long " * 300]
    content = "text\n" + "\n".join(rows) if name == "a.csv" else jsonl(*({"text": row} for row in rows))
    with pytest.raises(DataError, match=r"1 problem in 1 of 2 rows:(.|\n)*characters are more than") as error:
        read_data(DataConfig(train=put(name, content), validation=None), 0)
    assert "cut it into several rows" in str(error.value)
