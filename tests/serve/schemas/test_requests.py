"""Requests: nothing is silently ignored, defaults are OpenAI's, and errors name the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.fine_tuning import job_create_params

from tunery.serve.api_errors import ApiError
from tunery.serve.schemas import ChatRequest, CompletionRequest, CreateJob
from tunery.serve.schemas.base import Request, parse

HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
JOB: dict[str, Any] = {"model": "m", "training_file": "file-1"}


def chat(**more: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({**HELLO, **more}).encode())


def job(**more: Any) -> CreateJob:
    return parse(CreateJob, json.dumps({**JOB, **more}).encode())


@pytest.mark.parametrize(
    ("model", "params"),
    [
        (ChatRequest, chat_create_params.CompletionCreateParamsBase),
        (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
        (CreateJob, job_create_params.JobCreateParams),
    ],
)
def test_every_parameter_of_the_client_is_known(model: type[Request], params: Any) -> None:
    """A new version of the client may send more: each is to be supported, refused or known to make no difference."""
    known = {*model.known(), *model.unsupported}
    assert set(params.__annotations__) <= known
    assert not set(model.known()) & set(model.unsupported)


def test_defaults_are_openai_s() -> None:
    asked = chat()
    assert (asked.temperature, asked.top_p, asked.n, asked.stream) == (1.0, 1.0, 1, False)
    assert (asked.presence_penalty, asked.frequency_penalty, asked.logit_bias) == (0.0, 0.0, {})
    assert (asked.stop, asked.seed, asked.max_completion_tokens, asked.include_usage) == ([], None, None, False)
    assert (asked.logprobs, asked.top_logprobs, asked.response_format.type) == (False, 0, "text")
    assert asked.tool_mode == ("none", None)
    assert parse(CompletionRequest, b'{"model": "m", "prompt": "x"}').max_tokens == 16


def test_null_is_left_out() -> None:
    names = [name for name in [*ChatRequest.known(), *ChatRequest.unsupported] if name not in HELLO]
    assert chat(**dict.fromkeys(names)) == chat()


def test_ignored_parameters_take_anything() -> None:
    assert chat(**{key: {"any": ["thing"]} for key in ChatRequest.ignored}) == chat()


def test_stop_and_bias_in_one_form() -> None:
    assert chat(stop="end").stop == ["end"]
    assert chat(stop=["a", "b"]).stop == ["a", "b"]
    assert chat(logit_bias={"5": 3}).logit_bias == {5: 3.0}
    assert chat(max_tokens=7).max_completion_tokens == 7


def test_messages_are_those_of_training_data() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", "parsed_arguments": {}}}
    given = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "q", "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": [call], "annotations": [], "parsed": None, "audio": None},
        {"role": "tool", "tool_call_id": "c", "content": "r"},
        {"role": "assistant", "content": "", "weight": 0},
        {"role": "assistant", "refusal": "no"},
    ]
    bare = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert chat(messages=given).messages == [
        {"role": "developer", "content": "ab"},
        {"role": "user", "content": "q", "name": "Ada"},
        {"role": "assistant", "content": "", "tool_calls": [bare]},
        {"role": "tool", "content": "r", "tool_call_id": "c"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "no"},
    ]


def test_forms_that_clients_send() -> None:
    given = [
        {"role": "user", "content": [{"type": "input_text", "text": "q"}]},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "r"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "s"},
    ]
    found = chat(messages=given).messages
    assert [m["content"] for m in found] == ["q", "", "r", "no", "", "s"]
    assert [m["tool_calls"][0]["function"]["arguments"] for m in found if "tool_calls" in m] == ["{}", "{}"]
    assert found[5]["tool_call_id"] == found[4]["tool_calls"][0]["id"]


def test_tool_choice() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    named = {"type": "function", "function": {"name": "f"}}
    assert chat(tools=[tool]).tool_mode == ("auto", None)
    assert chat(tools=[tool], tool_choice="none").tool_mode == ("none", None)
    assert chat(tools=[tool], tool_choice=named).tool_mode == ("required", "f")
    assert chat(tool_choice="none").tool_mode == ("none", None)


def test_prompts_in_one_form() -> None:
    forms: list[tuple[Any, list[Any]]] = [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2]], [[1], [2]]),
        ("", [""]),
    ]
    for form, prompts in forms:
        assert parse(CompletionRequest, json.dumps({"model": "m", "prompt": form}).encode()).prompt == prompts


def test_hyperparameters_from_both_places() -> None:
    assert job().kind == "supervised"
    old = job(hyperparameters={"n_epochs": 3})
    assert (old.hyperparameters.n_epochs, old.hyperparameters.batch_size) == (3, "auto")
    both = job(
        hyperparameters={"n_epochs": 3},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8}}},
    )
    assert (both.hyperparameters.n_epochs, both.hyperparameters.batch_size) == (3, 8)
    bare = job(hyperparameters={"batch_size": 2}, method={"type": "dpo"})
    assert (bare.kind, bare.hyperparameters.batch_size, bare.hyperparameters.beta) == ("dpo", 2, "auto")
    pairs = job(method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "learning_rate_multiplier": 2}}})
    assert (pairs.hyperparameters.beta, pairs.hyperparameters.learning_rate_multiplier) == (0.3, 2.0)
    with pytest.raises(ApiError, match="n_epochs") as caught:
        job(
            hyperparameters={"n_epochs": 3},
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4}}},
        )
    assert caught.value.param == "hyperparameters.n_epochs"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("my films", "my-films"), ("a:b/c", "a-b-c"), ("ok_1.2-x", "ok_1.2-x"), ("..x", "x"), ("", "")],
)
def test_a_suffix_fits_into_a_name(given: str, kept: str) -> None:
    assert job(suffix=given).suffix == kept


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"suffix": "☃"}, "no letter or digit"),
        ({"metadata": {"a": 1}}, "values are texts"),
        ({"metadata": {"a": "x" * 513}}, "at most 512"),
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, "supervised and dpo"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}}, "Unknown parameter"),
        ({"hyperparameters": {"n_epochs": 10**6}}, "<= 50"),
        ({"hyperparameters": {"batch_size": True}}, "a boolean"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "> 0"),
    ],
)
def test_jobs_that_cannot_be(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        job(**more)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"logit_bias": {"a": 1}}, "token ids"),
        ({"logit_bias": {"1": 101}}, "-100 to 100"),
        ({"stop": ["a", ""]}, "empty"),
        ({"stop": 3}, "an integer"),
        ({"messages": "hello"}, "a string"),
        ({"messages": ["hello"]}, r"messages\[0\]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "no earlier message calls 'f'"),
        ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, "colour"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "must match"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "two tools"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "object"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "allowed_tools"),
        ({"tool_choice": "maybe"}, "'required'"),
        ({"response_format": {"type": "xml"}}, "'json_schema'"),
        ({"response_format": {"type": "text", "json_schema": {"name": "x"}}}, "needs type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}}, "must match"),
        ({"n": True}, "a boolean"),
        ({"n": 1.5}, "an integer"),
        ({"seed": 2**63}, "<"),
    ],
)
def test_questions_that_cannot_be(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        chat(**more)
    assert caught.value.status == 400
    assert caught.value.param
