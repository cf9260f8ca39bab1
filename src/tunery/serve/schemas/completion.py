"""POST /v1/completions: plain text to go on with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, TypeGuard

from pydantic import BeforeValidator, Field, model_validator

from tunery.serve.schemas.base import kind_of, problem
from tunery.serve.schemas.sampling import SamplingRequest

MAX_PROMPTS = 128


def _is_tokens(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)


def _prompts(value: object) -> list[str | list[int]]:
    """One entry a prompt, from any of the forms: a text, texts, token ids, lists of token ids."""
    if isinstance(value, str):
        return [value]
    if _is_tokens(value):
        return [value]
    if not isinstance(value, list):
        raise problem(
            f"Invalid type for 'prompt': expected a string, an array of strings, or arrays of token ids, but got "
            f"{kind_of(value)} instead.",
            code="invalid_type",
        )
    if not value:
        raise problem("Invalid 'prompt': the array is empty.", code="empty_array")
    if len(value) > MAX_PROMPTS:
        raise problem(f"Invalid 'prompt': too many entries: at most {MAX_PROMPTS}.", code="array_above_max_length")
    texts = [entry for entry in value if isinstance(entry, str)]
    tokens = [entry for entry in value if _is_tokens(entry)]
    if len(value) in (len(texts), len(tokens)):
        return [*texts, *tokens]
    raise problem(
        "Invalid 'prompt': an array holds either texts, or token ids, or non-empty arrays of token ids.",
        code="invalid_type",
    )


class CompletionRequest(SamplingRequest):
    """The body, with every field settled.

    Attributes:
        prompt: one entry a prompt, a text or token ids; choice number = prompt number × n + number among its n.
        max_tokens: of the answer; 0 only together with `echo`, to score the prompt.
        logprobs: alternatives shown at each token; 0 shows the chosen token alone; None shows nothing.
    """

    ignored: ClassVar[frozenset[str]] = frozenset({"user"})
    unsupported: ClassVar[Mapping[str, str]] = {"suffix": "Models here continue a text; they do not fill a gap in one."}

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] = 1

    @model_validator(mode="after")
    def _combinations(self) -> CompletionRequest:
        self.require_stream_for_options()
        if self.best_of > 1:
            raise problem(
                "Unsupported value: 'best_of' can only be 1 here. Ask for n answers with logprobs, and choose.",
                code="unsupported_value",
                at="best_of",
            )
        if self.max_tokens == 0 and not self.echo:
            raise problem("Invalid 'max_tokens': 0 makes sense only with 'echo'.", at="max_tokens")
        return self
