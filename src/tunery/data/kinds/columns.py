"""The names that columns usually go by, for the kinds that share them. The first of each is ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunery.data.row_report import is_written
from tunery.jsonl import JsonMapping, is_list, is_object

TEXT_COLUMNS = ("text", "review", "sentence", "content")
PROMPT_COLUMNS = ("prompt", "instruction", "question", "query", "input")
COMPLETION_COLUMNS = ("completion", "response", "output", "answer", "answers")
MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "contents")
TOOL_COLUMNS = ("tools", "functions", "toolconfig", "available_tools", "tool_definitions")
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
    return 2 * sum(map(_holds_messages, values)) > len(values)


_OF_MESSAGES = {"role", "from", "author", "speaker", "type", "parts", "messages", "input"}


def _holds_messages(value: object) -> bool:
    parts = value if is_list(value) else [value]
    return is_written(value) or any(is_object(part) and _OF_MESSAGES & part.keys() for part in parts)


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
    Meaning("tools", tuple(name for name in TOOL_COLUMNS if name != "toolconfig")),  # may say how, beside tools
    Meaning(
        "a second text",
        (
            *("text_pair", "text_b", "text2", "text_2", "sentence2", "sentence_2", "sentence_b", "question2"),
            *("premise", "hypothesis"),
        ),
    ),
    Meaning("what of the text is judged", ("aspect", "aspect_term", "target_entity")),
    Meaning("choices to answer from", ("choices", "options", "answer_choices")),
    Meaning("what follows the answer", ("suffix",)),
    Meaning("calls of tools", ("tool_calls", "function_call", "function_calls")),
    Meaning(
        "the thoughts before an answer",
        (
            *("reasoning", "reasoning_content", "thinking", "thought", "thoughts", "rationale", "chain_of_thought"),
            *("cot", "think", "thinking_content", "reasoning_trace", "scratchpad"),
        ),
    ),
    Meaning(
        "documents to answer from",
        (
            *("documents", "docs", "retrieved_documents", "retrieved_docs", "retrieved_context", "rag_context"),
            *("passages", "contexts", "document", "article", "paragraph", "knowledge", "evidence"),
        ),
        said_elsewhere=True,
    ),
    Meaning(
        "pictures or sound, which are not supported (text is what is trained)",
        (
            *("image", "images", "image_url", "image_urls", "image_path", "image_paths", "video", "videos", "audio"),
            *("audios",),
        ),
    ),
    Meaning("who says a text: a row is a whole conversation, not one message of it", ("role", "speaker")),
    Meaning(
        "settings of the chat template for a row",
        ("chat_template_kwargs", "chat_template", "enable_thinking", "reasoning_effort"),
    ),
    Meaning(
        "which parts of a row are trained",
        ("mask", "masks", "loss_mask", "assistant_masks", "train_on_prompt", "train_on_input", "train_on_inputs"),
    ),
    Meaning("how much a row counts", ("weight", "weights", "sample_weight", "loss_weight"), plain=("1", "1.0")),
    Meaning("which rows are held out", ("split",), names_part=True),
)
"""What is refused by name where a kind has no role for it, instead of being left aside."""

FEEDBACK_COLUMNS = (
    *(
        "label",
        "feedback",
        "thumbs",
        "thumb",
        "thumbs_up",
        "vote",
        "rating",
        "desirable",
        "liked",
        "kto_tag",
        "is_good",
    ),
    "accepted",
)
VERDICT = Meaning(
    "whether an answer is good, or the class of a text",
    (
        *FEEDBACK_COLUMNS,
        "is_correct",
        "correct",
        "quality",
        "reward",
        "reaction",
        "user_feedback",
        "helpful",
        "is_helpful",
    ),
)
CLASS = Meaning(
    "the class of a text",
    (
        *("labels", "label_text", "label_name", "class_name", "class_label", "intent", "emotion", "stars"),
        *("sentiment", "category", "class", "target", "is_spam", "spam", "toxic", "toxicity"),
    ),
)
REST_OF_A_TEXT = Meaning(
    "another part of the text", ("title", "headline", "subject", "body", "description"), said_elsewhere=True
)
