"""What is noticed about rows while they are rendered, in sentences for the user, counted over rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tunery.data.example import Example, Message
from tunery.text import plural

_WORD = re.compile(r"[A-Za-z0-9]+")  # what no template escapes
_LAST_WORDS = 8
_END = 10_000  # characters, among which the last words are looked for


@dataclass
class Remarks:
    """Sentences that are true of rows, and of how many."""

    counts: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, sentence: str) -> None:
        """Count one more row for which `sentence` is true."""
        self.counts[sentence] = self.counts.get(sentence, 0) + 1

    def add_all(self, counts: Mapping[str, int]) -> None:
        """Add the counts of rows that were rendered at another time."""
        for sentence, count in counts.items():
            self.counts[sentence] = self.counts.get(sentence, 0) + count

    def since(self, before: Mapping[str, int]) -> dict[str, int]:
        """What was counted since `counts` was `before`."""
        return {s: count - before.get(s, 0) for s, count in self.counts.items() if count > before.get(s, 0)}

    def sentences(self) -> list[str]:
        """Each remark with its number of rows."""
        return [f"{sentence} ({plural(count, 'row')})" for sentence, count in self.counts.items()]


def holds_control_tokens(example: Example, special: re.Pattern[str] | None) -> bool:
    """Whether what a row says in words of its own has control tokens of the model in it."""
    return special is not None and any(special.search(text) for text in _texts(example))


def _texts(example: Example) -> Iterator[str]:
    yield from (example.text, example.prompt, example.completion)
    for message in (*example.messages, *example.chosen, *example.rejected):
        yield from (message.get("content") or "", message.get("reasoning_content") or "")
        for call in message.get("tool_calls") or ():
            yield from (str(call["function"].get("name")), str(call["function"].get("arguments")))


def about_calls(example: Example) -> Iterator[str]:
    """Calls of tools that a row does not offer, and calls that nothing answers."""
    offered = {tool["function"]["name"] for tool in example.tools}
    for answer in (example.chosen, example.rejected) if example.rejected else (example.chosen,):
        unanswered: dict[str, str] = {}
        for message in (*example.messages, *answer):
            if message["role"] == "tool":
                unanswered.pop(message.get("tool_call_id", ""), None)
            elif unanswered:
                names = ", ".join(sorted(set(unanswered.values())))
                yield f"a call of {names} is followed by something else than the tool's answer"
                unanswered = {}
            for call in message.get("tool_calls") or ():
                name = call["function"]["name"]
                unanswered[call["id"]] = name
                if offered and name not in offered:
                    yield f"a tool is called that the row does not offer: {name}"


def about_left_out(messages: Sequence[Message], whole: str) -> Iterator[str]:
    """What a template leaves out of a conversation, but for its answers.

    Args:
        whole: the conversation as the template writes it.
    """
    place = 0
    for message in messages:
        role, name = message["role"], message.get("name")
        if name and role != "tool" and name not in whole:
            yield f"the chat template leaves out the name of a message of the {role}"
        if role == "assistant":
            continue
        words = _WORD.findall((message.get("content") or "")[-_END:])[-_LAST_WORDS:]
        if not words:
            continue
        word = max(words, key=len)
        found = whole.find(word, place)
        if found < 0 and word not in whole:
            yield f"the chat template leaves out what a message of the {role} says"
        place = max(place, found)
