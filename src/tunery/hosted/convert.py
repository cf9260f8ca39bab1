"""Examples as lines of OpenAI's fine-tuning files.

| kind | becomes |
| --- | --- |
| chat | `{"messages": …, "tools": …}`, weights kept |
| classification | the same question that a model trained here is asked, and the label as the answer |
| completion | the prompt as the user's message, the completion as the answer |
| preference | `{"input": {"messages": …}, "preferred_output": […], "non_preferred_output": […]}` |
| text | refused: there is nothing to ask |

The task's system message stands before conversations that have none, as it does here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from tunery.data.example import DataSet, Example
from tunery.data.kinds import KINDS
from tunery.data.prompts import Prompts
from tunery.errors import ConfigError, DataError
from tunery.openai_api.methods import FEWEST_ROWS

PROBLEMS_SHOWN = 20


def require_trainable(data: DataSet) -> None:
    """Refuse rows that no server takes.

    Raises:
        ConfigError: the rows are plain text.
        DataError: there are too few.
    """
    if refusal := KINDS[data.kind].hosted_refusal():
        raise ConfigError(*refusal)
    if len(data.train) < FEWEST_ROWS:
        raise DataError(
            f"there are {len(data.train)} training rows, and a hosted model needs at least {FEWEST_ROWS}",
            "add rows, or hold out fewer (data.validation)",
        )


def lines(examples: Sequence[Example], prompts: Prompts) -> list[str]:
    """One JSON object an example, in order.

    Raises:
        DataError: rows that a hosted model does not take, each with its place.
    """
    problems = [
        f"{example.where}: {problem}"
        for example in examples
        for problem in KINDS[example.kind].hosted_problems(example)
    ]
    if problems:
        shown = problems[:PROBLEMS_SHOWN]
        more = [f"… and {len(problems) - len(shown):,} more"] if len(problems) > len(shown) else []
        raise DataError("\n".join(["a hosted model does not take these rows:", *shown, *more]), "change or remove them")
    return [json.dumps(KINDS[example.kind].to_openai(prompts, example), ensure_ascii=False) for example in examples]
