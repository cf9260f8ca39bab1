"""The serving engine: one adapter against several in one batch, PEFT's mixed `generate`, time to the first token.

    make bench-serve                   # 16 rows over 4 adapters, on this machine's CPU or GPU, ten minutes
    make bench-serve ARGS="--quick"    # one round, printed

tunery and PEFT compute the same prompts with the same adapters in the same dtype, in turn, each in a process of
its own: in one, the helper threads of either slow the other (tunery.models.device.run_in_fresh_thread).
Writes the section "Serving" of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import plan, report
from bench.run import heading, say, usable_cores
from tunery.fast.adapters import apply_lora
from tunery.lora.adapter import save_adapter
from tunery.lora.attach import remove, trainable_parameters
from tunery.models.device import run_in_fresh_thread
from tunery.models.load import Base, load_base
from tunery.serve.engine.backend import Usage
from tunery.serve.engine.batch import BatchLimits
from tunery.serve.engine.detokenizer import Detokenizer, TextStream, TokenTexts
from tunery.serve.engine.engine import Engine
from tunery.serve.engine.running import Asked, RunningRequest
from tunery.serve.engine.sampling_params import Sampler, SamplingParams

ROWS, ADAPTERS, PROMPT, ANSWER = 16, 4, 64, 64
QUESTIONS, LENGTHS = 32, (16, 112)
"""Of the load with different lengths: how many questions, and from and to how many tokens each and its answer have."""
FIRST_PROMPT = 256
"""Tokens of the prompts whose first token is waited for."""


@dataclass(frozen=True)
class Load:
    """Questions that are there at once: their tokens, and how many tokens are to be answered."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[int]


@dataclass
class Served:
    """tunery's engine with its adapters."""

    engine: Engine
    tokenizer: Any
    folders: Sequence[Path]

    def __post_init__(self) -> None:
        self._texts = TokenTexts(self.tokenizer)

    def submit(
        self, prompt: Sequence[int], adapter: int | None, answer: int = ANSWER, logprobs: int | None = None
    ) -> queue.Queue[Any]:
        """Ask for exactly `answer` tokens."""
        items: queue.Queue[Any] = queue.Queue()
        asked = Asked(
            "" if adapter is None else str(adapter), None if adapter is None else self.folders[adapter], items.put
        )
        stream = TextStream(Detokenizer(self.tokenizer.backend_tokenizer.decode))
        sampler = Sampler(SamplingParams(temperature=0.0, top_logprobs=logprobs))
        asked.rows.append(RunningRequest(asked, 0, prompt, sampler, stream, self._texts, answer, frozenset()))
        self.engine.submit(asked)
        return items

    def speed(self, load: Load, adapters: Sequence[int | None]) -> float:
        """Tokens answered a second, all rows together."""
        started = time.perf_counter()
        asked = zip(load.prompts, adapters, load.answers, strict=True)
        for items in [self.submit(*each) for each in asked]:
            finish(items)
        return sum(load.answers) / (time.perf_counter() - started)

    def first_token_seconds(self, prompt: Sequence[int]) -> float:
        """From the question to the first token of its answer."""
        started = time.perf_counter()
        items = self.submit(prompt, 0, answer=1)
        items.get()
        return time.perf_counter() - started

    def first(self, prompt: Sequence[int], adapter: int) -> tuple[int, float]:
        """The first token of an answer, and its log-probability."""
        items = self.submit(prompt, adapter, answer=1, logprobs=0)
        (delta, *_) = items.get()
        if isinstance(delta, Exception):
            raise delta
        token = delta.logprobs[0]
        found = self.tokenizer.backend_tokenizer.encode(token.token, add_special_tokens=False).ids
        return (found[0] if len(found) == 1 else -1), float(token.logprob)


def finish(items: queue.Queue[Any]) -> None:
    """Wait for an answer's end."""
    while True:
        for item in items.get():
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Usage):
                return


class Peft:
    """PEFT with the same adapters in the base's dtype, in another process."""

    def __init__(self, folders: Sequence[Path], device: str, dtype: str, threads: int):
        self._process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._call(_load_peft, [str(folder) for folder in folders], device, dtype, threads)

    def speed(self, load: Load, adapters: Sequence[int]) -> float:
        """Tokens answered a second, all rows together; ROWS at a time, in order."""
        return self._call(_peft_speed, load, adapters)

    def log_probability(self, prompt: Sequence[int], adapter: int, token: int) -> float:
        """Of a first token."""
        return self._call(_peft_log_probability, prompt, adapter, token)

    def close(self) -> None:
        """End the process."""
        self._process.shutdown()

    def _call(self, work: Callable[..., Any], *args: Any) -> Any:
        return self._process.submit(work, *args).result()


_peft: Any = None
"""In PEFT's process: the model."""


def _load_peft(folders: Sequence[str], device: str, dtype: str, threads: int) -> None:
    global _peft
    from peft import PeftModel

    torch.set_num_threads(threads)
    base = load_base(plan.MODEL, device=device, precision=dtype)
    _peft = PeftModel.from_pretrained(base.model, folders[0], "0", autocast_adapter_dtype=False)
    for number, folder in enumerate(folders[1:], 1):
        _peft.load_adapter(folder, str(number), autocast_adapter_dtype=False)
    _peft.to(base.model.dtype).eval()


@torch.inference_mode()
def _peft_speed(load: Load, adapters: Sequence[int]) -> float:
    started = time.perf_counter()
    for low in range(0, len(adapters), ROWS):
        rows = slice(low, low + ROWS)
        _peft_batch(load.prompts[rows], adapters[rows], max(load.answers[rows]))
    return sum(load.answers) / (time.perf_counter() - started)


def _peft_batch(prompts: Sequence[Sequence[int]], adapters: Sequence[int], answer: int) -> None:
    """As `generate` takes rows of different lengths: padded on the left, answered until the longest answer ends."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    seen = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        seen[row, width - len(prompt) :] = 1
    out = _peft.generate(
        input_ids=ids.to(_peft.device),
        attention_mask=seen.to(_peft.device),
        do_sample=False,
        pad_token_id=0,
        adapter_names=[str(which) for which in adapters],
        max_new_tokens=answer,
        min_new_tokens=answer,
    )
    if out.shape[1] != width + answer:
        raise RuntimeError("PEFT's answers have another length")


@torch.inference_mode()
def _peft_log_probability(prompt: Sequence[int], adapter: int, token: int) -> float:
    ids = torch.tensor([prompt], device=_peft.device)
    logits = _peft(input_ids=ids, adapter_names=[str(adapter)]).logits[0, -1]
    return float(torch.log_softmax(logits.double(), -1)[token])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round instead of five, nothing is recorded")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


def main() -> None:
    """Load both, compare their first tokens, time them in turn, report."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), options.device, 1 if options.quick else 5, options.threads)
    results = {**heading(options.threads, results["device"]), **results}
    from bench.serve_report import serve_section

    print("\n".join(serve_section(results)))
    if not options.quick:
        report.save("serve", results)


def measure(folder: Path, device: str, rounds: int, threads: int) -> dict[str, Any]:
    """All figures."""

    def load() -> tuple[Base, list[Path], Engine]:
        torch.set_num_threads(threads)
        base = load_base(plan.MODEL, device=device)
        folders = [write_adapter(base.model, folder / str(number), number) for number in range(ADAPTERS)]
        # No prefix is kept: every prompt is computed by both.
        return base, folders, Engine(base, BatchLimits(rows=ROWS, adapters=ADAPTERS, prefix_bytes=0))

    base, folders, engine = run_in_fresh_thread(load)
    peft = Peft(folders, device, base.info.dtype, threads)
    engine.start()
    try:
        return timed(Served(engine, base.tokenizer, folders), peft, base, rounds)
    finally:
        engine.stop()
        peft.close()


def timed(served: Served, peft: Peft, base: Base, rounds: int) -> dict[str, Any]:
    """One round to warm up, then the others."""
    words = torch.Generator().manual_seed(plan.SEED)

    def prompts(count: int, length: int) -> list[list[int]]:
        return torch.randint(1000, 40_000, (count, length), generator=words).tolist()

    def load(count: int, lengths: tuple[int, int] | None) -> Load:
        if lengths is None:
            return Load(prompts(count, PROMPT), [ANSWER] * count)
        low, high = lengths
        sizes = torch.randint(low, high + 1, (2, count), generator=words).tolist()
        return Load([prompts(1, size)[0] for size in sizes[0]], sizes[1])

    def adapters(count: int) -> list[int]:
        return [number % ADAPTERS for number in range(count)]

    difference = disagreement(served, peft, prompts(ADAPTERS, PROMPT))
    runs: list[dict[str, float]] = []
    for number in range(rounds + 1):
        equal, different = load(ROWS, None), load(QUESTIONS, LENGTHS)
        runs.append(
            {
                "base": served.speed(equal, [None] * ROWS),
                "single": served.speed(equal, [0] * ROWS),
                "mixed": served.speed(equal, adapters(ROWS)),
                "peft": peft.speed(equal, adapters(ROWS)),
                "mixed_lengths": served.speed(different, adapters(QUESTIONS)),
                "peft_lengths": peft.speed(different, adapters(QUESTIONS)),
            }
        )
        say(f"  round {number}: " + ", ".join(f"{name} {value:,.0f} tokens/s" for name, value in runs[-1].items()))
    alone = [served.first_token_seconds(prompt) for prompt in prompts(rounds + 1, FIRST_PROMPT)][1:]
    return {
        "device": str(base.model.device),
        "dtype": base.info.dtype,
        "rows": ROWS,
        "adapters": ADAPTERS,
        "prompt": PROMPT,
        "answer": ANSWER,
        "questions": QUESTIONS,
        "lengths": LENGTHS,
        "first_prompt": FIRST_PROMPT,
        "disagreement": difference,
        "rounds": runs[1:],
        "first_token_alone": alone,
        "first_token_loaded": under_load(served, prompts(ROWS - 1, PROMPT), prompts(rounds, FIRST_PROMPT)),
        "versions": versions(),
    }


def disagreement(served: Served, peft: Peft, prompts: Sequence[Sequence[int]]) -> float:
    """Largest difference between the log-probabilities that both give to tunery's first tokens."""
    worst = 0.0
    for number, prompt in enumerate(prompts):
        token, logprob = served.first(prompt, number)
        if token >= 0:
            worst = max(worst, abs(logprob - peft.log_probability(prompt, number, token)))
    return worst


def under_load(served: Served, others: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> list[float]:
    """Seconds to the first token while other rows over all adapters are being answered."""
    running = [served.submit(prompt, i % ADAPTERS, answer=1000) for i, prompt in enumerate(others)]
    for items in running:
        items.get()
    seconds = []
    for prompt in prompts:
        time.sleep(0.2)
        seconds.append(served.first_token_seconds(prompt))
    for row in list(served.engine.batch.active):
        served.engine.cancel(row.asked)
    return seconds


def write_adapter(model: Any, folder: Path, seed: int) -> Path:
    """An adapter on all linear layers that moves the answers a little, as a folder; the model is left bare."""
    apply_lora(model, rank=plan.RANK, alpha=plan.ALPHA, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder, base_model=plan.MODEL)
    remove(model, "default")
    return folder


def versions() -> dict[str, str]:
    """Of what was measured."""
    import peft
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


if __name__ == "__main__":
    main()
