"""The kinds of data that tunery trains on. A new one is a file here, an entry below and a name in tunery.config."""

from __future__ import annotations

from collections.abc import Mapping

from tunery.config import KindName
from tunery.data.kinds.base import Kind
from tunery.data.kinds.chat import Chat
from tunery.data.kinds.classification import Classification
from tunery.data.kinds.completion import Completion
from tunery.data.kinds.feedback import Feedback
from tunery.data.kinds.preference import Preference
from tunery.data.kinds.text import PlainText

KINDS: Mapping[KindName, Kind] = {
    kind.name: kind for kind in (Chat(), Preference(), Completion(), Classification(), Feedback(), PlainText())
}
