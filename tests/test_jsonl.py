"""JSON lines that grow, tear and are replaced."""

from __future__ import annotations

import os
from pathlib import Path

from tunery.jsonl import Tail, append_lines, read_lines


def test_a_tail_gives_whole_lines_once_and_a_new_file_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    assert tail.read() == [{"a": 1}]
    with open(path, "ab") as file:
        file.write(b'2}\nno json\n[3]\n{"a": 4}\n')
    assert tail.read() == [{"a": 22}, {"a": 4}]
    assert not tail.replaced
    (tmp_path / "new").write_bytes(b'{"a": 5}\n{"a": 6}\n' * 9)
    os.replace(tmp_path / "new", path)
    assert len(tail.read()) == 18
    assert tail.replaced
    assert tail.read() == []
    assert not tail.replaced


def test_a_line_after_a_torn_one_is_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": ')
    append_lines(path, [{"c": 3}])
    append_lines(path, [{"d": "ä"}])
    assert Tail(path).read() == [{"a": 1}, {"c": 3}, {"d": "ä"}]


def test_a_line_that_was_cut_within_a_character_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + "ä".encode()[:1])
    append_lines(path, [{"c": 3}])
    assert read_lines(path) == [{"a": 1}, {"c": 3}]
    assert read_lines(tmp_path / "none.jsonl") == []
