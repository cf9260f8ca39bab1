"""Files, through the official client."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import openai
import pytest

from tests.serve.contract.conftest import async_client, chat_rows
from tests.serve.running import Running


def test_upload_from_path_bytes_tuple_and_handle(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(chat_rows())
    with open(path, "rb") as handle:
        forms = [path, ("named.jsonl", chat_rows()), ("typed.jsonl", io.BytesIO(chat_rows()), "text/plain"), handle]
        files = [client.files.create(file=form, purpose="fine-tune") for form in forms]
    assert [file.filename for file in files] == ["rows.jsonl", "named.jsonl", "typed.jsonl", "rows.jsonl"]
    for file in files:
        assert file.bytes == len(chat_rows())
        assert (file.object, file.purpose, file.status, file.expires_at) == ("file", "fine-tune", "processed", None)
        assert client.files.content(file.id).read() == chat_rows()
        assert client.files.retrieve(file.id) == file


def test_bytes_alone_get_a_name(client: openai.OpenAI) -> None:
    file = client.files.create(file=chat_rows(), purpose="fine-tune")
    assert file.filename
    assert client.files.content(file.id).content == chat_rows()


def test_a_name_is_kept_as_a_name(client: openai.OpenAI) -> None:
    names = ["../../etc/passwd", "C:\\data\\rows.jsonl", "Zeilen für heute.jsonl", 'a"b.jsonl']
    files = [client.files.create(file=(name, chat_rows()), purpose="fine-tune") for name in names]
    assert [file.filename for file in files[:3]] == ["passwd", "rows.jsonl", "Zeilen für heute.jsonl"]
    answer = client.files.with_raw_response.content(files[2].id)
    assert "Zeilen" in answer.headers["content-disposition"]
    assert client.files.content(files[3].id).content == chat_rows()


def test_expiry(client: openai.OpenAI) -> None:
    file = client.files.create(
        file=("a.jsonl", chat_rows()), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 7200}
    )
    assert file.expires_at == file.created_at + 7200


def test_listing_pages_by_itself(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{n}.jsonl", chat_rows()), purpose="fine-tune").id for n in range(5)]
    newest = []
    for file in client.files.list(limit=2):  # asks for page after page
        newest.append(file.id)
        if len(newest) == 5:
            break
    assert newest == made[::-1]
    oldest = [file.id for file in client.files.list(order="asc", limit=2, after=made[1])]
    assert oldest[:3] == made[2:]
    page = client.files.list(limit=2, purpose="fine-tune")
    assert page.has_more is True
    assert len(page.data) == 2
    assert all(file.purpose == "fine-tune" for file in client.files.list(purpose="fine-tune"))


def test_deleting(client: openai.OpenAI) -> None:
    file = client.files.create(file=("gone.jsonl", chat_rows()), purpose="fine-tune")
    gone = client.files.delete(file.id)
    assert (gone.id, gone.object, gone.deleted) == (file.id, "file", True)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)


def test_what_an_upload_needs(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose") as caught:
        client.files.create(file=("a.jsonl", chat_rows()), purpose="batch")
    assert caught.value.param == "purpose"
    with pytest.raises(openai.BadRequestError, match="seconds") as caught:
        client.files.create(
            file=("a.jsonl", chat_rows()),
            purpose="fine-tune",
            expires_after={"anchor": "created_at", "seconds": "soon"},  # type: ignore[typeddict-item]
        )
    assert caught.value.param == "expires_after.seconds"


def test_asynchronous(server: Running) -> None:
    async def life() -> None:
        async with async_client(server) as client:
            file = await client.files.create(file=("a.jsonl", chat_rows()), purpose="fine-tune")
            assert await client.files.retrieve(file.id) == file
            assert (await client.files.content(file.id)).content == chat_rows()
            assert file.id in [entry.id async for entry in client.files.list(limit=3)]
            assert (await client.files.delete(file.id)).deleted

    asyncio.run(life())
