"""A server that speaks OpenAI's API, through the official client: failures that pass are waited out, others explained.

Nothing is sent, and nothing spent, before a person has agreed to it (`require_consent`).
"""

from __future__ import annotations

import email.utils
import ipaddress
import math
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from tunery.config_hosted import HostedConfig
from tunery.errors import ConfigError, HostedError, NotInstalledError, ResumableError, TuneryError
from tunery.progress import Note, Say
from tunery.versions import install_command

if TYPE_CHECKING:
    from openai import OpenAI

T = TypeVar("T")

OPENAI = "https://api.openai.com/v1"

TIMEOUT = 60.0
"""Seconds to wait for an answer."""
LONG_TIMEOUT = 900.0
"""Seconds to wait where the server has much to do and must not be asked twice: files, jobs, answers of a model."""

PATIENCE = 180.0
"""Seconds that are waited in all before a request is given up."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0

sleep = time.sleep
"""Replaced in tests."""

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
        return f"HostedServer({self.address})"

    def without_key(self, text: str) -> str:
        """A text for a person: in one line, the key taken out."""
        text = " ".join(text.split())
        return text.replace(self.key, "…") if self.key else text

    @property
    def is_openais(self) -> bool:
        """OpenAI's own address, or one of its regions."""
        return f".{urlsplit(self.address).hostname}".endswith(".api.openai.com")


def base_url(config: HostedConfig) -> str:
    """The address to use, without a slash at its end.

    Raises:
        ConfigError: it is not the address of an API, or holds a name and password.
    """
    address = (config.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).strip().rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ConfigError(
            f"{parts.hostname or address!r} is not the address of an API",
            "for example http://127.0.0.1:8000/v1, without a name",
        )
    return address


def is_local(address: str) -> bool:
    """Whether an address is this machine's own."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Service:
    """One server and one key.

    Args:
        config: where it is, and which environment variable holds the key.
        note: told when something is tried again.

    Raises:
        ConfigError: the client is not installed, hosted.base_url is not the address of an API, or there is no key.
    """

    def __init__(self, config: HostedConfig, note: Say):
        try:
            import openai
        except ImportError:
            raise NotInstalledError("a hosted model needs the package openai", install_command("hosted")) from None
        address = base_url(config)
        key = os.environ.get(config.key_variable, "").strip()
        if not key and not is_local(address):
            raise ConfigError(
                f"there is no key for {address}: {config.key_variable} is not set",
                f"export {config.key_variable}=…; keys are only read from the environment, and never written anywhere",
            )
        if key and not re.fullmatch("[!-~]+", key):
            raise ConfigError(
                f"what {config.key_variable} holds is not a key: a space, a line break or a special character is in it",
                f"export {config.key_variable}=… with the key alone",
            )
        if address.startswith("http://") and key and not is_local(address):
            note(Note(f"{address} is not encrypted: the key and the rows can be read on the way"))
        self.server = HostedServer(address, config.key_variable, key)
        self.note = note
        self._client: OpenAI = openai.OpenAI(
            api_key=key or "none-needed", base_url=address, max_retries=0, timeout=TIMEOUT
        )

    @property
    def address(self) -> str:
        """The base URL."""
        return self.server.address

    def call(
        self,
        doing: str,
        request: Callable[[OpenAI], T],
        *,
        patience: float = PATIENCE,
        passing: tuple[int, ...] = (),
        timeouts: float = math.inf,
    ) -> T:
        """Make a request, again and again while the failure is one that passes.

        Args:
            doing: what it is for, in words.
            request: is given the client; must be safe to repeat, and take from the answer all that must be in it.
            patience: seconds to wait in all.
            passing: further statuses that pass by themselves.
            timeouts: how often a request is made again that was not answered in time; it may cost each time.

        Raises:
            TuneryError: it was refused, or failed for too long (see `explain`).
        """
        import openai

        waited, tries = 0.0, 0
        while True:
            try:
                return self._checked(doing, request(self._client))
            except openai.OpenAIError as error:
                pause = pause_after(error, tries, passing)
                timeouts -= isinstance(error, openai.APITimeoutError)
                if pause is None or waited + pause > patience or timeouts < 0:
                    raise explain(error, self.server, doing) from error
                tries += 1
                waited += pause
                if tries > 1 or pause > 2:
                    self.note(Note(f"{doing}: {_why(error)}; trying again in {pause:.0f} s"))
            except (AttributeError, TypeError, LookupError, ValueError) as error:  # what belongs into it is missing
                raise self._other_than_expected(doing) from error
            sleep(pause)

    def _checked(self, doing: str, answer: T) -> T:
        """The answer, unless it is a text where an object belongs (an address that serves something else)."""
        if isinstance(answer, str):
            raise self._other_than_expected(doing)
        return answer

    def _other_than_expected(self, doing: str) -> HostedError:
        return HostedError(
            f"{doing}: {self.address} answers, but not as OpenAI's API does",
            "check the address: it usually ends in /v1",
        )


def pause_after(error: Exception, tries: int, passing: tuple[int, ...] = ()) -> float | None:
    """Seconds to wait before a request that failed so is made again; None if that would be of no use.

    Half a second, doubled with each try and varied a little, so that many clients do not come back at once; longer
    where the server asks for it (Retry-After).
    """
    import openai

    status = getattr(error, "status_code", None)
    if status is None and not isinstance(error, openai.APIConnectionError):
        return None
    if status is not None and status not in (408, 409, 429, *passing) and status < 500:
        return None
    if code_of(error) in (*NO_CREDIT, *NOT_TODAY):
        return None
    own = min(FIRST_PAUSE * 2**tries, LONGEST_PAUSE) * random.uniform(0.8, 1.2)
    return max(own, _retry_after(getattr(error, "response", None)))


def _retry_after(response: object) -> float:
    """The pause that an answer asks for: milliseconds, seconds, or until a date; 0 where it asks for none."""
    headers = getattr(response, "headers", None) or {}
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    date = email.utils.parsedate_tz(headers.get("retry-after") or "")
    return 0.0 if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())


def _why(error: Exception) -> str:
    status = getattr(error, "status_code", None)
    if status == 429:
        return "the server is busy or limits this key (429)"
    return f"the server failed ({status})" if status else "no answer"


# --------------------------------------------------------------------------- failures, in words


def code_of(error: Exception) -> str:
    """The code of an error, "" where it has none."""
    return str(getattr(error, "code", None) or "")


def is_about_question(error: Exception) -> bool:
    """Whether a question is refused for itself; the next one may be answered."""
    about = re.match(r"(messages|prompt|tools)\b", str(getattr(error, "param", None) or ""))
    return code_of(error) in ABOUT_A_QUESTION or (code_of(error) not in NO_CREDIT and about is not None)


def is_gone(error: HostedError) -> bool:
    """Whether what was asked for is there no longer."""
    return getattr(error.__cause__, "status_code", None) in (404, 410)


def said_by(error: Exception, server: HostedServer) -> str:
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
    status, param = getattr(error, "status_code", None), getattr(error, "param", None)
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
            "run the same command again later; it resumes where it stopped",
        )
    return HostedError(
        f"{doing}: {server.address} refuses it ({status}): {said}", param and f"the server names {param}"
    )


def _unreachable(error: Exception, server: HostedServer, doing: str) -> TuneryError:
    cause = error.__cause__
    words = server.without_key(str(cause or error)) or type(cause or error).__name__
    return ResumableError(
        f"{doing}: {server.address} could not be reached: {words}",
        "check the network and the address (hosted.base_url, OPENAI_BASE_URL), then run the same command again; it "
        "resumes where it stopped",
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


def _limited(error: Exception, server: HostedServer, doing: str, said: str) -> TuneryError:
    code, status = code_of(error), getattr(error, "status_code", None)
    if code in NO_CREDIT:
        return ResumableError(
            f"{doing}: the account at {server.address} has no credit left ({status} {code}): {said}",
            "add credit or raise the limit there, then run the same command again; it resumes where it stopped",
        )
    if code in NOT_TODAY:
        return ResumableError(
            f"{doing}: the account at {server.address} has used up today's jobs ({status} {code}): {said}",
            "run the same command again tomorrow; it resumes where it stopped",
        )
    return ResumableError(
        f"{doing}: {server.address} is too busy or limits this key (429): {said}",
        "run the same command again later, or ask for less at a time (--set hosted.parallel=1); it resumes where "
        "it stopped",
    )


# --------------------------------------------------------------------------- consent


Consent = Callable[[Sequence[str]], bool | None]
"""Shows what would be sent and what it would cost, and says whether to continue; None if nobody could be asked."""


def require_consent(consent: Consent | None, sentences: Sequence[str]) -> None:
    """Go on only with consent.

    Raises:
        ConfigError: it was refused, or nobody could be asked.
    """
    answer = consent(sentences) if consent is not None else None
    if answer:
        return
    if answer is None:
        raise ConfigError(
            "\n".join((*sentences, "nothing was sent: it takes consent, and nobody could be asked")),
            "agree with --yes (in Python: consent=lambda sentences: True)",
        )
    raise ConfigError("nothing was sent", "run the same command again whenever you like")
