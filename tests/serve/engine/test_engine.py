"""The engine's thread: rows join and leave, share prompts, fail alone, and answer as if each were alone."""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.engine.helpers import (
    VOCABULARY,
    ask,
    greedy,
    prompt_of,
    question,
    running,
    tiny_base,
    write_adapter,
)
from tests.serve.engine.near_tie import assert_same_up_to_rounding, gap_at_first_difference
from tunery.inference.prefix import BLOCK
from tunery.lora.adapter import load_adapter
from tunery.lora.attach import disabled, set_active
from tunery.serve.api_errors import ApiError, Busy
from tunery.serve.engine.batch import BatchLimits
from tunery.serve.engine.engine import Engine
from tunery.serve.engine.sampling_params import SamplingParams

SHAPES = ("llama", "gpt2", "qwen3", "gemma2", "gpt_oss")


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def number(health: Mapping[str, object], name: str) -> int:
    """One of the facts that an engine tells."""
    value = health[name]
    assert isinstance(value, int)
    return value


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_those_of_the_model_alone_whatever_joins_and_leaves(shape: str) -> None:
    base = tiny_base(shape)
    rng = random.Random(0)
    asked = [(prompt_of(rng.randint(1, 60), seed=i), rng.randint(1, 24)) for i in range(20)]
    wanted = [greedy(base.model, prompt, most) for prompt, most in asked]
    with running(base, BatchLimits(rows=5, step_tokens=16, cache_bytes=1 << 26, prefix_bytes=1 << 22)) as engine:
        answers = [ask(engine, prompt, most) for prompt, most in asked]
        assert [answer.wait().tokens() for answer in answers] == wanted
        alone = ask(engine, *asked[3]).wait()
    assert alone.tokens() == wanted[3]
    assert alone.reason() == "length"


def test_in_bfloat16_answers_part_only_at_near_ties() -> None:
    base = tiny_base("llama", torch.bfloat16)
    reference = tiny_base("llama", torch.bfloat16).model
    prompts = [prompt_of(10 + i, seed=i) for i in range(12)]
    with running(base, BatchLimits(rows=12, cache_bytes=1 << 26)) as engine:
        alone = [ask(engine, prompt, 20).wait().tokens() for prompt in prompts]
        together = [ask(engine, prompt, 20) for prompt in prompts]
        for prompt, mine, answer in zip(prompts, alone, together, strict=True):
            assert_same_up_to_rounding(reference, prompt, mine, answer.wait().tokens())
            assert_same_up_to_rounding(reference, prompt, greedy(reference, prompt, 20), mine)


def test_the_near_tie_check_sees_a_wrong_token() -> None:
    model = tiny_base("llama").model
    prompt = prompt_of(9)
    right = greedy(model, prompt, 6)
    wrong = [*right[:3], (right[3] + 1) % VOCABULARY, *right[4:]]
    assert gap_at_first_difference(model, prompt, right, right) is None
    with pytest.raises(AssertionError, match="apart"):
        assert_same_up_to_rounding(model, prompt, right, wrong)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_adapters_and_the_base_answer_together(shape: str, tmp_path: Path) -> None:
    base, reference = tiny_base(shape), tiny_base(shape).model
    folders = [write_adapter(base.model, tmp_path / str(i), seed=i, rank=2 + i) for i in range(3)]
    for number, folder in enumerate(folders):
        load_adapter(reference, folder, f"a{number}")
    prompts = [prompt_of(5 + 3 * i, seed=i % 2) for i in range(8)]
    chosen = [None, 0, 1, 2, None, 2, 1, 0]
    with running(base) as engine:
        answers = [
            ask(engine, prompt, 15, adapter=None if which is None else (f"k{which}", folders[which]))
            for prompt, which in zip(prompts, chosen, strict=True)
        ]
        found = [answer.wait().tokens() for answer in answers]
    for prompt, which, tokens in zip(prompts, chosen, found, strict=True):
        if which is None:
            with disabled(reference):
                assert tokens == greedy(reference, prompt, 15)
        else:
            set_active(reference, f"a{which}")
            assert tokens == greedy(reference, prompt, 15)


def test_adapters_take_turns_where_few_fit_in_memory(tmp_path: Path) -> None:
    base, reference = tiny_base(), tiny_base().model
    folders = [write_adapter(base.model, tmp_path / str(i), seed=i) for i in range(5)]
    for number, folder in enumerate(folders):
        load_adapter(reference, folder, f"a{number}")
    prompt = prompt_of(8)
    with running(base, BatchLimits(rows=8, adapters=2, cache_bytes=1 << 26)) as engine:
        answers = [ask(engine, prompt, 10, adapter=(f"k{i % 5}", folders[i % 5])) for i in range(10)]
        found = [answer.wait().tokens() for answer in answers]
        assert len(engine.runner.bank.loaded) <= 2
    for number in range(5):
        set_active(reference, f"a{number}")
        assert found[number] == found[number + 5] == greedy(reference, prompt, 10)


def test_an_adapter_that_cannot_be_read_fails_its_own_requests(tmp_path: Path) -> None:
    base = tiny_base()
    strange = write_adapter(tiny_base("llama", hidden_size=64).model, tmp_path / "strange", seed=0)
    with running(base) as engine:
        missing = ask(engine, prompt_of(4), adapter=("gone", tmp_path / "gone"))
        unfit = ask(engine, prompt_of(4), adapter=("strange", strange))
        good = ask(engine, prompt_of(4))
        with pytest.raises(ApiError, match=r"no adapter at .*gone") as caught:
            missing.wait()
        assert caught.value.status == 400
        with pytest.raises(ApiError, match="does not fit this model"):
            unfit.wait()
        assert good.wait().tokens() == greedy(tiny_base().model, prompt_of(4))
        written = write_adapter(tiny_base().model, tmp_path / "gone", seed=1)
        ask(engine, prompt_of(4), adapter=("gone", written)).wait()


def test_a_forgotten_adapter_is_read_again(tmp_path: Path) -> None:
    base = tiny_base()
    first = write_adapter(base.model, tmp_path / "1", seed=1)
    second = write_adapter(base.model, tmp_path / "2", seed=2)
    prompt = prompt_of(2 * BLOCK)
    with running(base) as engine:
        before = ask(engine, prompt, adapter=("k", first)).wait()
        assert ask(engine, prompt, adapter=("k", second)).wait().tokens() == before.tokens()
        engine.forget("k")
        after = ask(engine, prompt, adapter=("k", second)).wait()
    assert after.tokens() != before.tokens()
    assert after.usage is not None
    assert after.usage.cached_tokens == 0


# --------------------------------------------------------------------------- shared prompts


def test_a_known_prefix_is_not_computed_again(tmp_path: Path) -> None:
    base = tiny_base()
    adapter = ("k", write_adapter(base.model, tmp_path / "a", seed=0))
    prompt = prompt_of(3 * BLOCK + 5)
    with running(base) as engine:
        first = ask(engine, prompt, 6).wait()
        again = ask(engine, prompt, 6).wait()
        longer = ask(engine, [*prompt, *first.tokens(), *prompt_of(BLOCK, seed=1)], 6).wait()
        other = ask(engine, prompt, 6, adapter=adapter).wait()
        whole = ask(engine, prompt[: 3 * BLOCK], 6).wait()
        computed = engine.health()["computed_tokens"]
    cached = [a.usage.cached_tokens for a in (first, again, longer, other, whole) if a.usage]
    assert cached == [0, 3 * BLOCK, 3 * BLOCK, 0, 2 * BLOCK]  # one token is always computed
    assert first.tokens() == again.tokens() == greedy(tiny_base().model, prompt, 6)
    assert longer.tokens() == greedy(tiny_base().model, longer.asked.rows[0].prompt, 6)
    total = sum(len(a.asked.rows[0].prompt) for a in (first, again, longer, other, whole))
    assert computed == total - sum(cached) + 5 * 5  # and five tokens of each answer


def test_an_answer_serves_the_next_turn() -> None:
    with running(tiny_base()) as engine:
        first = ask(engine, prompt_of(BLOCK), BLOCK + 2).wait()
        turn = [*prompt_of(BLOCK), *first.tokens(), *prompt_of(10, seed=3)]
        second = ask(engine, turn, 4).wait()
    assert second.usage is not None
    assert second.usage.cached_tokens == 2 * BLOCK
    assert second.tokens() == greedy(tiny_base().model, turn, 4)


def test_the_same_prompt_at_the_same_time_is_computed_once() -> None:
    prompt = prompt_of(4 * BLOCK + 3)
    drawn = SamplingParams(temperature=1.0, seed=4)
    with running(tiny_base()) as engine:
        several = ask(engine, prompt, 5, drawn, choices=4)
        others = [ask(engine, prompt, 5) for _ in range(3)]
        several.wait()
        for other in others:
            other.wait()
        computed = engine.health()["computed_tokens"]
    assert computed == 4 * BLOCK + 7 * 3 + 7 * 4  # the rest of the last block, and answers, by each
    assert len({tuple(several.tokens(i)) for i in range(4)}) > 1
    assert several.usage is not None
    assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (len(prompt), 20)


def test_who_waits_for_a_prompt_goes_on_when_its_computer_leaves() -> None:
    prompt = prompt_of(6 * BLOCK)
    limits = BatchLimits(rows=4, step_tokens=BLOCK // 2, cache_bytes=1 << 26, prefix_bytes=1 << 22)
    with running(tiny_base(), limits) as engine:
        first, second = question(prompt), question(prompt)
        engine.submit(first.asked)
        engine.submit(second.asked)
        engine.cancel(first.asked)
        assert second.wait().tokens() == greedy(tiny_base().model, prompt)


# --------------------------------------------------------------------------- ends


def test_an_answer_ends_at_a_stop_token_which_is_not_part_of_it() -> None:
    prompt = prompt_of(6)
    whole = greedy(tiny_base().model, prompt, 12)
    stop = whole[5]
    with running(tiny_base()) as engine:
        answer = ask(engine, prompt, 12, stop_ids=[stop]).wait()
        ended = ask(engine, prompt, 12).wait()
    length = whole.index(stop)
    assert answer.reason() == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == length + 1
    assert ended.text().startswith(answer.text())
    assert answer.text() == answer.asked.rows[0].stream._detokenizer._decode(whole[:length])


def test_an_answer_ends_before_a_stop_string() -> None:
    prompt = prompt_of(6)
    with running(tiny_base()) as engine:
        whole = ask(engine, prompt, 16).wait().text()
        stop = whole[6:9]
        answer = ask(engine, prompt, 16, stops=[stop, "never"]).wait()
    assert answer.text() == whole[: whole.index(stop)]
    assert answer.reason() == "stop"


def test_seeds_repeat_whatever_else_runs() -> None:
    drawn = SamplingParams(temperature=1.3, top_p=0.9, seed=11)
    with running(tiny_base()) as engine:
        alone = ask(engine, prompt_of(7), 15, drawn).wait().tokens()
        others = [ask(engine, prompt_of(9, seed=i), 20, SamplingParams(seed=i)) for i in range(6)]
        beside = ask(engine, prompt_of(7), 15, drawn).wait().tokens()
        other = ask(engine, prompt_of(7), 15, SamplingParams(temperature=1.3, top_p=0.9, seed=12)).wait().tokens()
        for each in others:
            each.wait()
    assert alone == beside != other


def test_cancelled_rows_free_their_places() -> None:
    with running(tiny_base()) as engine:
        answers = [ask(engine, prompt_of(5, seed=i), 400, choices=2) for i in range(4)]
        until(lambda: engine.health()["rows"] == 8)
        waiting = ask(engine, prompt_of(4), 3)
        for answer in answers:
            engine.cancel(answer.asked)
        assert waiting.wait().reason() == "length"
        until(lambda: engine.health()["rows"] == 0)
        assert engine.health()["waiting"] == 0
        assert all(not shelf.used for shelf in engine.batch.cache.shelves.values())


def test_a_full_queue_is_busy() -> None:
    limits = BatchLimits(rows=1, waiting=2, cache_bytes=1 << 26)
    with running(tiny_base(), limits) as engine:
        running_one = ask(engine, prompt_of(4), 450)
        until(lambda: engine.health()["rows"] == 1)
        queued = [ask(engine, prompt_of(4), 2) for _ in range(2)]
        with pytest.raises(Busy) as caught:
            ask(engine, prompt_of(4), 2)
        assert caught.value.status == 429
        assert int(caught.value.headers["retry-after"]) >= 1
        engine.cancel(running_one.asked)
        for answer in queued:
            answer.wait()
        ask(engine, prompt_of(4), 2, choices=5).wait()  # an empty queue takes what is larger than itself


def test_memory_that_is_short_makes_rows_wait_and_changes_no_answer() -> None:
    base = tiny_base()
    token_bytes = 2 * 2 * (8 + 8) * 8
    limits = BatchLimits(rows=8, cache_bytes=5 * 128 * token_bytes, prefix_bytes=0)
    prompts = [prompt_of(90 + i, seed=i) for i in range(6)]
    wanted = [greedy(base.model, prompt, 60) for prompt in prompts]
    with running(base, limits) as engine:
        answers = [ask(engine, prompt, 60) for prompt in prompts]
        assert [answer.wait().tokens() for answer in answers] == wanted
        computed = number(engine.health(), "computed_tokens")
    assert computed > sum(map(len, prompts)) + 6 * 59  # some were computed twice


# --------------------------------------------------------------------------- failures


class Fails:
    """Makes steps fail in which a row of this prompt takes part."""

    def __init__(self, engine: Engine, prompt: list[int], error: Exception):
        self.right, self.prompt, self.error = engine.runner.run, prompt, error
        engine.runner.run = self  # type: ignore[method-assign]

    def __call__(self, parts: Any) -> Any:
        if any(list(part.row.prompt) == self.prompt for part in parts):
            raise self.error
        return self.right(parts)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [(RuntimeError("a bug"), 500, "had an error"), (torch.OutOfMemoryError("out of memory"), 503, "memory ran out")],
)
def test_a_failing_step_fails_only_the_rows_that_cause_it(error: Exception, status: int, words: str) -> None:
    bad = prompt_of(9, seed=50)
    with running(tiny_base()) as engine:
        Fails(engine, bad, error)
        answers = [ask(engine, prompt_of(6, seed=i), 10) for i in range(4)]
        failing = ask(engine, bad, 10, choices=2)
        with pytest.raises(ApiError, match=words) as caught:
            failing.wait()
        assert caught.value.status == status
        assert "bug" not in caught.value.message
        for number, answer in enumerate(answers):
            assert answer.wait().tokens() == greedy(tiny_base().model, prompt_of(6, seed=number), 10)
        until(lambda: engine.health()["rows"] == 0)


def test_halves_of_a_step_that_ran_out_of_memory_find_its_tensors_freed() -> None:
    with running(tiny_base()) as engine:
        right, failed, alive = engine.runner.run, list[weakref.ref[torch.Tensor]](), list[bool]()

        def run(parts: Any) -> Any:
            alive.extend(tensor() is not None for tensor in failed)
            if len(parts) > 1:
                activations = torch.empty(1000)
                failed.append(weakref.ref(activations))
                raise torch.OutOfMemoryError("out of memory")
            return right(parts)

        engine.runner.run = run  # type: ignore[method-assign]
        answers = [ask(engine, prompt_of(6, seed=i), 3) for i in range(4)]
        found = [answer.wait().tokens() for answer in answers]
    assert found == [greedy(tiny_base().model, prompt_of(6, seed=i), 3) for i in range(4)]
    assert failed
    assert not any(alive)


def test_numbers_that_are_not_finite_fail_their_row_and_poison_nothing() -> None:
    base = tiny_base()
    prompts = [prompt_of(40, seed=i) for i in range(3)]
    wanted = [greedy(base.model, prompt, 10) for prompt in prompts]
    bad = next(t for t in range(3, VOCABULARY) if not any(t in each for each in (*prompts, *wanted)))
    with torch.no_grad():
        base.model.get_input_embeddings().weight[bad] = float("nan")  # type: ignore[union-attr, index]
    with running(base) as engine:
        poisoned = ask(engine, [*prompts[0], bad, *prompts[0]], 10)
        answers = [ask(engine, prompt, 10) for prompt in prompts]
        with pytest.raises(ApiError, match="not a finite number"):
            poisoned.wait()
        assert [a.wait().tokens() for a in answers] == wanted
        again = [ask(engine, prompt, 10) for prompt in prompts]
        assert [a.wait().tokens() for a in again] == wanted


def test_a_bug_in_a_turn_is_told_to_those_who_wait_and_the_loop_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tiny_base()) as engine:
        right = engine.batch.plan
        monkeypatch.setattr(engine.batch, "plan", lambda: 1 / 0)
        with pytest.raises(ApiError, match="had an error"):
            ask(engine, prompt_of(4)).wait()
        monkeypatch.setattr(engine.batch, "plan", right)
        assert ask(engine, prompt_of(4)).wait().tokens() == greedy(tiny_base().model, prompt_of(4))


def test_stopping_tells_those_who_wait() -> None:
    with running(tiny_base()) as engine:
        answers = [ask(engine, prompt_of(4), 490) for _ in range(3)]
        until(lambda: number(engine.health(), "rows") > 0)
    for answer in answers:
        with pytest.raises(ApiError, match="shutting down") as caught:
            answer.wait()
        assert caught.value.status == 503
    with pytest.raises(ApiError, match="shutting down"):
        ask(engine, prompt_of(4))


def test_nothing_grows_with_the_number_of_requests(tmp_path: Path) -> None:
    base = tiny_base()
    adapters = [(f"k{i}", write_adapter(base.model, tmp_path / str(i), seed=i)) for i in range(3)]
    limits = BatchLimits(rows=4, adapters=2, cache_bytes=1 << 22, prefix_bytes=1 << 18)
    rng = random.Random(0)

    def load(engine: Engine, count: int) -> None:
        answers = []
        for number in range(count):
            adapter = rng.choice([None, *adapters])
            answers.append(ask(engine, prompt_of(rng.randint(1, 90), seed=number), rng.randint(1, 8), adapter=adapter))
            if rng.random() < 0.3:
                engine.cancel(answers[-1].asked)
            elif len(answers) % 6 == 0:
                answers[-1].wait()
        for answer in answers:
            if not answer.asked.cancelled or answer.usage:
                answer.wait()

    with running(base, limits) as engine:
        load(engine, 40)
        until(lambda: engine.health()["rows"] == 0)
        before = engine.health()
        load(engine, 80)
        until(lambda: engine.health()["rows"] == 0)
        after = engine.health()
        assert number(after, "cache_bytes") <= 1 << 22
        assert number(after, "cached_prefix_tokens") <= (1 << 18) // (2 * 2 * 16 * 8)
        assert isinstance(after["adapters"], Collection)
        assert len(after["adapters"]) <= 2
        assert not engine.batch._coming
        assert number(after, "answers") > number(before, "answers")
