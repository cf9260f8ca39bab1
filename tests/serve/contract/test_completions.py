"""Plain completions, through the official client.

Until a choice ends, its chunks have `finish_reason` null, as OpenAI sends them. The client has one type for whole
answers and for chunks, and it does not allow for that: a client with strict validation cannot read such a stream.
"""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.serve.contract.conftest import ALIAS, async_client
from tests.serve.running import Running


def test_an_answer(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=ALIAS, prompt="the film is", max_tokens=2, temperature=0)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", ALIAS)
    (choice,) = answer.choices
    assert choice.logprobs is None
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 0


def test_several_prompts_several_times(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=ALIAS, prompt=["a film", "the best of films"], n=2, max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


@pytest.mark.parametrize("prompt", [[4, 5, 6], [[4, 5, 6], [7, 8]]])
def test_token_ids(client: openai.OpenAI, prompt: Any) -> None:
    answer = client.completions.create(model=ALIAS, prompt=prompt, max_tokens=1)
    assert len(answer.choices) == (2 if isinstance(prompt[0], list) else 1)


def test_streaming_is_the_same_text(client: openai.OpenAI, lenient: openai.OpenAI) -> None:
    asked: Any = {"model": ALIAS, "prompt": ["a fine film", "a dull one"], "max_tokens": 3, "temperature": 0}
    whole = client.completions.create(**asked)
    texts = ["", ""]
    reasons: list[str | None] = [None, None]
    chunks = list(lenient.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_log_probabilities(client: openai.OpenAI, lenient: openai.OpenAI) -> None:
    asked: Any = {"model": ALIAS, "prompt": "a fine film", "max_tokens": 3, "temperature": 0, "logprobs": 2}
    (choice,) = client.completions.create(**asked).choices
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens
    assert logprobs.token_logprobs
    assert logprobs.top_logprobs
    assert logprobs.text_offset is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == value
    streamed: list[str] = []
    offsets: list[int] = []
    for chunk in lenient.completions.create(**asked, stream=True):
        found = chunk.choices[0].logprobs
        streamed += (found.tokens or []) if found else []
        offsets += (found.text_offset or []) if found else []
    assert (streamed, offsets) == (logprobs.tokens, logprobs.text_offset)


def test_echo_scores_the_prompt(lenient: openai.OpenAI) -> None:
    """The first token of a text is predicted by nothing: its log probability is null, as at OpenAI, which the client's
    own type does not allow for; so this client is not strict."""
    answer = lenient.completions.create(
        model=ALIAS, prompt="the film is good", echo=True, max_tokens=0, logprobs=0, temperature=0
    )
    (choice,) = answer.choices
    assert choice.text == "the film is good"
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == choice.text


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"extra_body": {"min_p": 0.1}}, "min_p"),
    ],
)
def test_requests_that_cannot_be(client: openai.OpenAI, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError, match=param) as caught:
        client.completions.create(**{"model": ALIAS, "prompt": "a", **changes})
    assert caught.value.param == param


def test_asynchronous(server: Running) -> None:
    async def life() -> None:
        async with async_client(server) as client:
            asked: Any = {"model": ALIAS, "prompt": "a fine film", "max_tokens": 3, "temperature": 0}
            whole = await client.completions.create(**asked)
            assert whole.choices[0].finish_reason in ("stop", "length")
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            stream = await client.completions.create(**asked, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text

    asyncio.run(life())
