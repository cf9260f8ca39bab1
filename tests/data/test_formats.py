import csv
import gzip
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from tunery.data.example import Problem
from tunery.data.formats import PASSAGE_CHARACTERS, open_source
from tunery.data.source import Item, RawRow
from tunery.errors import ConfigError, DataError
from tunery.versions import install_command


def put(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def items(folder: Path, name: str, content: str | bytes) -> list[Item]:
    return list(open_source(put(folder, name, content)).items)


def only_rows(found: Iterable[Item]) -> list[RawRow]:
    kept: list[RawRow] = []
    for item in found:
        assert isinstance(item, RawRow), item
        kept.append(item)
    return kept


def rows(folder: Path, name: str, content: str | bytes) -> list[RawRow]:
    return only_rows(items(folder, name, content))


def problems(folder: Path, name: str, content: str | bytes) -> list[Problem]:
    return [problem for item in items(folder, name, content) if not isinstance(item, RawRow) for problem in item]


class TestJsonLines:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "A.JSONL"])
    def test_blank_lines_are_passed_over_and_counted(self, tmp_path, name):
        content = '\ufeff{"text": "a"}\r\n\n   \n{"text": "b\u2028c"}'
        assert rows(tmp_path, name, content) == [(1, {"text": "a"}), (4, {"text": "b\u2028c"})]

    def test_a_syntax_error_is_placed_by_line_and_column(self, tmp_path):
        [problem] = problems(tmp_path, "a.jsonl", '{"text": "a"}\n{"text" "b"}\n{"text": "c"}\n')
        assert (problem.line, problem.field) == (2, "column 9")
        assert problem.message == "invalid JSON: expecting ':' delimiter"

    @pytest.mark.parametrize(
        ("line", "field", "words"),
        [
            ('{"text": NaN}', "(row)", "NaN"),
            ('{"text": -Infinity}', "(row)", "-Infinity"),
            ('{"text": "a", "text": "b"}', "text", "twice"),
            ('{"m": [{"role": "user", "role": "user"}]}', "role", "twice"),
            ('["a"]', "(row)", "a row is an object, not a list"),
            ('"a"', "(row)", "not a text"),
            ("null", "(row)", "not null"),
            ('{"text": "\\ud83d"}', "(row)", "surrogate"),
            ('{"text": "a"} {"text": "b"}', "column 15", "more text"),
            ("{" * 5000, "column 2", "invalid JSON"),
            ("[" * 200_000, "(row)", "nested too deeply"),
            ('{"text": 1' + "0" * 5000 + "}", "(row)", "invalid JSON"),
        ],
    )
    def test_what_json_forbids_is_one_problem_of_its_row(self, tmp_path, line, field, words):
        [problem] = problems(tmp_path, "a.jsonl", f'{{"text": "fine"}}\n{line}\n')
        assert (problem.line, problem.field) == (2, field)
        assert words in problem.message

    def test_an_emoji_written_as_two_escapes_is_fine(self, tmp_path):
        assert rows(tmp_path, "a.jsonl", '{"text": "\\ud83d\\ude00"}') == [(1, {"text": "😀"})]

    def test_bytes_that_are_not_utf8_spoil_their_row_only(self, tmp_path):
        found = items(tmp_path, "a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n{"text": "b"}\n')
        assert [type(item) for item in found] == [RawRow, list, RawRow]
        assert isinstance(found[1], list)
        assert "a.jsonl:2:(row): a character is not valid UTF-8" in str(found[1][0])

    def test_single_quotes_get_their_own_fix(self, tmp_path):
        [problem] = problems(tmp_path, "a.jsonl", "{'text': 'a'}\n")
        assert "double quotes" in problem.fix

    @pytest.mark.parametrize("content", ['[\n{"text": "a"},\n{\n"text": "b"}]', '{\n"text": "a"}\n\n{"text":\n"b"}'])
    def test_a_pretty_printed_file_is_read_and_said_to_be_one(self, tmp_path, content):
        source = open_source(put(tmp_path, "a.jsonl", content))
        assert [row.value for row in only_rows(source.items)] == [{"text": "a"}, {"text": "b"}]
        assert "over many lines" in source.notes[0]

    def test_a_list_on_one_line_is_rows(self, tmp_path):
        source = open_source(put(tmp_path, "a.jsonl", '[{"text": "a"}, {"text": "b"}]\n{"text": "c"}\n'))
        assert [(row.line, row.value) for row in only_rows(source.items)] == [
            (1, {"text": "a"}),
            (1, {"text": "b"}),
            (2, {"text": "c"}),
        ]
        assert "lines with a list of rows, each read as rows: 1" in source.notes[0]

    def test_a_mark_in_the_middle_is_left_out(self, tmp_path):
        source = open_source(put(tmp_path, "a.jsonl", '\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n'))
        assert [row.value for row in only_rows(source.items)] == [{"text": "a"}, {"text": "b"}]
        assert "byte order marks inside the file, left out: 1" in source.notes[0]

    def test_utf16_is_named(self, tmp_path):
        with pytest.raises(DataError, match="UTF-16"):
            items(tmp_path, "a.jsonl", '{"text": "a"}'.encode("utf-16"))


class TestJsonList:
    def test_each_object_has_its_line(self, tmp_path):
        content = '[\n  {"text": "a"},\n  {"text":\n    "b"}, {"text": "c"}\n]\n'
        assert rows(tmp_path, "a.json", content) == [(2, {"text": "a"}), (3, {"text": "b"}), (4, {"text": "c"})]

    @pytest.mark.parametrize("empty", ["", " \n", "[]", "[ ]\n"])
    def test_empty(self, tmp_path, empty):
        assert rows(tmp_path, "a.json", empty) == []

    @pytest.mark.parametrize(
        ("content", "place"),
        [
            ('[\n{"a": 1}\n{"a": 2}]', ":3:column 1: invalid JSON: expecting ',' or ']'"),
            ('[\n{"a": 1},\n{"a" 2}]', ":3:column 6: invalid JSON: expecting ':'"),
            ('[{"a": 1},]', ":1:column 10: invalid JSON: a comma before the end"),
            ('[{"a": 1}', ":1:column 10"),
            ('[{"a": 1}] x', ":1:column 12: invalid JSON: more text"),
            ('"a"', ":1:column 1: invalid JSON: expecting '['"),
            ('{"data": [\n{"a": 1}', ":2:column 9"),
            ('{"text": ["a", "b"], "label": ["x", "y"]}', "holds the table by columns (text, label)"),
            ('{"text": {"0": "a"}, "label": {"0": "x"}}', "holds the table by columns"),
        ],
    )
    def test_a_broken_list_ends_the_reading_with_the_place(self, tmp_path, content, place):
        with pytest.raises(DataError) as error:
            items(tmp_path, "a.json", content)
        assert place in error.value.message

    @pytest.mark.parametrize("key", ["data", "rows"])
    def test_a_list_inside_an_object(self, tmp_path, key):
        source = open_source(
            put(tmp_path, "a.json", f'{{"version": 2,\n"{key}": [{{"text": "a"}},\n{{"text": "b"}}]}}')
        )
        assert [(row.line, row.value) for row in only_rows(source.items)] == [(2, {"text": "a"}), (3, {"text": "b"})]
        assert f"the rows are those under {key}" in source.notes[0]

    def test_objects_one_after_another(self, tmp_path):
        found = only_rows(items(tmp_path, "a.json", '{\n"text": "a"\n}\n{\n"text": "b"\n}\n'))
        assert [(row.line, row.value["text"]) for row in found if isinstance(row.value, dict)] == [(1, "a"), (4, "b")]

    def test_a_row_that_is_no_object_is_a_problem(self, tmp_path):
        assert [(p.line, p.field) for p in problems(tmp_path, "a.json", '[{"a": 1},\n3]')] == [(2, "(row)")]

    def test_json_lines_under_this_name_are_read_and_noted(self, tmp_path):
        source = open_source(put(tmp_path, "a.json", '{"text": "a"}\n{"text": "b"}\n'))
        assert [row.line for row in only_rows(source.items)] == [1, 2]
        assert "JSON lines" in source.notes[0]


class TestTables:
    def test_a_record_has_the_line_it_starts_on(self, tmp_path):
        content = '\ufefftext,label\r\n"two\r\nlines",x\r\n\r\n"a ""word""",y\r\n'
        assert rows(tmp_path, "a.csv", content) == [
            (2, {"text": "two\r\nlines", "label": "x"}),
            (5, {"text": 'a "word"', "label": "y"}),
        ]

    def test_what_the_csv_module_writes_is_read_back(self, tmp_path):
        texts = ['a "b" c', "x,y", "line\nline", " spaced ", "", "x" * 200_000]
        with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
        found = only_rows(open_source(str(tmp_path / "a.csv")).items)
        assert [row.value for row in found] == [{"id": str(i), "text": text} for i, text in enumerate(texts)]

    def test_tabs(self, tmp_path):
        assert rows(tmp_path, "a.tsv", "text\tlabel\na, b\t1\n") == [(2, {"text": "a, b", "label": "1"})]

    def test_semicolons_are_seen_and_noted(self, tmp_path):
        source = open_source(put(tmp_path, "a.csv", "text;label\na, b;1\n"))
        assert [row.value for row in only_rows(source.items)] == [{"text": "a, b", "label": "1"}]
        assert "semicolons" in source.notes[0]

    def test_a_header_with_commas_stays_with_commas(self, tmp_path):
        assert rows(tmp_path, "a.csv", "text,x;y\na,b\n") == [(2, {"text": "a", "x;y": "b"})]

    def test_missing_and_extra_fields_are_problems_of_their_row(self, tmp_path):
        short, long = problems(tmp_path, "a.csv", "text,label\na\nb,1\nc,d,1\n")
        assert (short.line, short.message) == (2, "1 field, but the header names 2")
        assert (long.line, long.message) == (4, "3 fields, but the header names 2")
        assert "label" in short.fix
        assert "quotes" in long.fix

    def test_a_stray_quote_is_a_problem_and_later_rows_are_read(self, tmp_path):
        found = items(tmp_path, "a.csv", 'text,label\n"a"b,1\nc,2\n')
        assert [type(item) for item in found] == [list, RawRow]
        assert isinstance(found[0], list)
        assert isinstance(found[1], RawRow)
        assert (found[0][0].line, found[1].line) == (2, 3)

    def test_a_quote_that_swallows_the_file_is_an_error_even_when_rows_may_be_skipped(self, tmp_path):
        with pytest.raises(DataError, match=r"a\.csv:3:.*never closed"):
            items(tmp_path, "a.csv", 'text,label\na,1\n"b,2\nc,3\n')

    def test_a_repeated_header_name_is_an_error(self, tmp_path):
        with pytest.raises(DataError, match="text more than once"):
            items(tmp_path, "a.csv", "text,label,text\na,b,c\n")

    def test_an_unnamed_index_column_is_tolerated(self, tmp_path):
        assert rows(tmp_path, "a.csv", ",text\n0,a\n") == [(2, {"(column 1)": "0", "text": "a"})]

    @pytest.mark.parametrize("content", ["", "\n\n", "text,label\n"])
    def test_no_rows(self, tmp_path, content):
        assert rows(tmp_path, "a.csv", content) == []

    def test_bytes_that_are_not_utf8_spoil_their_row_only(self, tmp_path):
        found = items(tmp_path, "a.csv", b'text,label\n"x\n\xff",1\nb,2\n')
        assert isinstance(found[0], list)
        assert isinstance(found[1], RawRow)
        assert (found[0][0].line, found[1].line) == (2, 4)

    def test_a_header_that_is_not_utf8_does_not_make_the_next_row_the_header(self, tmp_path):
        with pytest.raises(DataError, match=r"a\.csv:1: .*UTF-8"):
            items(tmp_path, "a.csv", b"te\xff,label\na,1\n")


class TestPlainText:
    def test_a_short_text_is_one_row(self, tmp_path):
        assert rows(tmp_path, "a.md", "\n\n# Title\n\nA line.\n") == [(3, "# Title\n\nA line.")]

    def test_a_long_text_is_cut_between_paragraphs_and_nothing_is_lost(self, tmp_path):
        paragraphs = [f"{number} " + "word " * 100 for number in range(60)]
        source = open_source(put(tmp_path, "a.txt", "\r\n\r\n".join(paragraphs)))
        found = only_rows(source.items)
        assert 5 < len(found) < 10
        texts = [row.value for row in found if isinstance(row.value, str)]
        assert len(texts) == len(found)
        assert "\n\n".join(texts) == "\n\n".join(paragraphs)
        assert all(PASSAGE_CHARACTERS <= len(text) + 2 < PASSAGE_CHARACTERS + 600 for text in texts[:-1])
        lines = "\n\n".join(paragraphs).split("\n")
        assert [lines[row.line - 1] for row in found] == [text.split("\n")[0] for text in texts]
        assert f"{len(found)} passages" in source.notes[0]


class TestWhatIsNotThere:
    def test_a_missing_file_suggests_its_neighbours(self, tmp_path):
        put(tmp_path, "reviews.csv", "")
        with pytest.raises(ConfigError) as error:
            open_source(str(tmp_path / "review.csv"))
        assert error.value.exit_code == 2
        assert error.value.hint == "did you mean reviews.csv?"

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match="nowhere does not exist"):
            open_source(str(tmp_path / "nowhere" / "a.csv"))

    def test_an_unknown_extension_lists_what_is_read(self, tmp_path):
        with pytest.raises(ConfigError) as error:
            open_source(put(tmp_path, "a.xlsx", "x"))
        assert ".jsonl" in str(error.value)

    def test_paths_are_shown_from_the_current_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        source = open_source(put(tmp_path, "a.jsonl", "{}"))
        assert source.shown == "a.jsonl"
        assert list(source.hashes) == ["a.jsonl"]

    def test_a_plain_folder_lists_its_files(self, tmp_path):
        put(tmp_path, "a.jsonl", "{}")
        with pytest.raises(ConfigError) as error:
            open_source(str(tmp_path))
        assert "a.jsonl" in str(error.value)


class TestArrow:
    @pytest.fixture
    def datasets(self):
        return pytest.importorskip("datasets")

    def test_parquet_rows_are_numbered(self, tmp_path, datasets):
        datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0.0, 1.0]}).to_parquet(tmp_path / "a.parquet")
        found = list(open_source(str(tmp_path / "a.parquet")).items)
        assert found == [RawRow(1, {"text": "a", "label": 0.0}), RawRow(2, {"text": "b", "label": 1.0})]

    def test_a_file_that_is_no_parquet(self, tmp_path, datasets):
        with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
            items(tmp_path, "a.parquet", b"PAR1 not really")

    def test_a_saved_folder_and_its_splits(self, tmp_path, datasets):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
        )
        one = datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features)
        datasets.DatasetDict(train=one, test=one).save_to_disk(tmp_path / "saved")
        source = open_source(str(tmp_path / "saved"), "test")
        assert list(source.items) == [RawRow(1, {"text": "a", "label": 1})]
        assert any("0: no, 1: yes" in note for note in source.notes)
        assert any(name.endswith(".arrow") for name in source.hashes)
        assert [row.line for row in only_rows(open_source(str(tmp_path / "saved" / "train")).items)] == [1]
        with pytest.raises(ConfigError, match="it has train, test"):
            open_source(str(tmp_path / "saved"), "validation")

    def test_hub_names_take_the_split_and_never_remote_code(self, monkeypatch, datasets):
        asked = []

        def load(name, **settings):
            asked.append((name, settings))
            return datasets.Dataset.from_dict({"text": ["a"]})

        monkeypatch.setattr(datasets, "load_dataset", load)
        source = open_source("hub:owner/reviews:test")
        assert list(source.items) == [RawRow(1, {"text": "a"})]
        assert source.hashes["hub:owner/reviews:test"]
        open_source("hub:owner/reviews", "validation")
        assert asked == [
            ("owner/reviews", {"split": "test", "trust_remote_code": False}),
            ("owner/reviews", {"split": "validation", "trust_remote_code": False}),
        ]

    def test_an_unreachable_hub(self, monkeypatch, datasets):
        def load(name, **settings):
            raise ConnectionError("Couldn't reach the hub\nlong story")

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(ConfigError) as error:
            open_source("hub:owner/reviews")
        assert "Couldn't reach the hub" in error.value.message
        assert "long story" not in error.value.message
        assert "HF_HUB_OFFLINE" in str(error.value.hint)

    def test_a_name_that_is_none(self):
        with pytest.raises(ConfigError, match="not a data set's name"):
            open_source("hub:a/b/c")

    def test_without_the_library(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
        with pytest.raises(ConfigError) as error:
            items(tmp_path, "a.parquet", b"PAR1")
        assert error.value.hint == install_command("datasets")


def test_a_hundred_thousand_lines_take_seconds(tmp_path):
    import time

    line = json.dumps({"text": "some words of a review " * 5, "label": 1})
    path = put(tmp_path, "a.jsonl", (line + "\n") * 100_000)
    start = time.process_time()
    assert sum(1 for _ in open_source(path).items) == 100_000
    assert time.process_time() - start < 10


# --------------------------------------------------------------------------- files that cannot be read


def refused(path: Path | str) -> str:
    with pytest.raises((ConfigError, DataError)) as error:
        list(open_source(str(path)).items)
    return str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no FIFOs")
def test_what_is_not_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "not a file that can be read twice" in refused(tmp_path / "rows.jsonl")


def test_links_to_nothing_and_to_themselves_are_said(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to("gone.jsonl")
    assert "rows.jsonl is a link to gone.jsonl, which does not exist" in refused(tmp_path / "rows.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    assert "loop.jsonl cannot be read: " in refused(tmp_path / "loop.jsonl")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a\0b.jsonl", r"a\x00b.jsonl cannot be read"),
        ("a" * 300 + ".jsonl", "cannot be read: File name too long"),
        ("\x1b[31mrows.jsonl", r"no file \x1b[31mrows.jsonl"),
        ("https://example.org/rows.jsonl", "addresses are not read"),
    ],
)
def test_odd_names_are_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    text = refused(name)
    assert words in text
    assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("rows.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("rows.csv", b"PK\x03\x04rest", "a zip file, as .xlsx files of Excel are"),
        ("rows.csv", b"\xd0\xcf\x11\xe0rest", "an old Excel"),
        ("rows.jsonl", b"\x1f\x8brest", "add .gz"),
        ("rows.txt", b"%PDF-1.7", "a PDF file"),
        ("rows.jsonl", '{"text": "a"}'.encode("utf-32"), "the file is UTF-32"),
        ("rows.jsonl", '{"text": "a"}'.encode("utf-16"), "the file is UTF-16"),
    ],
)
def test_a_file_that_is_something_else_is_named_as_that(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in refused(tmp_path / name)


def test_a_number_beyond_what_json_readers_hold_is_a_problem_of_its_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"label": 1e999}\n{"label": 2}\n')
    first, second = open_source(str(tmp_path / "rows.jsonl")).items
    assert isinstance(first, list)
    assert "the number 1e999 is too large" in str(first[0])
    assert isinstance(second, RawRow)


# --------------------------------------------------------------------------- tables as people have them


def table(folder: Path, content: str | bytes) -> tuple[list[dict[str, object]], list[str]]:
    source = open_source(put(folder, "a.csv", content))
    rows = [dict(row.value) for row in only_rows(source.items) if isinstance(row.value, dict)]
    return rows, source.notes


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ('"text, long";label\nfine;good\n', "separated by semicolons"),
        ("text, long|label\nfine|good\n", "separated by bars"),
        ("text, long\tlabel\nfine\tgood\n", "separated by tabs"),
        ("sep=;\ntext, long;label\nfine;good\n", "the first line names the separator"),
        ('"text, long", "label"\n"fine", "good"\n', "blanks between a separator and a text in quotes"),
    ],
)
def test_what_separates_the_fields_is_found(tmp_path: Path, content: str, note: str) -> None:
    rows, notes = table(tmp_path, content)
    assert rows == [{"text, long": "fine", "label": "good"}]
    assert note in notes[0]


def test_separators_inside_texts_change_nothing(tmp_path: Path) -> None:
    assert table(tmp_path, "text,label\na; b; c,good\nd | e,bad\n")[0] == [
        {"text": "a; b; c", "label": "good"},
        {"text": "d | e", "label": "bad"},
    ]
    assert table(tmp_path, 'text\n"hello, there"\n')[0] == [{"text": "hello, there"}]
    assert table(tmp_path, "prompt,completion\na, yes\n")[0] == [{"prompt": "a", "completion": " yes"}]


def test_lines_are_counted_below_the_line_of_the_separator(tmp_path: Path) -> None:
    [problem] = problems(tmp_path, "a.csv", "sep=,\ntext,label\na,b,c\n")
    assert problem.line == 3


def test_a_quote_that_swallows_rows_is_noticed(tmp_path: Path) -> None:
    rows, notes = table(tmp_path, 'text,label\n"a,x\nb,y\nc",z\nd,x\n')
    assert len(rows) == 2
    assert "that of line 2 takes 3 lines" in notes[0]


def test_a_header_in_the_middle_is_a_problem(tmp_path: Path) -> None:
    found = items(tmp_path, "a.csv", "text,label\na,x\n\ufefftext,label\nb,y\n")
    assert isinstance(found[1], list)
    assert "a.csv:3:(row): this line repeats the header" in str(found[1][0])


def test_another_encoding(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", "text,label\ncaf\u00e9,good\n".encode("cp1252"))
    [row] = only_rows(open_source(path, encoding="cp1252").items)
    assert row.value == {"text": "caf\u00e9", "label": "good"}
    [problem] = list(open_source(path).items)
    assert "data.encoding (cp1252 is usual on Windows)" in str(problem)
    path = put(tmp_path, "b.csv", "text,label\ncaf\u00e9,good\n".encode("utf-16"))
    assert len(only_rows(open_source(path, encoding="utf-16").items)) == 1


# --------------------------------------------------------------------------- compressed, changed, mistaken


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl.gz", '{"text": "a"}\n'), ("a.csv.gz", "text\na\n"), ("a.json.gz", '[{"text": "a"}]')],
)
def test_compressed_files(tmp_path: Path, name: str, content: str) -> None:
    path = put(tmp_path, name, gzip.compress(content.encode()))
    source = open_source(path)
    assert [row.value for row in only_rows(source.items)] == [{"text": "a"}]
    assert source.hashes[source.shown] == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_compressed_file_that_breaks_off(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(10_000)))
    with pytest.raises(DataError, match="not a whole gzip file"):
        items(tmp_path, "a.jsonl.gz", whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a whole gzip file"):
        items(tmp_path, "b.jsonl.gz", b'{"text": "a"}\n')


def test_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", '{"text": "a"}\n' * 100)
    source = open_source(path)
    next(source.items)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"text": "b"}\n')
    with pytest.raises(DataError, match="changed while it was read"):
        list(source.items)


def test_rows_of_json_under_the_name_of_a_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="JSON lines, not plain text"):
        items(tmp_path, "a.txt", '{"text": "a"}\n{"text": "b"}\n')
    assert len(items(tmp_path, "b.txt", "{braces} are no JSON\n")) == 1


def test_the_nulls_that_arrow_invents_are_left_out(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"tools": [{"name": "a", "parameters": {"properties": {"city": {"type": "string"}}, "enum": ["x", None]}}]},
        {"tools": [{"name": "b", "parameters": {"properties": {"n": {"type": "integer"}}}}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.value for row in only_rows(open_source(str(tmp_path / "a.parquet")).items)] == rows


class TestOddFiles:
    """Files as programs leave them."""

    def notes(self, folder: Path, name: str, content: str | bytes) -> tuple[list[object], str]:
        source = open_source(put(folder, name, content))
        return [row.value for row in only_rows(source.items)], " ".join(source.notes)

    @pytest.mark.parametrize(
        ("name", "content", "note"),
        [
            ("a.csv", "a,b\n1,2,,\n", "blank fields beyond those of the header, left out: 1"),
            ("a.csv", "a,b\n1,2\n,\n , \n", "without any text, left out: 2"),
            ("a.tsv", "a,b\n1,2\n", "separated by commas"),
            ("a.jsonl", '{"a": "1", "b": "2"},\n', "end with a comma: 1"),
            ("a.jsonl", '[{"a": "1", "b": "2"},\n{"a": "1", "b": "2"}]', "JSON over many lines"),
            (
                "a.json",
                '{"train": [{"a": "1", "b": "2"}], "version": 1}',
                "under train; what stands beside it is not used: version",
            ),
        ],
    )
    def test_they_are_read_and_it_is_told(self, tmp_path, name, content, note):
        values, notes = self.notes(tmp_path, name, content)
        assert all(value == {"a": "1", "b": "2"} for value in values)
        assert values
        assert note in notes

    def test_words_for_what_is_missing_are_counted(self, tmp_path):
        values, notes = self.notes(tmp_path, "a.csv", "a,b\nx,None\ny,NaN\nz,None\n")
        assert values[0] == {"a": "x", "b": "None"}
        assert "None (2), NaN (1)" in notes

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.jsonl", '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]\n'),
            ("a.json", '[[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]'),
        ],
    )
    def test_a_list_of_messages_is_a_conversation(self, tmp_path, name, content):
        values, _ = self.notes(tmp_path, name, content)
        assert values == [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("a.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}', "lists under train, test"),
            ("a.txt", '[{"text": "a"}, {"text": "b"}]', "holds JSON, not plain text"),
            ("a.txt", '{\n "text": "a"\n}\n', "holds JSON, not plain text"),
            ("a.jsonl", "<!DOCTYPE html><html></html>", "a web page"),
            ("a.csv", "text,label\na,b\n".encode("utf-16-le"), "UTF-16"),
        ],
    )
    def test_what_is_not_a_table_is_named(self, tmp_path, name, content, words):
        with pytest.raises(DataError, match=words):
            items(tmp_path, name, content)

    def test_one_conversation_in_a_json_file_is_a_row(self, tmp_path):
        messages = [{"role": "user", "content": "a"}]
        assert self.notes(tmp_path, "a.json", json.dumps({"messages": messages}))[0] == [{"messages": messages}]

    def test_encodings_that_are_not_of_text(self, tmp_path):
        with pytest.raises(ConfigError, match="base64 is not an encoding of text"):
            list(open_source(put(tmp_path, "a.csv", "a,b\n1,2\n"), encoding="base64").items)

    def test_two_parquet_columns_of_one_name(self, tmp_path):
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(DataError, match="the column text more than once"):
            list(open_source(str(tmp_path / "a.parquet")).items)

    def test_a_line_break_inside_a_text_has_its_fix(self, tmp_path):
        found = problems(tmp_path, "a.jsonl", '{"a": "x\ny"}\n')
        assert found[0].fix == r"write a line break or tab inside a text as \n or \t"


@pytest.mark.parametrize(
    ("content", "name"),
    [("text,label\na film,good\n", ".csv"), ("prompt;answer\na;b\n", ".csv"), ("Text\tLabel\na\tb\n", ".tsv")],
)
def test_a_table_under_the_name_of_a_text(tmp_path: Path, content: str, name: str) -> None:
    with pytest.raises(DataError, match="holds a table") as error:
        items(tmp_path, "a.txt", content)
    assert f"name it {name}" in str(error.value)
    assert len(items(tmp_path, "b.txt", "text, label and answer\nare words of a sentence\n")) == 1
