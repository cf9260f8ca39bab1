"""Chat completions, through the official client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.serve.contract.conftest import ALIAS, async_client
from tests.serve.running import Running

HELLO: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello there friend"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


class Person(BaseModel):
    name: str
    age: int


def test_an_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=ALIAS, messages=HELLO, max_completion_tokens=3, temperature=0)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", ALIAS)
    assert answer.system_fingerprint
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content is not None
    assert choice.message.tool_calls is None
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens > 0
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens is not None
    again = client.chat.completions.create(model=ALIAS, messages=HELLO, max_completion_tokens=3, temperature=0)
    assert again.choices[0].message.content == choice.message.content
    assert again.system_fingerprint == answer.system_fingerprint


def test_several_choices_and_a_limit(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=ALIAS,
        messages=HELLO,
        n=3,
        max_tokens=2,
        seed=5,
        temperature=1.2,
        top_p=0.9,
        stop=["\n\n", "##"],
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"3": -100},
        user="me",
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in answer.choices} <= {"stop", "length"}


def test_streaming(client: openai.OpenAI) -> None:
    asked: Any = {"model": ALIAS, "messages": HELLO, "max_completion_tokens": 5, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_streaming_without_usage(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=ALIAS, messages=HELLO, max_tokens=2, n=2, stream=True))
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}


def test_log_probabilities(client: openai.OpenAI) -> None:
    asked: Any = {"model": ALIAS, "messages": HELLO, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    answer = client.chat.completions.create(**asked, temperature=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for token in logprobs.content:
        assert token.logprob <= 0
        assert token.bytes is not None
        assert len(token.top_logprobs) == 2
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(**asked, temperature=0, stream=True):
        for choice in chunk.choices:
            streamed += (choice.logprobs.content or []) if choice.logprobs else []
    assert [token.token for token in streamed] == [token.token for token in logprobs.content]


def test_a_tool_call_and_its_answer(client: openai.OpenAI) -> None:
    asked: Any = {"model": ALIAS, "tools": [WEATHER], "max_tokens": 200, "temperature": 0}
    answer = client.chat.completions.create(**asked, messages=HELLO, tool_choice="required")
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    story: Any = [*HELLO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    after = client.chat.completions.create(**asked, messages=story, tool_choice="none")
    assert after.choices[0].message.tool_calls is None


def test_a_streamed_tool_call(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(
        model=ALIAS,
        messages=HELLO,
        tools=[WEATHER],
        max_tokens=200,
        temperature=0,
        stream=True,
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    names, arguments, reasons, ids = "", "", [], set()
    for chunk in chunks:
        choice = chunk.choices[0]
        for call in choice.delta.tool_calls or ():
            assert call.index == 0
            ids |= {call.id} if call.id else set()
            names += (call.function and call.function.name) or ""
            arguments += (call.function and call.function.arguments) or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert names == "weather"
    assert json.loads(arguments)["city"] in ("Oslo", "Rome")
    assert reasons == ["tool_calls"]
    assert len(ids) == 1


def test_json_of_a_schema(client: openai.OpenAI) -> None:
    schema: dict[str, object] = {**Person.model_json_schema(), "additionalProperties": False}
    answer = client.chat.completions.create(
        model=ALIAS,
        messages=HELLO,
        max_tokens=300,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
        stop=None,
        seed=0,
    )
    if answer.choices[0].finish_reason == "stop":
        Person.model_validate_json(answer.choices[0].message.content or "")


class Mood(BaseModel):
    good: bool


@pytest.fixture
def kind(server: Running) -> type[BaseModel]:
    """What is asked for: of a model that says anything, something short."""
    return Person if type(server.parts[3]).__name__ == "EchoBackend" else Mood


def test_parse_gives_an_object(client: openai.OpenAI, kind: Any) -> None:
    answer = client.chat.completions.parse(model=ALIAS, messages=HELLO, response_format=kind, temperature=0)
    assert isinstance(answer.choices[0].message.parsed, kind)


def test_the_client_s_own_streaming_helper(client: openai.OpenAI, kind: Any) -> None:
    asked: Any = {"model": ALIAS, "messages": HELLO, "temperature": 0, "response_format": kind}
    with client.chat.completions.stream(**asked) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        (choice,) = stream.get_final_completion().choices
    assert isinstance(choice.message.parsed, kind)
    assert "".join(deltas) == choice.message.content


def test_the_tuned_model_and_its_checkpoint_answer(client: openai.OpenAI, trained: Any) -> None:
    checkpoint = client.fine_tuning.jobs.checkpoints.list(trained.id).data[0].fine_tuned_model_checkpoint
    for name in (trained.fine_tuned_model, checkpoint):
        answer = client.chat.completions.create(model=name, messages=HELLO, max_tokens=2)
        assert answer.model == name


def test_parts_and_what_the_client_adds_to_messages(client: openai.OpenAI) -> None:
    parts: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": [{"type": "text", "text": "hello"}], "name": "Ada"},
        {"role": "assistant", "content": None, "refusal": "I would rather not.", "annotations": [], "audio": None},
        {"role": "user", "content": "why?"},
    ]
    assert client.chat.completions.create(model=ALIAS, messages=parts, max_tokens=2).choices


def test_raw_answers_have_openai_s_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=ALIAS, messages=HELLO, max_tokens=2)
    assert raw.headers["x-request-id"].startswith("req_")
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.headers["openai-organization"] == "local"
    assert raw.parse().choices
    assert raw.request_id == raw.headers["x-request-id"]


def test_asynchronous(server: Running) -> None:
    async def life() -> None:
        async with async_client(server) as client:
            asked: Any = {"model": ALIAS, "messages": HELLO, "max_tokens": 3, "temperature": 0}
            whole = await client.chat.completions.create(**asked)
            stream = await client.chat.completions.create(**asked, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == whole.choices[0].message.content
            together = await asyncio.gather(*(client.chat.completions.create(**asked) for _ in range(8)))
            assert {answer.choices[0].message.content for answer in together} == {text}

    asyncio.run(life())


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, "messages[0].tool_call_id", None),
        ({"temperature": 3}, "temperature", "decimal_above_max_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"top_logprobs": 3}, "top_logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"stop": ["a"] * 5}, "stop", "array_above_max_length"),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", None),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", None),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", None),
        ({"modalities": ["text", "audio"]}, "modalities", None),
        ({"audio": {"voice": "ash", "format": "mp3"}}, "audio", "unsupported_parameter"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction", "unsupported_parameter"),
        ({"extra_body": {"temprature": 1}}, "temprature", "unknown_parameter"),
        ({"extra_body": {"top_k": 5}}, "top_k", "unknown_parameter"),
    ],
)
def test_requests_that_cannot_be(client: openai.OpenAI, changes: dict[str, Any], param: str, code: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": ALIAS, "messages": HELLO, **changes})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert param.split("[")[0].split(".")[0] in caught.value.message
    if code:
        assert caught.value.code == code


def test_did_you_mean(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Did you mean 'temperature'"):
        client.chat.completions.create(model=ALIAS, messages=HELLO, extra_body={"temprature": 1})
    with pytest.raises(openai.BadRequestError, match="Did you mean 'include_usage'"):
        client.chat.completions.create(
            model=ALIAS, messages=HELLO, stream=True, extra_body={"stream_options": {"include_usge": True}}
        )


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.code == "model_not_found"
