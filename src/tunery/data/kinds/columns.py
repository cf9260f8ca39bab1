"""The names that columns usually go by, for the kinds that share them. The first of each is ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunery.jsonl import JsonMapping, is_list, is_object

TEXT_COLUMNS = ("text", "review", "sentence", "content")
PROMPT_COLUMNS = ("prompt", "instruction", "question", "query", "input")
COMPLETION_COLUMNS = ("completion", "response", "output", "answer")
MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "contents")
TOOL_COLUMNS = ("tools", "functions", "toolconfig")
SYSTEM_COLUMNS = (
    "system",
    "system_prompt",
    "system_message",
    "instructions",
    "systeminstruction",
    "system_instruction",
)
HISTORY_COLUMNS = ("history", "chat_history", "conversation_history")
CONTEXT_COLUMNS = ("context", "passage")

BESIDE_A_PROMPT: Mapping[str, tuple[str, ...]] = {
    "system": SYSTEM_COLUMNS,
    "history": HISTORY_COLUMNS,
    "context": CONTEXT_COLUMNS,
}
"""Roles of columns that come before a prompt, or under it."""


def holds_lists(rows: Sequence[JsonMapping], columns: Mapping[str, str]) -> bool:
    """Whether the prompts or the answers are lists of messages, or objects with them, in most rows."""
    return any(_mostly_lists(rows, columns[role]) for role in ("prompt", "completion") if role in columns)


def _mostly_lists(rows: Sequence[JsonMapping], key: str) -> bool:
    values = [row[key] for row in rows if row.get(key) is not None]
    return 2 * sum(is_object(value) or (is_list(value) and any(map(is_object, value))) for value in values) > len(
        values
    )


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a column usually holds that no kind can do without, or that none can use.

    Attributes:
        what: it holds.
        names: it goes by.
        said_elsewhere: the value may repeat what the row says in a column that is used; then it adds nothing.
        plain: values (in lower case) that change nothing.
        names_part: nor does the name of the part that the file is read for.
    """

    what: str
    names: tuple[str, ...]
    said_elsewhere: bool = False
    plain: tuple[str, ...] = ()
    names_part: bool = False


MEANINGS: tuple[Meaning, ...] = (
    Meaning("a system message", SYSTEM_COLUMNS),
    Meaning("earlier turns", HISTORY_COLUMNS),
    Meaning("what the answer is drawn from", CONTEXT_COLUMNS),
    Meaning("a conversation", MESSAGE_COLUMNS, said_elsewhere=True),
    Meaning("a prompt", PROMPT_COLUMNS, said_elsewhere=True),
    Meaning("an answer", COMPLETION_COLUMNS, said_elsewhere=True),
    Meaning("a text", TEXT_COLUMNS, said_elsewhere=True),
    Meaning("an answer to prefer", ("chosen", "preferred", "preferred_output"), said_elsewhere=True),
    Meaning("an answer to avoid", ("rejected", "non_preferred", "non_preferred_output")),
    Meaning("tools", TOOL_COLUMNS),
    Meaning(
        "a second text",
        (
            *("text_pair", "text_b", "text2", "text_2", "sentence2", "sentence_2", "sentence_b", "question2"),
            *("premise", "hypothesis"),
        ),
    ),
    Meaning("choices to answer from", ("choices", "options", "answer_choices")),
    Meaning(
        "the thoughts before an answer",
        (
            *("reasoning", "reasoning_content", "thinking", "thought", "thoughts", "rationale", "chain_of_thought"),
            *("cot",),
        ),
    ),
    Meaning("documents to answer from", ("documents", "docs")),
    Meaning(
        "pictures or sound, which are not supported (text is what is trained)",
        ("image", "images", "image_url", "video", "videos", "audio", "audios"),
    ),
    Meaning("settings of the chat template for a row", ("chat_template_kwargs",)),
    Meaning("how much a row counts", ("weight", "weights", "sample_weight", "loss_weight"), plain=("1", "1.0")),
    Meaning("which rows are held out", ("split",), names_part=True),
)
"""What is refused by name where a kind has no role for it, instead of being left aside."""

FEEDBACK_COLUMNS = ("label", "feedback", "thumbs", "thumb", "vote", "rating", "desirable", "liked")
VERDICT = Meaning("whether an answer is good, or the class of a text", FEEDBACK_COLUMNS)
