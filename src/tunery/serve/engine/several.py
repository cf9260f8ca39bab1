"""Several bases, each with an engine of its own, behind one protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from tunery.serve.engine.backend import Backend, Item, Served
from tunery.serve.errors import ApiError

if TYPE_CHECKING:
    from tunery.serve.schemas import ChatRequest, CompletionRequest


class Several:
    """Passes each request to the backend of its model's base.

    Args:
        backends: by base, as Task.model names it.
    """

    def __init__(self, backends: Mapping[str, Backend]):
        self.backends = dict(backends)

    async def start(self) -> None:
        """Start them one after another, so that their bases are not all read at once."""
        for backend in self.backends.values():
            await backend.start()

    async def stop(self) -> None:
        """Stop all."""
        for backend in self.backends.values():
            await backend.stop()

    def chat(self, request: ChatRequest, model: Served) -> AsyncIterator[Item]:
        """Answer a conversation; see Backend."""
        return self._of(model).chat(request, model)

    def complete(self, request: CompletionRequest, model: Served) -> AsyncIterator[Item]:
        """Go on with a text; see Backend."""
        return self._of(model).complete(request, model)

    def forget(self, key: str) -> None:
        """An adapter was deleted."""
        for backend in self.backends.values():
            backend.forget(key)

    def health(self) -> dict[str, Any]:
        """Facts, by base."""
        return {base: backend.health() for base, backend in self.backends.items()}

    def _of(self, model: Served) -> Backend:
        if model.base not in self.backends:
            raise ApiError(
                404,
                f"{model.id} needs the base {model.base}, which this server was started without.",
                code="model_not_found",
                param="model",
            )
        return self.backends[model.base]
