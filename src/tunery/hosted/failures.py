"""What a server's refusals and failures mean, and what to do about each, in words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tunery.errors import ConfigError, HostedError, ResumableError, TuneryError

NO_TRAINING = "training_not_available"

NO_CREDIT = ("insufficient_quota", "billing_not_active", "billing_hard_limit_reached")
"""Codes, mostly of 429, that no waiting mends."""

ABOUT_A_QUESTION = (
    "content_filter",
    "content_policy_violation",
    "moderation_blocked",
    "context_length_exceeded",
    "string_above_max_length",
)
"""Codes of 400 with which what a question says, or its length, is refused."""

NOT_TODAY = ("daily_rate_limit_exceeded",)
"""Codes of 429 that only hours of waiting mend."""

WIND_DOWN = (
    "OpenAI is closing fine-tuning: since 2026-05-07 an organisation that never used it cannot create jobs, since "
    "2026-07-02 nor one without answers from a tuned model in the last 60 days, and from 2027-01-06 nobody. On "
    "2027-01-14 gpt-4o, gpt-4o-mini, gpt-4.1, gpt-4.1-mini and everything tuned from them stop answering"
)

WAYS_OUT = (
    "train an open model here (--set model=smollm2-135m-instruct, or one of the hub); on Azure, where existing "
    "customers can train gpt-4.1 until at least 2027-04-14 (--set "
    "hosted.base_url=https://RESOURCE.openai.azure.com/openai/v1 --set hosted.key_variable=AZURE_OPENAI_API_KEY); or "
    "elsewhere (--set hosted.base_url=…). A model you tuned earlier can be moved here while it answers: "
    "tunery migrate ftjob-…"
)


@dataclass(frozen=True)
class HostedServer:
    """Whom one talks to.

    Attributes:
        address: the base URL.
        key_variable: the environment variable with the key.
        key: never shown; taken out of what the server says.
    """

    address: str
    key_variable: str
    key: str = ""

    def __repr__(self) -> str:  # the key stays out of logs and tracebacks
        return f"Server({self.address})"

    def without_key(self, text: str) -> str:
        """A text for a person: in one line, the key taken out."""
        text = " ".join(text.split())
        return text.replace(self.key, "…") if self.key else text

    @property
    def is_openais(self) -> bool:
        """OpenAI's own address, or one of its regions."""
        return f".{urlsplit(self.address).hostname}".endswith(".api.openai.com")


def code_of(error: Any) -> str:
    """The code of an error, "" where it has none."""
    return str(getattr(error, "code", None) or "")


def is_about_question(error: Any) -> bool:
    """Whether a question is refused for itself; the next one may be answered."""
    about = re.match(r"(messages|prompt|tools)\b", str(getattr(error, "param", None) or ""))
    return code_of(error) in ABOUT_A_QUESTION or (code_of(error) not in NO_CREDIT and about is not None)


def is_gone(error: HostedError) -> bool:
    """Whether what was asked for is there no longer."""
    return getattr(error.__cause__, "status_code", None) in (404, 410)


def said_by(error: Any, server: HostedServer) -> str:
    """What the server said, in one line and without the key."""
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    if isinstance(said, dict):  # some servers nest the error once more
        said = said.get("message")
    text = server.without_key(str(said or getattr(error, "message", "") or error))
    return text if len(text) <= 400 else f"{text[:400]}…"


def explain(error: Exception, server: HostedServer, doing: str) -> TuneryError:
    """The error for a person.

    Args:
        error: of the `openai` package.
        doing: what failed, e.g. "uploading training.jsonl".
    """
    status = getattr(error, "status_code", None)
    said = said_by(error, server)
    if status is None:
        return _unreachable(error, server, doing)
    if status == 401:
        return ConfigError(
            f"{server.address} refuses the key in {server.key_variable} (401): {said}",
            f"set {server.key_variable} to a key of that server; keys are only read from the environment",
        )
    if status == 429 or code_of(error) in (*NO_CREDIT, *NOT_TODAY):
        return _limited(error, server, doing, said)
    if status == 403:
        return _forbidden(error, server, doing, said)
    if status == 404:
        return HostedError(
            f"{doing}: {server.address} does not know it (404): {said}",
            "check the name, and that the key belongs to the project that owns it; an address ends in /v1",
        )
    if status >= 500 or status == 408:
        return ResumableError(
            f"{doing}: {server.address} failed again and again ({status}): {said}",
            "run the same command again later; it goes on where it stopped",
        )
    return HostedError(f"{doing}: {server.address} refuses it ({status}): {said}", _about(error))


def _about(error: Any) -> str | None:
    param = getattr(error, "param", None)
    return f"the server names {param}" if param else None


def _unreachable(error: Exception, server: HostedServer, doing: str) -> TuneryError:
    cause = error.__cause__
    words = server.without_key(str(cause or error)) or type(cause or error).__name__
    return ResumableError(
        f"{doing}: {server.address} could not be reached: {words}",
        "check the network and the address (hosted.base_url, OPENAI_BASE_URL), then run the same command again; it "
        "goes on where it stopped",
    )


def training_closed(server: HostedServer, said: str) -> HostedError:
    """The server trains nothing for this account."""
    return HostedError(f"{server.address} trains no models for this account: {said}. {WIND_DOWN}", WAYS_OUT)


def _forbidden(error: Exception, server: HostedServer, doing: str, said: str) -> TuneryError:
    if code_of(error) == NO_TRAINING or NO_TRAINING in said:
        return training_closed(server, said)
    return HostedError(
        f"{doing}: {server.address} does not allow it to this key (403): {said}",
        f"give the key in {server.key_variable} the rights to files, fine-tuning jobs and model answers, or use "
        "another one",
    )


def _limited(error: Any, server: HostedServer, doing: str, said: str) -> TuneryError:
    code = code_of(error)
    if code in NO_CREDIT:
        return ResumableError(
            f"{doing}: the account at {server.address} has no credit left ({error.status_code} {code}): {said}",
            "add credit or raise the limit there, then run the same command again; it goes on where it stopped",
        )
    if code in NOT_TODAY:
        return ResumableError(
            f"{doing}: the account at {server.address} has used up today's jobs ({error.status_code} {code}): {said}",
            "run the same command again tomorrow; it goes on where it stopped",
        )
    return ResumableError(
        f"{doing}: {server.address} is too busy or limits this key (429): {said}",
        "run the same command again later, or ask for less at a time (--set hosted.parallel=1); it goes on where it "
        "stopped",
    )
