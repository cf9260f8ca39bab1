"""Answers by generation, through transformers' own `generate`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import TextIteratorStreamer

from tunery.errors import ConfigError
from tunery.models.device import is_out_of_memory
from tunery.models.windows import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    class GenerativeModel(Protocol):
        """A model with a language modelling head, as far as it is asked to generate."""

        def generate(
            self,
            *,
            input_ids: Tensor,
            attention_mask: Tensor,
            generation_config: GenerationConfig,
            streamer: BaseStreamer | None,
            stopping_criteria: StoppingCriteriaList,
        ) -> Tensor: ...


BATCH = 8


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; temperature 0 takes the most likely token each time.

    Attributes:
        max_new_tokens: longest answer; it also ends where the model's context does.
        temperature, top_p: of nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751).
        seed: makes a drawn answer repeatable; None draws afresh.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def config(self, stop_ids: Sequence[int], pad_id: int, room: int) -> GenerationConfig:
        """For `generate`; `room` is what the context leaves for an answer, in tokens."""
        drawn: dict[str, object] = {"do_sample": False}
        if self.temperature > 0:
            drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=min(self.max_new_tokens, room),
            eos_token_id=list(stop_ids) or None,
            pad_token_id=pad_id,
            **drawn,
        )


class _Abandoned(StoppingCriteria):
    """Ends an answer after its next token, once nobody waits for it any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor] | None, **kwargs: object) -> torch.BoolTensor:
        ended = torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
        return cast("torch.BoolTensor", ended)


def _generate(
    model: PreTrainedModel,
    ids: Sequence[list[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    streamer: BaseStreamer | None = None,
    stopping: Sequence[StoppingCriteria] = (),
) -> Tensor:
    """Prompts, padded on the left → token ids [len(ids), longest prompt + new]."""
    pad = stop_ids[0] if stop_ids else 0
    width = max(map(len, ids))
    room = context_length(model.config) - width
    if room < 1:
        context = context_length(model.config)
        raise ConfigError(
            f"the prompt has {width:,} tokens, and the model takes {context:,} with the answer", "shorten it"
        )
    tokens = torch.full((len(ids), width), pad, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for index, prompt in enumerate(ids):
        tokens[index, width - len(prompt) :] = torch.tensor(prompt)
        mask[index, width - len(prompt) :] = 1
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    with torch.inference_mode():
        return cast("GenerativeModel", model).generate(
            input_ids=tokens.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=sampling.config(stop_ids, pad, room),
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList(stopping),
        )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
) -> list[str]:
    """The model's answer to each tokenised prompt, in the order given, without its stop token.

    Raises:
        ConfigError: a prompt fills the model's context.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    waiting = [order[at : at + BATCH] for at in range(0, len(order), BATCH)][::-1]
    while waiting:
        part = waiting.pop()
        given = [prompts[i] for i in part]
        try:
            out = _generate(model, given, sampling, stop_ids)[:, max(map(len, given)) :]
        except (RuntimeError, MemoryError) as error:
            if len(part) == 1 or not is_out_of_memory(error):
                raise
            waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
            continue
        for i, tokens in zip(part, out.tolist(), strict=True):
            end = next((n for n, token in enumerate(tokens) if token in stop_ids), len(tokens))
            answers[i] = str(tokenizer.decode(tokens[:end], skip_special_tokens=True))
    return answers


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    sampling: Sampling,
    stop_ids: Sequence[int],
) -> Generator[str]:
    """The answer to one prompt, piece by piece as it is made. Closing the iterator ends the answer."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    abandoned = _Abandoned()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            _generate(model, [prompt], sampling, stop_ids, streamer, [abandoned])
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        abandoned.event.set()
        _join(thread)
    if failure:
        raise failure[0]


def _join(thread: threading.Thread) -> None:
    """Wait for a thread, whatever interrupts that: a process that ends while one computes is aborted by PyTorch."""
    while thread.is_alive():
        with contextlib.suppress(KeyboardInterrupt):
            thread.join()
