"""One exception tree. Each class carries the exit code of the command line; each instance may carry a hint.

Exit codes: 0 done, 1 a bug of ours, 2 usage or configuration, 3 data, 4 checkpoint or adapter, 5 training diverged,
69 a hosted service refuses or fails (EX_UNAVAILABLE of sysexits.h), 75 can be resumed (disk full, pre-empted;
EX_TEMPFAIL), 130 interrupted, 143 terminated.
"""

from __future__ import annotations


class TuneryError(Exception):
    """Something the user can act on: what is wrong and where (the message), and what to do about it (the hint).

    Args:
        param: the field of an API request that it is about.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None, *, param: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  → {self.hint}"


class ConfigError(TuneryError):
    """A setting is missing, misspelt or out of range; a file or folder that a setting names does not exist."""

    exit_code = 2


class NotInstalledError(ConfigError):
    """A package is missing. The hint says how to install it on this machine, so it is for whoever runs it, not for
    clients of a server."""


class ModelError(ConfigError):
    """The base model cannot be found or loaded."""


class TargetError(ConfigError):
    """`lora.targets` matches no layer of the model, or one that LoRA cannot adapt."""


class DataError(TuneryError):
    """Rows that cannot be used. The message lists each as file:line:field."""

    exit_code = 3


class AdapterError(TuneryError):
    """An adapter that does not fit the model, or that was not saved as it was trained."""

    exit_code = 4


class CheckpointError(TuneryError):
    """A checkpoint that cannot be read, or that belongs to another task."""

    exit_code = 4


class DivergedError(TuneryError):
    """A loss or gradient that is not a finite number. Raised before the update, so the adapter is still sound."""

    exit_code = 5


class HostedError(TuneryError):
    """A service that trains models refuses what was asked, or its job failed."""

    exit_code = 69


class ResumableError(TuneryError):
    """The run stopped for a reason outside it (a full disk, say) and can be resumed from its last checkpoint."""

    exit_code = 75


class StoppedError(TuneryError):
    """A signal stopped the run after a checkpoint was written.

    Args:
        signal_number: the signal received; the exit code is 128 plus that number (130 for SIGINT, 143 for SIGTERM).
    """

    def __init__(self, message: str, hint: str | None = None, *, signal_number: int = 2):
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number
