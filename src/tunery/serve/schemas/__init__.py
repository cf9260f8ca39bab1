"""The wire types: what a request may hold, and what an answer looks like. They satisfy the official client's types."""

from tunery.serve.schemas.chat import ChatRequest, JsonSchema, ResponseFormat
from tunery.serve.schemas.completion import CompletionRequest
from tunery.serve.schemas.jobs import CreateJob, Hyperparameters, Integration, Wandb

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "CreateJob",
    "Hyperparameters",
    "Integration",
    "JsonSchema",
    "ResponseFormat",
    "Wandb",
]
