"""What the routes work with."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends
from starlette.requests import Request

from tunery.serve.server_settings import ServeSettings

if TYPE_CHECKING:
    from tunery.serve.engine.backend import Backend
    from tunery.serve.files import Files
    from tunery.serve.jobs.service import Jobs
    from tunery.serve.registry import Registry


@dataclass
class Services:
    """The parts of a server.

    Attributes:
        closing: set a few seconds after the server was told to stop; answers that still go on are then ended.
        one_look: held while a file is looked at before a job, which takes time and memory.
    """

    settings: ServeSettings
    jobs: Jobs
    files: Files
    registry: Registry
    backend: Backend
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    one_look: asyncio.Lock = field(default_factory=asyncio.Lock)


def services_of(request: Request) -> Services:
    """The services of the application that a request came to."""
    return request.app.state.services


Injected = Annotated[Services, Depends(services_of)]
