"""The local backend: requests in, a stream of deltas out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.serve.engine.helpers import write_adapter
from tests.serve.engine.near_tie import assert_same_up_to_rounding
from tests.serve.engine.templates import FORMS
from tests.serve.engine.wire import Model, chat, completion
from tests.tiny import save_tiny_llama, tiny_tokenizer
from tunery.data.render import Renderer
from tunery.errors import ModelError
from tunery.inference.generate import Sampling, generate
from tunery.lora.adapter import load_adapter
from tunery.lora.attach import disabled
from tunery.models.load import load_base
from tunery.serve.api_errors import ApiError, Busy
from tunery.serve.engine.backend import TokenDelta, TokenLogprob, Usage
from tunery.serve.engine.batch import BatchLimits
from tunery.serve.engine.detokenizer import TokenTexts
from tunery.serve.engine.local import LocalBackend

LIMITS = BatchLimits(rows=8, cache_bytes=1 << 26, prefix_bytes=1 << 22)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"days": {"enum": [1, 2, 3]}},
            "required": ["days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base"), tiny_tokenizer(FORMS["hermes"]))


@pytest.fixture(scope="module")
def runs(folder: Path) -> Iterator[Callable[[Callable[[LocalBackend], Coroutine[Any, Any, Any]]], Any]]:
    """Runs a coroutine function with a backend that is started; one backend and one event loop for all tests."""
    backend = LocalBackend([str(folder)], limits=LIMITS, precision="float32", device="cpu")
    with asyncio.Runner() as runner:
        runner.run(backend.start())
        yield lambda work: runner.run(work(backend))
        runner.run(backend.stop())


def health(backend: LocalBackend, folder: Path) -> dict[str, Any]:
    """Of the engine of one base."""
    facts = backend.health()[str(folder)]
    assert isinstance(facts, dict)
    return facts


async def collect(stream: AsyncIterator[Any]) -> tuple[list[TokenDelta], Usage]:
    items = [item async for item in stream]
    assert isinstance(items[-1], Usage)
    return items[:-1], items[-1]


def text_of(deltas: list[TokenDelta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def reason_of(deltas: list[TokenDelta], index: int = 0) -> str | None:
    (reason,) = [delta.finish_reason for delta in deltas if delta.index == index and delta.finish_reason]
    return reason


def answer(runs: Any, folder: Path, request: Any, **model: Any) -> tuple[list[TokenDelta], Usage]:
    served = Model(str(folder), **model)

    async def work(backend: LocalBackend) -> tuple[list[TokenDelta], Usage]:
        stream = backend.chat(request, served) if hasattr(request, "messages") else backend.complete(request, served)
        return await collect(stream)

    return runs(work)


def test_answers_are_those_of_generation_with_the_same_prompt(runs: Any, folder: Path, tmp_path: Path) -> None:
    base = load_base(str(folder), precision="float32", device="cpu")
    adapter = write_adapter(base.model, tmp_path / "a", seed=3)
    load_adapter(base.model, adapter)
    renderer = Renderer(base.tokenizer)
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what "}, {"type": "text", "text": "is this?"}]},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "user", "content": "why?"},
    ]
    plain = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "what is this?"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "why?"},
    ]
    ids = renderer.encode_prompt(renderer.prompt(plain))
    request = chat(messages, temperature=0, max_completion_tokens=20)

    def generated() -> str:
        return generate(base.model, base.tokenizer, [ids], Sampling(max_new_tokens=20), renderer.stop_ids)[0]

    deltas, usage = answer(runs, folder, request, adapter=adapter, key="a")
    assert text_of(deltas) == generated()
    assert usage.prompt_tokens == len(ids)
    with disabled(base.model):
        assert text_of(answer(runs, folder, request)[0]) == generated()


def test_several_choices_each_with_its_end(runs: Any, folder: Path) -> None:
    deltas, usage = answer(runs, folder, chat(n=3, seed=1, max_completion_tokens=8))
    assert {delta.index for delta in deltas} == {0, 1, 2}
    assert {reason_of(deltas, i) for i in range(3)} <= {"stop", "length"}
    assert len({text_of(deltas, i) for i in range(3)}) > 1
    assert usage.completion_tokens <= 24
    again, _ = answer(runs, folder, chat(n=3, seed=1, max_completion_tokens=8))
    assert [text_of(deltas, i) for i in range(3)] == [text_of(again, i) for i in range(3)]


def test_the_context_bounds_the_answer(runs: Any, folder: Path) -> None:
    deltas, usage = answer(runs, folder, chat("a b " * 100, temperature=0, logit_bias={"2": -100, "0": -100}))
    assert reason_of(deltas) == "length"
    assert usage.prompt_tokens + usage.completion_tokens == 512


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (chat("a b " * 400), "context_length_exceeded", "messages"),
        (completion("a b " * 400), "context_length_exceeded", "prompt"),
        (completion([5, 100_000]), "invalid_value", "prompt"),
        (chat(logit_bias={"100000": 1}), "invalid_value", "logit_bias"),
        (
            chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "what"}}}),
            "invalid_value",
            "response_format",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_is_sent(
    runs: Any, folder: Path, request_: Any, code: str, param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        answer(runs, folder, request_)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


def test_a_template_that_refuses_is_the_clients_error(tmp_path: Path) -> None:
    template = "{{ raise_exception('no system here') if messages[0].role == 'system' else 'x' }}"
    other = save_tiny_llama(tmp_path / "b", tiny_tokenizer(template))

    async def work() -> None:
        backend = LocalBackend([str(other)], limits=LIMITS, device="cpu")
        await backend.start()
        try:
            with pytest.raises(ApiError, match="no system here") as caught:
                await collect(backend.chat(chat([{"role": "system", "content": "s"}]), Model(str(other))))
            assert (caught.value.status, caught.value.param) == (400, "messages")
        finally:
            await backend.stop()

    asyncio.run(work())


def test_log_probabilities_come_with_the_text(runs: Any, folder: Path) -> None:
    deltas, usage = answer(
        runs, folder, chat(temperature=0, max_completion_tokens=9, logprobs=True, top_logprobs=3, stop=["\x00"])
    )
    tokens = [token for delta in deltas for token in delta.logprobs]
    ended = reason_of(deltas) == "stop"
    assert len(tokens) == usage.completion_tokens - ended
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace") == text_of(deltas)
    for token in tokens:
        assert len(token.top) == 3
        assert token.top[0].logprob == token.logprob  # greedy
        assert sum(torch.tensor(t.logprob).exp().item() for t in token.top) <= 1.0001


@pytest.mark.parametrize("seed", range(4))
def test_json_of_a_schema(runs: Any, folder: Path, seed: int) -> None:
    schema = {
        "type": "object",
        "required": ["a", "b"],
        "additionalProperties": False,
        "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
    }
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    deltas, _ = answer(runs, folder, chat(seed=seed, response_format=form, max_completion_tokens=300, n=2))
    for index in range(2):
        value = json.loads(text_of(deltas, index))
        assert set(value) == {"a", "b"}
        assert reason_of(deltas, index) == "stop"
    short, _ = answer(runs, folder, chat(seed=seed, response_format=form, max_completion_tokens=3))
    assert reason_of(short) == "length"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_forced_call(runs: Any, folder: Path, choice: Any, seed: int) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": WEATHER["function"]["parameters"]}}
    request = chat(
        tools=[WEATHER, other], tool_choice=choice, seed=seed, max_completion_tokens=200, parallel_tool_calls=False
    )
    deltas, _ = answer(runs, folder, request)
    (call,) = [call for delta in deltas for call in delta.tool_calls]
    assert call.name in ("weather", "other") if choice == "required" else call.name == "weather"
    assert json.loads(call.arguments)["days"] in (1, 2, 3)
    assert text_of(deltas) == ""
    assert reason_of(deltas) == "tool_calls"


def test_tools_are_shown_to_the_model_unless_none_may_be_called(runs: Any, folder: Path) -> None:
    tokens = [
        answer(runs, folder, chat(max_completion_tokens=1, **more))[1].prompt_tokens
        for more in ({}, {"tools": [WEATHER]}, {"tools": [WEATHER], "tool_choice": "none"})
    ]
    assert tokens[1] > tokens[0] == tokens[2]


@pytest.mark.slow
def test_the_real_model_answers_as_it_does_without_the_engine(smollm2: str, tmp_path: Path) -> None:
    """In the dtype of this machine: answers may part only where rounding decides."""
    base = load_base(smollm2)
    adapter = write_adapter(base.model, tmp_path / "a", seed=1, rank=8, size=0.01)
    questions = ["What is the capital of France?", "Name three colours.", "Write a haiku about the sea."]
    renderer = Renderer(base.tokenizer)
    prompts = [renderer.encode_prompt(renderer.prompt([{"role": "user", "content": text}])) for text in questions]

    async def work() -> list[list[TokenLogprob]]:
        backend = LocalBackend([smollm2], limits=LIMITS)
        await backend.start()
        try:
            requests = [chat(text, temperature=0, max_completion_tokens=24, logprobs=True) for text in questions]
            models = [Model(smollm2), Model(smollm2, adapter, "a")]
            streams = [collect(backend.chat(request, model)) for model in models for request in requests]
            return [[t for delta in deltas for t in delta.logprobs] for deltas, _ in await asyncio.gather(*streams)]
        finally:
            await backend.stop()

    found = asyncio.run(work())
    assert isinstance(base.tokenizer, PreTrainedTokenizerFast)
    texts = TokenTexts(base.tokenizer)
    by_bytes = {texts.bytes(index): index for index in base.tokenizer.get_vocab().values()}
    answers = [[by_bytes[bytes(token.bytes)] for token in tokens] for tokens in found]
    for number, ids in enumerate(answers):
        if number == len(questions):
            load_adapter(base.model, adapter)
        prompt = prompts[number % len(questions)]
        wanted = _greedy(base.model, prompt, 24, renderer.stop_ids)
        assert_same_up_to_rounding(base.model, prompt, ids, wanted)


def _greedy(model: Any, prompt: list[int], most: int, stop_ids: list[int]) -> list[int]:
    out = model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=most, do_sample=False, eos_token_id=stop_ids, pad_token_id=0
    )[0, len(prompt) :].tolist()
    return out[: next((i for i, token in enumerate(out) if token in stop_ids), len(out))]


# --------------------------------------------------------------------------- plain completions


def test_texts_and_tokens_are_gone_on_with(runs: Any, folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the film", add_special_tokens=False)["input_ids"]
    request = completion(["the film", "the answer"], n=2, temperature=0, max_tokens=6)
    deltas, usage = answer(runs, folder, request)
    assert {delta.index for delta in deltas} == {0, 1, 2, 3}
    assert text_of(deltas, 0) == text_of(deltas, 1)
    same, _ = answer(runs, folder, completion(ids, temperature=0, max_tokens=6))
    assert text_of(same) == text_of(deltas, 0)
    assert usage.prompt_tokens == len(ids) + len(tokenizer("the answer", add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("most", [0, 4])
def test_an_echoed_prompt_is_scored(runs: Any, folder: Path, most: int) -> None:
    base = load_base(str(folder), precision="float32", device="cpu")
    prompt = "a fine film is what this is and more of it than one step takes " * 6
    ids = base.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    deltas, usage = answer(runs, folder, completion(prompt, echo=True, logprobs=2, max_tokens=most, temperature=0))
    tokens: list[TokenLogprob] = [token for delta in deltas for token in delta.logprobs]
    assert text_of(deltas).startswith(prompt)
    assert (text_of(deltas) == prompt) == (most == 0)
    assert (usage.prompt_tokens, usage.cached_tokens) == (len(ids), 0)
    assert reason_of(deltas) in ("length", "stop")
    with torch.no_grad():
        shares = base.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert tokens[0].logprob is None
    for place in range(1, len(ids)):
        assert tokens[place].logprob == pytest.approx(float(shares[place - 1, ids[place]]), abs=1e-3)
        assert len(tokens[place].top) == 2


def test_an_echo_without_scores_costs_nothing(runs: Any, folder: Path) -> None:
    deltas, usage = answer(runs, folder, completion("the film", echo=True, max_tokens=0))
    assert text_of(deltas) == "the film"
    assert reason_of(deltas) == "length"
    assert usage.completion_tokens == 0


def test_an_empty_prompt_starts_from_the_end_of_text_token(runs: Any, folder: Path) -> None:
    deltas, usage = answer(runs, folder, completion("", max_tokens=3, temperature=0))
    assert usage.prompt_tokens == 1
    assert reason_of(deltas) in ("length", "stop")


# --------------------------------------------------------------------------- leaving and limits


def test_closing_the_stream_cancels(runs: Any, folder: Path) -> None:
    async def work(backend: LocalBackend) -> None:
        request = chat(temperature=0, n=4, logit_bias={"2": -100, "0": -100})
        stream = backend.chat(request, Model(str(folder)))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        for _ in range(500):
            if health(backend, folder)["rows"] == 0:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the rows go on")

    runs(work)


def test_a_cancelled_task_cancels(runs: Any, folder: Path) -> None:
    async def work(backend: LocalBackend) -> None:
        task = asyncio.create_task(collect(backend.chat(chat(logit_bias={"2": -100}), Model(str(folder)))))
        while health(backend, folder)["rows"] == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while health(backend, folder)["rows"]:
            await asyncio.sleep(0.001)

    runs(work)


def test_many_at_once_over_adapters_answer_as_each_alone(runs: Any, folder: Path, tmp_path: Path) -> None:
    """Half of the clients leave in the middle."""
    bare = load_base(str(folder), precision="float32", device="cpu").model
    models = [Model(str(folder))] + [
        Model(str(folder), write_adapter(bare, tmp_path / str(i), seed=i), f"many-{i}") for i in range(4)
    ]
    asked = [(models[i % 5], chat(f"question {i}", temperature=0, max_completion_tokens=16)) for i in range(40)]

    async def work(backend: LocalBackend) -> None:
        alone = [text_of((await collect(backend.chat(request, model)))[0]) for model, request in asked[:20:2]]

        async def leave(model: Model, request: Any) -> None:
            stream = backend.chat(request, model)
            async for _ in stream:
                break
            await stream.aclose()  # type: ignore[attr-defined]

        jobs = [
            leave(model, request) if number % 2 else collect(backend.chat(request, model))
            for number, (model, request) in enumerate(asked)
        ]
        together = await asyncio.gather(*jobs)
        assert [found and text_of(found[0]) for found in together[:20:2]] == alone

    runs(work)


def test_a_full_queue_is_busy_before_the_first_item(folder: Path) -> None:
    async def work() -> None:
        backend = LocalBackend([str(folder)], max_rows=1, max_queue=1, limits=LIMITS, device="cpu")
        await backend.start()
        try:
            streams = [backend.chat(chat(logit_bias={"2": -100}), Model(str(folder))) for _ in range(3)]
            await anext(streams[0])
            waiting = asyncio.ensure_future(anext(streams[1]))
            while health(backend, folder)["waiting"] == 0:
                await asyncio.sleep(0.001)
            with pytest.raises(Busy):
                await anext(streams[2])
            await streams[0].aclose()  # type: ignore[attr-defined]
            assert isinstance(await waiting, TokenDelta)
            await streams[1].aclose()  # type: ignore[attr-defined]
        finally:
            await backend.stop()

    asyncio.run(work())


def test_a_second_base_is_loaded_when_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    other = str(save_tiny_llama(tmp_path / "other", seed=5))

    async def work() -> None:
        backend = LocalBackend([str(folder), other], limits=LIMITS, device="cpu")
        await backend.start()
        try:
            assert list(backend.health()) == [str(folder)]
            await collect(backend.chat(chat(max_completion_tokens=2), Model(other)))
            assert list(backend.health()) == [str(folder), other]
            with pytest.raises(ApiError, match="not served"):
                await collect(backend.chat(chat(), Model("elsewhere")))
        finally:
            await backend.stop()

    asyncio.run(work())


def test_a_base_that_cannot_be_found_fails_the_start(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        asyncio.run(LocalBackend([str(tmp_path / "nothing")]).start())
