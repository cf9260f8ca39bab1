"""/v1/chat/completions and /v1/completions: answers, whole or streamed."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

import tunery
from tunery.serve.responses import json_response
from tunery.serve.routes.answers import ChatChunks, CompletionChunks, ResponseHead, chat_body, completion_body
from tunery.serve.routes.body import json_body
from tunery.serve.routes.services import Injected
from tunery.serve.routes.streaming import Items, collect, streamed
from tunery.serve.schemas import ChatRequest, CompletionRequest

router = APIRouter(prefix="/v1")


@router.post("/chat/completions")
async def chat(
    request: Request, asked: Annotated[ChatRequest, Depends(json_body(ChatRequest))], services: Injected
) -> Response:
    """Answer a conversation."""
    model = await run_in_threadpool(services.registry.resolve, asked.model)
    head = ResponseHead.new("chatcmpl", asked.model, tunery.__version__, model.base, model.key)
    items = Items(services.backend.chat(asked, model), services.closing)
    if asked.stream:
        return await streamed(request.receive, items, ChatChunks(head, asked), services.settings.keep_alive)
    deltas, usage = await collect(request.receive, items)
    return json_response(chat_body(head, asked, deltas, usage))


@router.post("/completions")
async def complete(
    request: Request, asked: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))], services: Injected
) -> Response:
    """Go on with a text."""
    model = await run_in_threadpool(services.registry.resolve, asked.model)
    head = ResponseHead.new("cmpl", asked.model, tunery.__version__, model.base, model.key)
    items = Items(services.backend.complete(asked, model), services.closing)
    if asked.stream:
        return await streamed(request.receive, items, CompletionChunks(head, asked), services.settings.keep_alive)
    deltas, usage = await collect(request.receive, items)
    return json_response(completion_body(head, asked, deltas, usage))
