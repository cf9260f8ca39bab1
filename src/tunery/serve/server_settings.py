"""The settings of a server."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tunery.config import DataConfig, Task
from tunery.errors import ConfigError
from tunery.jsonl import JsonMapping, JsonObject
from tunery.task_file import absolute, load_task

MEGABYTE = 1 << 20


def default_home() -> Path:
    """`$TUNERY_HOME`, else `$XDG_DATA_HOME/tunery`, else `~/.local/share/tunery`."""
    if own := os.environ.get("TUNERY_HOME"):
        return Path(own)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "tunery"


class ServeSettings(BaseModel):
    """Everything that can be set about a server.

    Attributes:
        bases: models that answer and can be trained, as in `Task.model`; the first is loaded at the start.
        aliases: further names of bases, such as gpt-4o-mini.
        adapters: name → run directory, or adapter folder in PEFT's format, of one of the bases.
        host, port: the address. Any other than loopback needs `api_keys`.
        home: where files, jobs and the database lie.
        slots: jobs that train at the same time.
        engine, engine_kind: the URL of a vLLM or llama.cpp server that answers instead of this process; None finds out
            which of them it is.
        task_defaults: sections of a task for all jobs, only what was set.
        max_rows: answers computed at a time.
        max_queue: requests that may wait for a row; more are refused with 429.
        allow_hosts: names, besides loopback's, under which browsers may reach the server.
        allow_origins: web pages of other servers that may use the API.
        upload_limit, json_limit: longest body of an upload, and of any other request, in bytes.
        api_keys: any of them opens the API; without keys it is open to whoever reaches it.
        keep_alive: seconds of silence after which a stream sends a comment.
        stop_seconds: how long an answer may go on when the server is stopped.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bases: Annotated[tuple[str, ...], Field(min_length=1)]
    aliases: Mapping[str, str] = Field(default_factory=dict)
    adapters: Mapping[str, Path] = Field(default_factory=dict)
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    home: Path = Field(default_factory=default_home)
    slots: Annotated[int, Field(ge=1)] = 1
    engine: str | None = None
    engine_kind: Literal["vllm", "llamacpp"] | None = None
    task_defaults: Mapping[str, JsonMapping] = Field(default_factory=dict)
    max_rows: Annotated[int, Field(ge=1)] = 64
    max_queue: Annotated[int, Field(ge=0)] = 256
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    upload_limit: Annotated[int, Field(ge=1)] = 512 * MEGABYTE
    json_limit: Annotated[int, Field(ge=1)] = 4 * MEGABYTE
    api_keys: tuple[str, ...] = Field(default=(), repr=False)
    keep_alive: Annotated[float, Field(gt=0)] = 10.0
    stop_seconds: Annotated[float, Field(ge=0)] = 4.0

    @field_validator("bases")
    @classmethod
    def _absolute_bases(cls, bases: tuple[str, ...]) -> tuple[str, ...]:
        """Twice the same is once."""
        return tuple(dict.fromkeys(map(absolute_name, bases)))

    @field_validator("aliases")
    @classmethod
    def _absolute_aliases(cls, aliases: Mapping[str, str]) -> Mapping[str, str]:
        return {alias: absolute_name(base) for alias, base in aliases.items()}

    @field_validator("adapters")
    @classmethod
    def _absolute_adapters(cls, adapters: Mapping[str, Path]) -> Mapping[str, Path]:
        return {name: path.expanduser().absolute() for name, path in adapters.items()}

    @field_validator("home")
    @classmethod
    def _absolute_home(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("allow_hosts")
    @classmethod
    def _lower(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(host.strip().lower() for host in hosts)

    @field_validator("allow_origins")
    @classmethod
    def _plain_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            scheme, colon, rest = origin.partition("://")
            if scheme not in ("http", "https") or not colon or not rest or "/" in rest.rstrip("/"):
                raise ValueError(f"an origin looks like https://example.com, not {origin!r}")
        return tuple(origin.rstrip("/").lower() for origin in origins)

    @field_validator("engine")
    @classmethod
    def _web_address(cls, engine: str | None) -> str | None:
        if engine is not None and not engine.startswith(("http://", "https://")):
            raise ValueError(f"an engine's address looks like http://127.0.0.1:8001, not {engine!r}")
        return engine

    @model_validator(mode="after")
    def _aliases_of_bases(self) -> ServeSettings:
        for alias, base in self.aliases.items():
            if base not in self.bases:
                raise ValueError(f"the alias {alias} stands for {base}, which is none of the bases: add --base {base}")
        return self

    @model_validator(mode="after")
    def _key_beyond_loopback(self) -> ServeSettings:
        if not is_loopback(self.host) and not self.api_keys:
            raise ValueError(
                f"the address {self.host} can be reached from other machines, and there is no key: set TUNERY_API_KEYS "
                "(several are separated by commas), or leave --host out"
            )
        return self

    @property
    def url(self) -> str:
        """Where the page is, for a browser on this machine."""
        name = "localhost" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{name}]' if ':' in name else name}:{self.port}"


def absolute_name(model: str) -> str:
    """A model's name as it is; a folder or file seen from the current folder."""
    return absolute(Task(model=model, data=DataConfig(train="unused.jsonl"))).model


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def make_settings(**values: Any) -> ServeSettings:
    """Settings, with mistakes as one ConfigError.

    Raises:
        ConfigError: a value is out of range, or the server would be open to other machines.
    """
    try:
        return ServeSettings(**values)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            where = ".".join(map(str, item["loc"]))
            lines.append(f"{where}: {item['msg']}" if where else item["msg"])
        message = "\n".join(line.replace("Value error, ", "") for line in lines)
        raise ConfigError(message, "see `tunery serve --help`") from None


def named(pairs: Sequence[str], what: str) -> dict[str, str]:
    """{NAME: VALUE} from NAME=VALUE texts.

    Raises:
        ConfigError: a text has another form, or a name stands twice.
    """
    result: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not (name and equals and value):
            raise ConfigError(f"{what}: {pair!r} is not of the form NAME=VALUE", "see `tunery serve --help`")
        if name in result:
            raise ConfigError(f"{what}: {name} is given twice", "keep one of them")
        result[name] = value
    return result


def keys_from_environment() -> tuple[str, ...]:
    """The keys in `$TUNERY_API_KEYS`, separated by commas."""
    return tuple(key for part in os.environ.get("TUNERY_API_KEYS", "").split(",") if (key := part.strip()))


SECTIONS_FOR_ALL_JOBS = ("lora", "train", "data", "evaluate")


def read_task_defaults(path: Path) -> dict[str, JsonObject]:
    """Settings for all jobs: sections of a task file, only what is set in them.

    Raises:
        ConfigError: it cannot be read, a setting is wrong, or it holds another section.
    """
    task = load_task(path, ("name=unused", "model=unused", "data.train=unused.jsonl"))
    given = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    if others := sorted(set(given) - set(SECTIONS_FOR_ALL_JOBS)):
        raise ConfigError(
            f"{path}: {', '.join(others)} cannot be set for all jobs",
            f"sections that can: {', '.join(SECTIONS_FOR_ALL_JOBS)}",
        )
    sections = {name: getattr(task, name).model_dump(mode="json", exclude_unset=True) for name in given}
    return {name: {key: sections[name][key] for key in given[name] or {}} for name in sections}
