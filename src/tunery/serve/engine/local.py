"""The built-in engine behind the routes' protocol: what the engine's thread sends becomes an asynchronous stream."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tunery.models.device import run_in_fresh_thread
from tunery.models.load import load_base
from tunery.serve.api_errors import ApiError
from tunery.serve.engine.backend import Item, Served, Usage
from tunery.serve.engine.batch import BatchLimits
from tunery.serve.engine.engine import Engine
from tunery.serve.engine.requests import Requests
from tunery.serve.engine.running import Asked

if TYPE_CHECKING:
    from tunery.serve.schemas import ChatRequest, CompletionRequest


@dataclass(frozen=True)
class _Loaded:
    """A base in memory."""

    engine: Engine
    requests: Requests


class LocalBackend:
    """Bases with their adapters, answered by this process: each base has an engine of its own.

    Args:
        bases: as Task.model names them. The first is loaded at the start, the others when they are first asked for.
        max_rows: answers computed at a time, by each base.
        max_queue: answers that may wait for that.
        device, precision: see tunery.models.load.load_base.
        limits: further ones; see BatchLimits.
    """

    def __init__(
        self,
        bases: Sequence[str],
        *,
        max_rows: int | None = None,
        max_queue: int | None = None,
        device: str = "auto",
        precision: str = "auto",
        limits: BatchLimits | None = None,
    ):
        given = {key: value for key, value in (("rows", max_rows), ("waiting", max_queue)) if value is not None}
        self._limits = replace(
            limits or BatchLimits(), **{name: value for name, value in given.items() if value is not None}
        )
        self._load_base = functools.partial(load_base, device=device, precision=precision)
        self.bases = tuple(bases)
        self._loaded: dict[str, _Loaded] = {}
        self._loading = asyncio.Lock()
        self._stopped = False

    # ----------------------------------------------------------------- the protocol

    async def start(self) -> None:
        """Load the first base and begin to answer.

        Raises:
            ModelError, ConfigError: it cannot be loaded, or not be served by this engine.
        """
        self._stopped = False
        await self._of(self.bases[0])

    async def stop(self) -> None:
        """End what is being answered, with an error, and let go of the bases."""
        self._stopped = True
        async with self._loading:
            for loaded in self._loaded.values():
                await asyncio.to_thread(loaded.engine.stop)
            self._loaded.clear()

    def chat(self, request: ChatRequest, model: Served) -> AsyncIterator[Item]:
        """Answer a conversation; see Backend."""
        return self._stream(lambda requests, asked: requests.chat(request, asked), model)

    def complete(self, request: CompletionRequest, model: Served) -> AsyncIterator[Item]:
        """Go on with a text; see Backend."""
        return self._stream(lambda requests, asked: requests.completion(request, asked), model)

    def forget(self, key: str) -> None:
        """An adapter was deleted."""
        for loaded in self._loaded.values():
            loaded.engine.forget(key)

    def health(self) -> dict[str, object]:
        """Facts for a person who looks: of each base in memory."""
        return {name: loaded.engine.health() for name, loaded in self._loaded.items()}

    # ----------------------------------------------------------------- streaming

    async def _stream(self, fill: Callable[[Requests, Asked], None], model: Served) -> AsyncIterator[Item]:
        loaded = await self._of(model.base)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[list[Item | Exception]]()

        def deliver(items: list[Item | Exception]) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, items)

        asked = Asked(model.key, model.adapter, deliver)
        await asyncio.to_thread(fill, loaded.requests, asked)
        loaded.engine.submit(asked)
        try:
            while True:
                for item in await queue.get():
                    if isinstance(item, Exception):
                        raise item
                    yield item
                    if isinstance(item, Usage):
                        return
        finally:
            loaded.engine.cancel(asked)

    async def _of(self, base: str) -> _Loaded:
        """The engine of a base, loaded if need be."""
        if base in self._loaded:
            return self._loaded[base]
        async with self._loading:
            if self._stopped or base not in self.bases:
                raise ApiError(503, f"The base {base} is not served now.", type="server_error")
            if base not in self._loaded:
                self._loaded[base] = await asyncio.to_thread(run_in_fresh_thread, lambda: self._load(base))
            return self._loaded[base]

    def _load(self, name: str) -> _Loaded:
        base = self._load_base(name)
        engine = Engine(base, self._limits)
        requests = Requests(base.tokenizer, engine.batch.context, engine.runner.vocabulary)
        engine.start()
        return _Loaded(engine, requests)
