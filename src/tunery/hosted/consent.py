"""Nothing is sent, and nothing spent, before a person has agreed to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tunery.errors import ConfigError

Consent = Callable[[Sequence[str]], bool | None]
"""Shows what would be sent and what it would cost, and says whether to go on; None if nobody could be asked."""


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
