"""The settings of models that are trained elsewhere; a section of tunery.config."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

STRICT = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
"""How all settings are read: none that is unknown, none that changes afterwards."""

HOSTED_PREFIX = "openai:"
"""Stands before the name of a model that is trained by a server which speaks OpenAI's API."""


class HostedConfig(BaseModel):
    """Used when `model` is `openai:NAME`: who trains it. The key is only ever read from the environment."""

    model_config = STRICT

    base_url: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s@]+$",
        description="address of the API, e.g. http://127.0.0.1:8000/v1; left out, $OPENAI_BASE_URL, else OpenAI's own",
    )
    key_variable: str = Field(
        default="OPENAI_API_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="the environment variable that holds the key",
    )
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="put into the tuned model's name there; left out, the name of the run"
    )
    prices: str | None = Field(
        default=None,
        description="file of prices, in the form of src/tunery/hosted/prices.toml; left out, $TUNERY_PRICES, else that "
        "file itself, for OpenAI's own address only",
    )
    parallel: PositiveInt = Field(default=4, description="questions put to a model at the same time, while evaluating")
    base_deployment: str | None = Field(
        default=None, description="name by which the base answers questions, where it is another one (on Azure)"
    )
    tuned_deployment: str | None = Field(
        default=None, description="name by which the tuned model answers questions, where it is another one (on Azure)"
    )
