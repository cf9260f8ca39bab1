"""Models, through the official client."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.serve.contract.conftest import ALIAS, async_client
from tests.serve.running import Running


def test_bases_aliases_and_tuned_models_are_listed(client: openai.OpenAI, trained: Any) -> None:
    models = {model.id: model for model in client.models.list()}
    assert ALIAS in models
    assert models[trained.fine_tuned_model].object == "model"
    assert not any(":ckpt-step-" in name for name in models)
    for name in models:
        assert client.models.retrieve(name).id == name  # names may hold slashes and colons


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9") as caught:
        client.models.retrieve("gpt-9")
    assert caught.value.code == "model_not_found"


def test_deleting(client: openai.OpenAI, older: Any) -> None:
    name = older.fine_tuned_model
    gone = client.models.delete(name)
    assert (gone.id, gone.deleted) == (name, True)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(name)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hello"}])
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete(ALIAS)


def test_asynchronous(server: Running) -> None:
    async def life() -> None:
        async with async_client(server) as client:
            assert ALIAS in [model.id async for model in client.models.list()]
            assert (await client.models.retrieve(ALIAS)).owned_by
            with pytest.raises(openai.PermissionDeniedError):
                await client.models.delete(ALIAS)

    asyncio.run(life())
