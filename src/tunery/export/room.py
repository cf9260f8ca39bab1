"""Room in memory for the models of an export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from tunery.errors import ConfigError
from tunery.models.device import available_memory, pick_device
from tunery.text import gigabytes


def place_with_room(device: str, needed: int) -> str:
    """Where a model of `needed` bytes goes: to the device asked for; under "auto" to the CPU, if a GPU has no room.

    Raises:
        ConfigError: there is no such device, or no room.
    """
    try:
        place = pick_device(device)
    except ConfigError as error:  # in the words of a task file
        raise ConfigError(error.message.removeprefix("train.device: "), "use --device auto") from None
    if device == "auto" and needed > available_memory(place):
        place = torch.device("cpu")
    if needed > (free := available_memory(place)):
        raise ConfigError(
            f"a model of {gigabytes(needed)} is to be compared, and {gigabytes(free)} are free on {place}",
            "close other programs" + ("" if place.type == "cpu" else ", or use --device cpu"),
        )
    return str(place)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a GPU whose memory runs out into words.

    Raises:
        ConfigError: it did.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the GPU's memory ran out while the export was made; nothing of it is kept",
            "use --device cpu, or close other programs on the GPU",
        ) from error
