"""Calls of tools: how a model's chat template writes them, how they are found in an answer, and how they are forced.

The template is asked: a conversation with a made-up call is rendered through it, with one call and with two, and what
stands around the names and the arguments is the form. Answers are read by that form first, and then by the three forms
that most models were taught: <tool_call>{…}</tool_call> (Hermes, Qwen), [TOOL_CALLS][{…}] or [TOOL_CALLS]name{…}
(Mistral), and bare {"name": …, "parameters": …} (Llama 3; tunery's plain template with "arguments").
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunery.data.example import Tool
from tunery.data.render import Renderer
from tunery.serve.engine.backend import ToolCallDelta
from tunery.serve.engine.constrain import inline_schema, lark_grammar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME, _ARGUMENTS, _ID = "probe_of_tunery", {"probe": "value"}, "tuneryid9"
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": "a probe",
            "parameters": {"type": "object", "properties": {"probe": {"type": "string"}}},
        },
    }
]
_MARKERS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_MISTRAL_NAME = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w+)?\s*(?:\[ARGS\])?\s*(?={)")
_THOUGHTS = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Form:
    """A calling answer is opening + name + middle + arguments + (joint + name + middle + arguments)… + closing.

    An id of the call, where the template writes one, shows as `tuneryid9` in joint and closing. There is no joint where
    the template takes one call only.
    """

    opening: str
    middle: str
    joint: str | None
    closing: str

    @property
    def marker(self) -> str:
        """What tells the first call from text; "" where a call is bare JSON."""
        return _THOUGHTS.sub("", self.opening).partition("{")[0].strip().rstrip("[").strip()


HERMES = Form(
    '<tool_call>\n{"name": "', '", "arguments": ', '}\n</tool_call>\n<tool_call>\n{"name": "', "}\n</tool_call>"
)
"""Where the template knows no calls."""


def find_form(renderer: Renderer) -> Form:
    """The form in which a model's chat template writes calls."""
    first = _around(renderer, 1)
    if first is None or len(first) != 3 or _ID in first[0] + first[1]:
        return HERMES
    opening, middle, closing = first
    both = _around(renderer, 2)
    return Form(opening, middle, both[2] if both and len(both) == 5 else None, closing)


def _around(renderer: Renderer, count: int) -> list[str] | None:
    """What the template writes before, between and after the names and arguments of so many calls; None where it takes
    no calls, or writes them otherwise than as JSON."""
    try:
        text = _rendered_calls(renderer, count)
    except Exception:  # whatever a template raises about a conversation that it does not know
        return None
    pieces, at = [], 0
    while (name := text.find(_NAME, at)) >= 0:
        start = text.find("{", name)
        try:
            found, stop = json.JSONDecoder().raw_decode(text, max(start, 0))
        except ValueError:
            return None
        if found != _ARGUMENTS:
            return None
        pieces += [text[at:name], text[name + len(_NAME) : start]]
        at = stop
    return [*pieces, text[at:].rstrip()] if pieces else None


def _rendered_calls(renderer: Renderer, count: int) -> str:
    """An answer of so many calls, up to its end-of-turn token."""
    question = {"role": "user", "content": "q"}
    calls = [{"id": _ID, "type": "function", "function": {"name": _NAME, "arguments": json.dumps(_ARGUMENTS)}}] * count
    prompt = renderer.prompt([question], _TOOLS)
    whole = renderer.prompt([question, {"role": "assistant", "content": None, "tool_calls": calls}], _TOOLS)
    text = whole[len(_common(prompt, whole)) :]
    ends = [str(renderer.tokenizer.convert_ids_to_tokens(i)) for i in renderer.stop_ids]
    return text[: min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))]


def _common(a: str, b: str) -> str:
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:size]


# --------------------------------------------------------------------------- forcing


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokenizer's control tokens: text → id."""
    return {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches any control token in a text."""
    names = sorted((name for name in control_tokens(tokenizer) if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def call_grammar(form: Form, tools: Sequence[Tool], tokenizer: PreTrainedTokenizerBase, parallel: bool) -> str:
    """A grammar of answers that call one of these tools, or several of them one after another."""
    names = [tool["function"]["name"] for tool in tools]

    def fixed(text: str) -> str:
        return _terminals(text, tokenizer)

    more = f"({fixed(form.joint)} call)*" if parallel and form.joint is not None else ""
    rules = ["%llguidance {}", f"start: {fixed(form.opening)} call {more} {fixed(form.closing)}"]
    rules.append("call: " + " | ".join(f"call{index}" for index in range(len(names))))
    for index, tool in enumerate(tools):
        function = tool["function"]
        schema = inline_schema(function.get("parameters"), bool(function.get("strict")))
        rules.append(f"call{index}: {fixed(names[index] + form.middle)} arguments{index}")
        rules.append(f"arguments{index}: {schema}")
    rules.append("CALL_ID: /[a-zA-Z0-9]{9}/")
    return lark_grammar("\n".join(rules))


def _terminals(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A fixed text as terminals of a grammar, its control tokens as tokens."""
    known, parts, at = control_tokens(tokenizer), [], 0
    for match in [*control_pattern(tokenizer).finditer(text), None]:
        plain = text[at : match.start() if match else len(text)]
        for number, piece in enumerate(plain.split(_ID)):
            parts += ["CALL_ID"] if number else []
            parts += [json.dumps(piece)] if piece else []
        if match:
            parts.append(f"<[{known[match.group()]}]>")
            at = match.end()
    return " ".join(parts)


# --------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Call:
    """A call found in an answer; `arguments` is JSON text."""

    name: str
    arguments: str

    def delta(self, index: int) -> ToolCallDelta:
        """For the client, under an id of its own."""
        letters = string.ascii_letters + string.digits
        return ToolCallDelta(
            index, "call_" + "".join(secrets.choice(letters) for _ in range(24)), self.name, self.arguments
        )


class ToolReader:
    """Parts an answer, as it comes, into what is said and the calls.

    Args:
        names: of the tools offered. Bare JSON is taken for a call only if it names one of them.
        forced: the whole answer is calls.
        control: matches control tokens, which are never said.
    """

    def __init__(self, form: Form, names: Sequence[str], forced: bool, parallel: bool, control: re.Pattern[str]):
        self._form, self._names, self._parallel, self._control = form, frozenset(names), parallel, control
        self._markers = tuple(dict.fromkeys(m for m in (form.marker, *_MARKERS) if m))
        self._text = ""
        self._holding = forced
        self._begun = False

    def feed(self, text: str) -> str:
        """Further text; returns what of it is said for certain."""
        self._text += text
        if not self._begun and self._text.lstrip()[:1] in ("{", "["):
            self._holding = True
        if self._holding:
            return ""
        at = min((at for marker in self._markers if (at := self._text.find(marker)) >= 0), default=None)
        self._holding = at is not None
        certain = self._certain() if at is None else len(self._text[:at].rstrip())
        said, self._text = self._text[:certain], self._text[certain:]
        self._begun |= bool(said)
        return self._control.sub("", said)

    def end(self) -> tuple[str, list[ToolCallDelta]]:
        """The answer is complete: (what is still to be said, the calls)."""
        calls = read_calls(self._text, self._form, self._names)
        if not calls:
            return self._control.sub("", self._text), []
        return "", [call.delta(index) for index, call in enumerate(calls if self._parallel else calls[:1])]

    def _certain(self) -> int:
        """How much of the text can be given out: no beginning of a marker, nor blanks that may stand before one."""
        text, starts = self._text, (marker[:n] for marker in self._markers for n in range(1, len(marker)))
        longest = max((len(start) for start in starts if text.endswith(start)), default=0)
        return len(text[: len(text) - longest].rstrip())


def read_calls(text: str, form: Form, names: frozenset[str]) -> list[Call]:
    """The calls that a text consists of; none if it is something else."""
    if calls := _by_form(text, form):
        return calls
    for marker in _MARKERS:
        if (at := text.find(marker)) >= 0:
            return _marked(text[at:], marker)
    found = _objects(text)
    if found is None or not all(call.name in names for call in found):
        return []
    return found


def _by_form(text: str, form: Form) -> list[Call]:
    opening = _THOUGHTS.sub("", form.opening).lstrip()
    at = text.find(opening)
    if at < 0 or (not form.marker and text[:at].strip()):
        return []
    at += len(opening)
    calls: list[Call] = []
    while True:
        name, middle, rest = text[at:].partition(form.middle)
        if not middle or len(name) > 256:
            return []
        try:
            value, stop = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict):
            return []
        calls.append(Call(name, _dumped(value)))
        rest = rest[stop:]
        following = None if form.joint is None else _after(rest, form.joint)
        if following is None:
            left = _after(rest, form.closing)
            ended = form.closing.startswith(rest.rstrip()) if left is None else not left.strip()
            return calls if ended else []
        at = len(text) - len(following)


def _after(rest: str, fixed: str) -> str | None:
    """What follows a fixed text that may hold a call's id; None where another text stands there."""
    before, there, after = fixed.partition(_ID)
    if not rest.startswith(before):
        return None
    rest = rest[len(before) :]
    if not there:
        return rest
    return rest[len(_ID) + len(after) :] if rest[len(_ID) :].startswith(after) else None


def _marked(text: str, marker: str) -> list[Call]:
    """Calls after markers: JSON objects, lists of them, or Mistral's name and arguments."""
    calls: list[Call] = []
    for part in text.split(marker)[1:]:
        if marker == "[TOOL_CALLS]" and (match := _MISTRAL_NAME.match(part)):
            try:
                value, _ = json.JSONDecoder().raw_decode(part, match.end())
            except (ValueError, RecursionError):
                return []
            calls.append(Call(match[1], _dumped(value)))
            continue
        found = _objects(re.sub(r"</tool_call>\s*$", "", part.strip()))
        if not found:
            return []
        calls += found
    return calls


def _objects(text: str) -> list[Call] | None:
    """Calls written as JSON objects one after another, or as a list; None if the text is anything else."""
    decoder, calls, at = json.JSONDecoder(), [], 0
    while at < len(text):
        if text[at] in " \n\r\t;,":
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        for entry in value if isinstance(value, list) else [value]:
            call = _as_call(entry)
            if call is None:
                return None
            calls.append(call)
    return calls or None


def _as_call(value: object) -> Call | None:
    if not isinstance(value, dict):
        return None
    if isinstance(inner := value.get("function"), dict):
        value = inner
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(name, str) or not name:
        return None
    if isinstance(arguments, str):
        try:
            json.loads(arguments)
        except ValueError:
            return None
        return Call(name, arguments)
    return Call(name, _dumped(arguments if arguments is not None else {}))


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
