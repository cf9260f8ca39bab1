"""A server that speaks OpenAI's API, through the official client: failures that pass are waited out, others told."""

from __future__ import annotations

import email.utils
import ipaddress
import math
import os
import random
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from tunery.config_hosted import HostedConfig
from tunery.errors import ConfigError, HostedError, NotInstalledError
from tunery.hosted.failures import NO_CREDIT, NOT_TODAY, HostedServer, code_of, explain
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


class Service:
    """One server and one key.

    Args:
        config: where it is, and which environment variable holds the key.
        note: told when something is tried again.

    Raises:
        ConfigError: the client is not installed, the address is no address, or there is no key.
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
                f"what {config.key_variable} holds is no key: a space, a line break or a special character is in it",
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
            TuneryError: it was refused, or failed for too long (tunery.hosted.failures).
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


def base_url(config: HostedConfig) -> str:
    """The address to use, without a slash at its end.

    Raises:
        ConfigError: it is no address, or holds a name and password.
    """
    address = (config.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).strip().rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ConfigError(
            f"{parts.hostname or address!r} is no address of an API",
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


def pause_after(error: Any, tries: int, passing: tuple[int, ...] = ()) -> float | None:
    """Seconds to wait before a request that failed so is made again; None if that would be of no use.

    Half a second, doubled with each try and varied a little, so that many clients do not come back at once; longer
    where the server asks for it (Retry-After).
    """
    status = getattr(error, "status_code", None)
    if status is None and not _is_connection(error):
        return None
    if status is not None and status not in (408, 409, 429, *passing) and status < 500:
        return None
    if code_of(error) in (*NO_CREDIT, *NOT_TODAY):
        return None
    own = min(FIRST_PAUSE * 2**tries, LONGEST_PAUSE) * random.uniform(0.8, 1.2)
    return max(own, _retry_after(getattr(error, "response", None)))


def _is_connection(error: Any) -> bool:
    import openai

    return isinstance(error, openai.APIConnectionError)


def _retry_after(response: Any) -> float:
    """The pause that an answer asks for: milliseconds, seconds, or until a date; 0 where it asks for none."""
    headers = getattr(response, "headers", None) or {}
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    date = email.utils.parsedate_tz(headers.get("retry-after") or "")
    return 0.0 if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())


def _why(error: Any) -> str:
    status = getattr(error, "status_code", None)
    if status == 429:
        return "the server is busy or limits this key (429)"
    return f"the server failed ({status})" if status else "no answer"
