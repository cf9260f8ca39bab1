"""Files: what arrives is kept whole under an id, and nothing else is."""

from __future__ import annotations

import asyncio
import builtins
import hashlib
import io
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tunery.serve.api_errors import ApiError
from tunery.serve.files import Files
from tunery.serve.store import Store

ROWS = b'{"messages": []}\n' * 1000


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def files(tmp_path: Path, clock: Clock) -> Files:
    return Files(tmp_path / "files", Store(tmp_path / "server.sqlite3"), max_bytes=100_000, clock=clock)


def on_disk(files: Files) -> set[str]:
    return {entry.name for entry in files.folder.iterdir()}


def refusal(error: pytest.ExceptionInfo[ApiError]) -> tuple[int, str | None]:
    return error.value.status, error.value.param


def test_an_upload_comes_back_byte_for_byte(files: Files) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(ROWS), 999):
            yield ROWS[start : start + 999]

    given: list[Any] = [io.BytesIO(ROWS), [ROWS[:5], b"", ROWS[5:]]]
    kept = [files.upload(stream, "rows.jsonl", "fine-tune") for stream in given]
    kept.append(asyncio.run(files.receive(pieces(), "rows.jsonl", "fine-tune")))
    for file in kept:
        assert files.content(file.id).read_bytes() == ROWS
        assert files.sha256(file.id) == hashlib.sha256(ROWS).hexdigest()
        assert files.get(file.id) == file
        assert (file.bytes, file.created_at, file.filename) == (len(ROWS), 1_000_000, "rows.jsonl")
        assert (file.purpose, file.status, file.expires_at) == ("fine-tune", "processed", None)
    assert on_disk(files) == {file.id for file in kept}


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\0b", "x" * 9000, ".incoming-1", ""])
def test_the_clients_name_is_a_fact_and_never_a_path(files: Files, name: str, tmp_path: Path) -> None:
    before = {path for path in tmp_path.rglob("*") if not path.name.startswith("server.sqlite3")}
    file = files.upload([b"x"], name, "fine-tune")
    after = {path for path in tmp_path.rglob("*") if not path.name.startswith("server.sqlite3")}
    assert after - before == {files.folder / file.id}
    assert file.filename == (name[:255] or "file")


def test_too_many_bytes_are_refused_and_not_kept(files: Files) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 30_000

    with pytest.raises(ApiError, match="larger than 100,000 bytes") as error:
        files.upload(endless(), "big", "fine-tune")
    assert refusal(error) == (413, "file")
    assert on_disk(files) == set()
    assert files.list().data == []


def test_a_broken_upload_leaves_nothing(files: Files) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        files.upload(broken(), "half", "fine-tune")
    with pytest.raises(ApiError, match="empty") as error:
        files.upload([], "empty", "fine-tune")
    assert refusal(error) == (400, "file")
    assert on_disk(files) == set()


@pytest.mark.parametrize("purpose", ["batch", "assistants", "user_data", "evals", "vision", "fine-tune-results", ""])
def test_other_purposes_are_refused_and_the_right_one_is_named(files: Files, purpose: str) -> None:
    with pytest.raises(ApiError, match="purpose 'fine-tune'") as error:
        files.upload([b"x"], "a", purpose)
    assert refusal(error) == (400, "purpose")


def test_a_file_lives_as_long_as_it_was_said_to(files: Files, clock: Clock) -> None:
    for seconds in (3599, 2_592_001, 0, -1):
        with pytest.raises(ApiError, match="3600 to 2592000") as error:
            files.upload([b"x"], "a", "fine-tune", seconds)
        assert refusal(error) == (400, "expires_after.seconds")
    short, long = (files.upload([b"x"], "a", "fine-tune", seconds) for seconds in (3600, 2_592_000))
    forever = files.upload([b"x"], "a", "fine-tune")
    assert short.expires_at == 1_003_600
    clock.now += 3599
    assert files.get(short.id) == short
    clock.now += 1
    with pytest.raises(ApiError) as gone:
        files.get(short.id)
    assert gone.value.status == 404
    assert [file.id for file in files.list().data] == [forever.id, long.id]
    assert on_disk(files) == {forever.id, long.id}


def test_lists_are_by_purpose_and_go_on_where_deleting_left_off(files: Files) -> None:
    kept = [files.upload([b"x"], f"{number}", "fine-tune") for number in range(5)]
    files.add_result("file-result", "step_metrics.csv", b"step\n")
    assert [file.id for file in files.list("fine-tune-results").data] == ["file-result"]
    page = files.list("fine-tune", limit=2)
    assert page.has_more
    for file in page.data:  # as scripts do that clean up while they list
        files.delete(file.id)
    rest = files.list("fine-tune", limit=9, after=page.last_id)
    assert [file.id for file in rest.data] == [file.id for file in kept[2::-1]]
    assert not rest.has_more
    assert [file.id for file in files.list("fine-tune", order="asc").data] == [file.id for file in kept[:3]]
    with pytest.raises(ApiError) as error:
        files.list(after="file-nonsense")
    assert refusal(error) == (400, "after")


def test_a_deleted_file_is_gone_but_a_link_to_it_stays(files: Files, tmp_path: Path) -> None:
    file = files.upload([ROWS], "rows", "fine-tune")
    files.link(file.id, tmp_path / "mine.jsonl")
    files.delete(file.id)
    for gone in (files.get, files.content, files.delete, files.sha256):
        with pytest.raises(ApiError) as error:
            gone(file.id)
        assert error.value.status == 404
    with pytest.raises(ApiError):
        files.link(file.id, tmp_path / "other.jsonl")
    assert on_disk(files) == set()
    assert (tmp_path / "mine.jsonl").read_bytes() == ROWS


def test_where_there_are_no_hard_links_a_copy_is_made(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    file = files.upload([ROWS], "rows", "fine-tune")
    files.link(file.id, tmp_path / "mine.jsonl")
    files.delete(file.id)
    assert (tmp_path / "mine.jsonl").read_bytes() == ROWS


@pytest.mark.parametrize("name", ["../server.sqlite3", "..", "", "file-1/../x", "/etc/passwd"])
def test_only_ids_that_were_given_out_are_found(files: Files, name: str) -> None:
    with pytest.raises(ApiError) as error:
        files.content(name)
    assert error.value.status == 404


def test_what_a_crash_left_is_removed(files: Files) -> None:
    file = files.upload([b"x"], "a", "fine-tune")
    (files.folder / ".incoming-abc").write_bytes(b"half")
    (files.folder / "file-never-noted").write_bytes(b"whole, but nobody was told")
    files.recover()
    assert on_disk(files) == {file.id}


def test_a_full_disk_is_said_and_nothing_is_kept(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.open

    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(28, "No space left on device")

    def opening(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if mode == "xb":
            real(path, mode).close()
            return Full()
        return real(path, mode, *rest, **more)

    monkeypatch.setattr(builtins, "open", opening)
    with pytest.raises(ApiError, match="disk of the server is full") as error:
        files.upload([ROWS], "rows", "fine-tune")
    assert (error.value.status, error.value.type) == (507, "server_error")
    assert on_disk(files) == set()
    assert files.list().data == []


def test_a_result_is_kept_once(files: Files) -> None:
    first = files.add_result("file-r", "step_metrics.csv", b"step\n1\n")
    assert files.add_result("file-r", "step_metrics.csv", b"step\n1\n") == first
    assert (first.purpose, first.bytes) == ("fine-tune-results", 7)
    assert files.content("file-r").read_bytes() == b"step\n1\n"
    assert len(files.list().data) == 1
