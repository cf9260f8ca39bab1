"""What chat and plain completions have in common: how an answer is drawn, and where it ends."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from tunery.serve.schemas.base import Request, kind_of, problem

MAX_STOPS = 4
MAX_BIAS = 100.0


def _stop(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise problem(
            f"Invalid type for 'stop': expected a string or an array of strings, but got {kind_of(value)} instead.",
            code="invalid_type",
        )
    if len(stops) > MAX_STOPS:
        raise problem(f"Invalid 'stop': too many entries: at most {MAX_STOPS}.", code="array_above_max_length")
    if not all(stops):
        raise problem("Invalid 'stop': a stop sequence is empty.")
    return stops


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        raise problem(
            f"Invalid type for 'logit_bias': expected an object, but got {kind_of(value)} instead.", code="invalid_type"
        )
    result = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise problem("Invalid 'logit_bias': its keys are token ids of the model, as strings.")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise problem(f"Invalid 'logit_bias': its values are numbers from {-MAX_BIAS:g} to {MAX_BIAS:g}.")
        result[int(key)] = float(bias)
    return result


Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Request):
    """`stream_options`."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"include_obfuscation"}
    )  # pads chunks against traffic analysis; here is no traffic to analyse

    include_usage: bool = False


class SamplingRequest(Request):
    """The fields of both kinds of completions, with OpenAI's names, defaults and bounds."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: Annotated[list[str], BeforeValidator(_stop)] = Field(default_factory=list)
    seed: Seed | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias)] = Field(default_factory=dict)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def require_stream_for_options(self) -> None:
        """Refuse `stream_options` without `stream`."""
        if self.stream_options is not None and not self.stream:
            raise problem(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.", at="stream_options"
            )
