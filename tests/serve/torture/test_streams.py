"""Many clients at once, half of whom hang up: nobody else notices, and nothing is left behind.

$TUNERY_BURSTS says how many times 64 clients come (2; `make torture`: 20). The server is a process of its own, which
computes in float64, so that an answer in a batch can be compared with the answer alone letter by letter.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import psutil
import pytest
from transformers import AutoModelForCausalLM

from tests.serve.engine.helpers import write_adapter
from tests.tiny import save_tiny_llama

BURSTS = int(os.environ.get("TUNERY_BURSTS", "2"))
CLIENTS = 64
ADAPTERS = ("a", "b", "c", "d")
MOST = 40
"""Longest answer, in tokens."""
GROWTH = 24 << 20
"""Bytes by which the server may grow after it has seen one burst: what an allocator keeps for its own ends."""


@dataclass(frozen=True)
class Ask:
    """What one client wants."""

    model: str
    prompt: str
    hang_up_after: int | None
    """Chunks after which it closes the connection; None stays to the end."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    """(address, process) of a server with a base and four adapters."""
    folder = tmp_path_factory.mktemp("streams")
    base = save_tiny_llama(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    adapters = [f"{name}={write_adapter(model, folder / name, seed)}" for seed, name in enumerate(ADAPTERS)]
    command = [sys.executable, "-m", "tests.serve.torture.streams", str(folder / "home"), str(base), *adapters]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def burst(seed: int) -> list[Ask]:
    """64 clients: prompts that begin alike, for all adapters and the base; every second hangs up."""
    draw = random.Random(seed)
    return [
        Ask(
            ("base", *ADAPTERS)[number % (len(ADAPTERS) + 1)],
            f"the film {'was long and ' * draw.randrange(4)}{draw.choice(('good', 'bad', 'odd'))} {number}",
            draw.randrange(1, 8) if number % 2 else None,
        )
        for number in range(CLIENTS)
    ]


async def hear(client: openai.AsyncOpenAI, ask: Ask) -> str:
    """The answer, as far as the client waits for it."""
    stream = await client.chat.completions.create(
        model=ask.model,
        messages=[{"role": "user", "content": ask.prompt}],
        stream=True,
        temperature=0,
        max_completion_tokens=MOST,
    )
    text, seen = "", 0
    async with stream:
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            seen += 1
            if seen == ask.hang_up_after:
                return text
    return text


async def all_at_once(address: str, asks: list[Ask]) -> list[str]:
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=120) as client:
        return await asyncio.gather(*(hear(client, ask) for ask in asks))


async def alone(address: str, asks: list[Ask]) -> Mapping[tuple[str, str], str]:
    """Each answer in full, one after another."""
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=120) as client:
        return {(a.model, a.prompt): await hear(client, Ask(a.model, a.prompt, None)) for a in asks}


async def come_to_rest(address: str) -> Mapping[str, Any]:
    """What the engine says once no row is left in it."""
    engine: Mapping[str, Any] = {}
    async with httpx2.AsyncClient(timeout=30) as client:
        for _ in range(200):
            (engine,) = (await client.get(f"{address}/api/server")).json()["engine"].values()
            if not engine["rows"] and not engine["waiting"]:
                return engine
            await asyncio.sleep(0.05)
    raise AssertionError(f"rows are left: {engine}")


@pytest.mark.torture
def test_many_streams_of_which_half_hang_up(server: tuple[str, psutil.Process]) -> None:
    address, process = server
    grown = 0
    for number in range(BURSTS):
        asks = burst(number)
        truth = asyncio.run(alone(address, asks))
        heard = asyncio.run(all_at_once(address, asks))  # a 5xx, or a stream that breaks, raises
        for ask, text in zip(asks, heard, strict=True):
            whole = truth[ask.model, ask.prompt]
            assert text == whole if ask.hang_up_after is None else whole.startswith(text)
        engine = asyncio.run(come_to_rest(address))
        assert engine["cache_bytes"] <= engine["cache_limit_bytes"]
        assert len(engine["adapters"]) == len(ADAPTERS)
        assert len({text[:20] for text in truth.values()}) > len(ADAPTERS)  # the adapters say different things
        if number == 0:
            grown = -process.memory_info().rss
    grown += process.memory_info().rss
    assert grown < GROWTH, f"the server grew by {grown / 1e6:.0f} MB over {BURSTS - 1} bursts"
    assert process.is_running()
