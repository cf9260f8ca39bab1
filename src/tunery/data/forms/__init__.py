"""Forms of messages and tools in use elsewhere. A new one is a file here and an entry below."""

from __future__ import annotations

from tunery.data.forms.anthropic import Anthropic
from tunery.data.forms.base import MessageForm
from tunery.data.forms.bedrock import Bedrock
from tunery.data.forms.functions import OldFunctions
from tunery.data.forms.gemini import Gemini
from tunery.data.forms.hermes import Hermes
from tunery.data.forms.other_names import OtherNames
from tunery.data.forms.pairs import Pairs
from tunery.data.forms.responses import Responses
from tunery.data.forms.sharegpt import ShareGPT

FORMS: tuple[MessageForm, ...] = (
    ShareGPT(),
    Responses(),
    Gemini(),
    Anthropic(),
    Bedrock(),
    OldFunctions(),
    Hermes(),
    Pairs(),
    OtherNames(),
)
"""The first that fits a message, or a tool, converts it."""
