"""Answers that are made while they are sent, and clients that leave before the end.

Whatever happens (the client leaves, the server stops, the engine fails), the engine's iterator is closed, which frees
its rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Sequence
from typing import Final, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tunery.jsonl import JsonObject
from tunery.serve.api_errors import ApiError, from_exception, server_error
from tunery.serve.engine.backend import TokenDelta, Usage
from tunery.serve.routes.answers import FinishedAnswer

T = TypeVar("T")

KEEP_ALIVE: Final = b": keep-alive\n\n"
DONE: Final = b"data: [DONE]\n\n"

_log = logging.getLogger("tunery.serve")


class Silence:
    """Nothing came within the time given."""


class End:
    """Nothing more will come."""


SILENCE, END = Silence(), End()


class Writer(Protocol):
    """Turns an engine's items into the JSON of chunks."""

    finished: FinishedAnswer

    def write(self, delta: TokenDelta) -> Iterator[JsonObject]:
        """The chunks of a delta."""
        ...

    def end(self) -> Iterator[JsonObject]:
        """The chunks after the last delta."""
        ...


class Items:
    """An engine's items, one by one, with a wait that can be given up without losing one.

    One task draws them from the engine, so that a token costs the event loop little.

    Args:
        source: the engine's iterator.
        closing: when it is set, the items end with an error.
    """

    def __init__(self, source: AsyncIterator[TokenDelta | Usage], closing: asyncio.Event):
        self._source = source
        self._queue: asyncio.Queue[TokenDelta | Usage | End | Exception] = asyncio.Queue()
        self._tasks = [asyncio.ensure_future(self._draw()), asyncio.ensure_future(self._end_when(closing))]

    async def _draw(self) -> None:
        last: End | Exception = END
        try:
            async for item in self._source:
                self._queue.put_nowait(item)
        except Exception as error:
            last = error
        self._queue.put_nowait(last)

    async def _end_when(self, closing: asyncio.Event) -> None:
        await closing.wait()
        self._queue.put_nowait(
            ApiError(
                503, "The server is being stopped.", type="server_error", code="stopping", headers={"retry-after": "5"}
            )
        )

    async def take(self, seconds: float | None = None) -> TokenDelta | Usage | End | Silence:
        """The next item; END after the last; SILENCE if none comes within `seconds`.

        Raises:
            ApiError: 503, the server is being stopped; or what the engine raises.
        """
        if self._queue.empty():
            try:
                item = await asyncio.wait_for(self._queue.get(), seconds)
            except TimeoutError:
                return SILENCE
        else:
            item = self._queue.get_nowait()
        if isinstance(item, Exception):
            raise item
        return item

    async def close(self) -> None:
        """Close the engine's iterator; safe to call twice."""
        await _cancel(self._tasks)
        if isinstance(self._source, AsyncGenerator):
            await self._source.aclose()


async def _cancel(tasks: Sequence[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. The request's body must have been read.

    Raises:
        ClientDisconnect: the client has left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await _cancel([working, leaving])


async def collect(receive: Receive, items: Items) -> tuple[list[TokenDelta], Usage | None]:
    """All items: the deltas, and the usage.

    Raises:
        ClientDisconnect: the client has left.
    """
    try:
        return await while_connected(receive, _collect(items))
    finally:
        await items.close()


async def _collect(items: Items) -> tuple[list[TokenDelta], Usage | None]:
    deltas: list[TokenDelta] = []
    usage: Usage | None = None
    while not isinstance(item := await items.take(), End):
        if isinstance(item, Usage):
            usage = item
        elif isinstance(item, TokenDelta):
            deltas.append(item)
    return deltas, usage


# --------------------------------------------------------------------------- server-sent events


def event(data: object) -> bytes:
    """A server-sent event. What some clients take for the end of a line is escaped."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in ("\x85", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f"data: {text}\n\n".encode()


class EventStream(Response):
    """Sends what a generator yields until it ends or the client leaves; the generator is closed in any case."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], items: Items):
        super().__init__(headers={"cache-control": "no-cache, no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._items = events, items

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        try:
            with contextlib.suppress(ClientDisconnect):
                await while_connected(receive, self._send(send))
        finally:
            await self._events.aclose()
            await self._items.close()  # a generator that was never begun closes nothing itself

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._events:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def streamed(receive: Receive, items: Items, writer: Writer, keep_alive: float) -> EventStream:
    """An answer sent as server-sent events.

    Its status waits for the first item, so that a request refused by the engine gets the status of its error; but not
    for longer than `keep_alive` seconds, after which comments keep the connection open.

    Raises:
        ApiError, ClientDisconnect: before anything was sent.
    """
    try:
        first = await while_connected(receive, items.take(keep_alive))
    except BaseException:
        await items.close()
        raise
    return EventStream(_events(first, items, writer, keep_alive), items)


async def _events(
    item: TokenDelta | Usage | End | Silence, items: Items, writer: Writer, keep_alive: float
) -> AsyncGenerator[bytes, None]:
    try:
        while not isinstance(item, End):
            if isinstance(item, Silence):
                yield KEEP_ALIVE
            elif isinstance(item, Usage):
                writer.finished.usage = item
            elif isinstance(item, TokenDelta):
                for chunk in writer.write(item):
                    yield event(chunk)
            item = await items.take(keep_alive)
        for chunk in writer.end():
            yield event(chunk)
        yield DONE
    except Exception as error:
        answer = from_exception(error)
        if answer is None:
            _log.exception("a streamed answer broke off")
            answer = server_error()
        yield event(answer.body())
    finally:
        await items.close()
