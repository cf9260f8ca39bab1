"""/v1/models: the names that answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from tunery.serve.responses import json_response
from tunery.serve.routes.services import Injected, Services
from tunery.serve.schemas.objects import ModelObject, deleted, one

if TYPE_CHECKING:
    from tunery.serve.registry import ServedModel

router = APIRouter(prefix="/v1/models")


@router.get("")
def list_models(services: Injected) -> Response:
    """Bases, aliases and fine-tuned models."""
    data = [one(ModelObject, model) for model in services.registry.list()]
    return json_response({"object": "list", "data": data})


@router.get("/{name:path}")
def retrieve(name: str, services: Injected) -> Response:
    """A model; checkpoints too, which are not listed."""
    return json_response(one(ModelObject, services.registry.resolve(name)))


@router.delete("/{name:path}")
async def delete(name: str, services: Injected) -> Response:
    """Delete a fine-tuned model, and let the engine drop its adapter."""
    model = await run_in_threadpool(_delete, services, name)
    services.backend.forget(model.key)
    return json_response(deleted("model", name))


def _delete(services: Services, name: str) -> ServedModel:
    model = services.registry.resolve(name)
    services.registry.delete(name)
    return model
