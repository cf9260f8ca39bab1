"""From requests to token ids, through the one renderer that training uses."""

from __future__ import annotations

from collections.abc import Sequence

from tunery.data.example import Message, Tool
from tunery.data.render import Renderer
from tunery.errors import DataError
from tunery.serve.api_errors import ApiError


class PromptEncoder:
    """Prompts for one base.

    Args:
        context: the most tokens of prompt and answer together.
        vocabulary: number of tokens that the model knows.
    """

    def __init__(self, renderer: Renderer, context: int, vocabulary: int):
        self.renderer, self.context, self._vocabulary = renderer, context, vocabulary

    def chat(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """The tokens after which the model answers a conversation.

        Raises:
            ApiError: 400, the chat template refuses it, or it is too long.
        """
        try:
            text = self.renderer.prompt([dict(message) for message in messages], tools)
        except DataError as error:
            hint = f" ({error.hint})" if error.hint else ""
            raise ApiError(400, f"{error.message}{hint}", code="invalid_value", param="messages") from error
        return self._fitting(self.renderer.encode_prompt(text), "messages")

    def completion(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens that the model goes on with. In front of a text stands what the tokenizer puts there, as in
        training; token ids are taken as they are.

        Raises:
            ApiError: 400, too long, empty, or ids that the model does not know.
        """
        if isinstance(prompt, str):
            ids = self.renderer.encode_prompt(prompt, begin=True)
        else:
            ids = list(prompt)
            if unknown := [token for token in ids if not 0 <= token < self._vocabulary]:
                raise ApiError(
                    400,
                    f"Invalid 'prompt': there is no token {unknown[0]}; the model has {self._vocabulary:,} tokens.",
                    code="invalid_value",
                    param="prompt",
                )
        if not ids:  # a model goes on with something
            eos = self.renderer.tokenizer.eos_token_id
            if eos is None:
                raise ApiError(400, "Invalid 'prompt': it is empty.", code="invalid_value", param="prompt")
            ids = [int(eos)]  # type: ignore[arg-type]
        return self._fitting(ids, "prompt")

    def _fitting(self, ids: list[int], param: str) -> list[int]:
        if len(ids) >= self.context:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.context:,} tokens, answer included. However, the prompt "
                f"alone has {len(ids):,}. Shorten it.",
                code="context_length_exceeded",
                param=param,
            )
        return ids
