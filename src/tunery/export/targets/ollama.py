"""The GGUF file with a Modelfile for Ollama.

Ollama does not run the chat template inside a GGUF file. It compares it with the templates it knows, takes its own
version of one that is alike, and of the others passes the bare text on. So the template is written into the Modelfile,
in Go's template language. That is possible where a template does nothing but put fixed texts around each message: the
texts are found by rendering conversations whose contents are marks, and are then held against the real template on the
held-out rows. Where they do not give the same prompt, no Modelfile is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunery.errors import ConfigError, TuneryError
from tunery.export.targets.base import Remark
from tunery.export.targets.gguf import Gguf
from tunery.jsonl import JsonMapping, JsonObject

if TYPE_CHECKING:
    from tunery.data.render import Renderer
    from tunery.export.destinations import Wanted
    from tunery.export.subject import Prompt, Sample, Subject


FILE = "Modelfile"
MODEL = "model.gguf"

CONTEXT = 8192
"""Largest context that is asked for; Ollama sets memory aside for all of it."""

_MARKS = ("⟪s⟫", "⟪u⟫", "⟪a⟫", "⟪v⟫")


class Ollama(Gguf):
    """A folder for `ollama create`."""

    name = "ollama"
    about = "the GGUF file with a Modelfile"
    files = ("*.gguf", FILE)
    default_dtype = "q8_0"

    def remarks(self, wanted: Wanted) -> list[Remark]:
        from tunery.data.render import Renderer

        found = super().remarks(wanted)
        renderer = Renderer(wanted.tokenizer)
        if words := unsayable(renderer, wanted.system):
            found.append((True, f"{words}: use --to gguf"))
        if wanted.tokenizer.chat_template and find_pieces(renderer) is None:
            found.append((True, "the chat template does more than a Modelfile's template can say: use --to gguf"))
        return found

    def prepare(self, subject: Subject, sample: Sample) -> None:
        if subject.kind.templated:
            pieces_of(subject, sample.prompts)

    def write(self, subject: Subject, sample: Sample, dtype: str, folder: Path) -> list[str]:
        from tunery.export.gguf_file import write_model
        from tunery.export.gguf_types import numbers_of

        write_model(subject, folder / MODEL, numbers_of(dtype))
        return write_modelfile(subject, sample, folder)


# --------------------------------------------------------------------------- Modelfile


@dataclass(frozen=True)
class Pieces:
    """The fixed texts that a chat template puts around messages.

    Attributes:
        alone: before the first message where there is no system message (a beginning, a default system message).
        system: before and after a system message that stands at the front; None if the template takes none.
        system_in_user: the system message stands inside the first user message, with this text after it.
        user, assistant: before and after such a message.
        ask: after which the model answers.
    """

    alone: str
    system: tuple[str, str] | None
    system_in_user: str | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    ask: str

    def render(self, messages: Sequence[JsonMapping]) -> str:
        """What the Modelfile's template makes of a conversation."""
        said = [m["content"] for m in messages if m["role"] == "system"]
        text = self.alone
        if said and self.system:
            text = self.system[0] + "\n\n".join(said) + self.system[1]
        rest = [m for m in messages if m["role"] != "system"]
        for number, message in enumerate(rest):
            before, after = self.user if message["role"] == "user" else self.assistant
            inside = ""
            if number == 0 and said and self.system_in_user is not None:
                inside = "\n\n".join(said) + self.system_in_user
            text += before + inside + message["content"] + after
        return text + self.ask

    def without(self, beginning: str) -> Pieces:
        """The same without the text of a token that Ollama puts before every prompt itself."""
        system = self.system and (self.system[0].removeprefix(beginning), self.system[1])
        return Pieces(
            self.alone.removeprefix(beginning), system, self.system_in_user, self.user, self.assistant, self.ask
        )


def find_pieces(renderer: Renderer) -> Pieces | None:
    """The fixed texts of the run's chat template; None where it is made of more than those."""
    s, u, a, v = _MARKS
    ask, tell, more = _message("user", u), _message("assistant", a), _message("user", v)
    try:
        question = renderer.prompt([ask])
        turns = renderer.prompt([ask, tell, more])
        with_system = _rendered(renderer, [_message("system", s), ask, tell, more])
        plain, answered = _told(renderer, [ask, tell, more]), _told(renderer, [ask, tell])
    except Exception:  # whatever a template raises where it refuses these conversations
        return None
    if not turns.startswith(plain) or any(text.count(mark) != 1 for text in (turns,) for mark in (u, a, v)):
        return None
    before_u, rest = turns.split(u)
    between_ua, rest = rest.split(a)
    between_av, tail = rest.split(v)
    asked, after_v = turns[len(plain) :], plain.split(v)[1]
    after_a = answered.split(a)[1] if answered.count(a) == 1 else None
    if after_a is None or not between_ua.startswith(after_v) or not between_av.startswith(after_a):
        return None
    before_v = between_av[len(after_a) :]
    if not before_u.endswith(before_v) or tail != after_v + asked or not question.endswith(after_v + asked):
        return None
    alone = before_u[: len(before_u) - len(before_v)]
    system, inside = _system_pieces(with_system, s, u, alone, before_v)
    return Pieces(alone, system, inside, (before_v, after_v), (between_ua[len(after_v) :], after_a), asked)


def _message(role: str, content: str) -> JsonObject:
    return {"role": role, "content": content}


def _told(renderer: Renderer, messages: Sequence[JsonMapping]) -> str:
    """A conversation without the text after which the model answers."""
    return str(renderer.tokenizer.apply_chat_template(renderer.plain(messages), tokenize=False))


def _rendered(renderer: Renderer, messages: Sequence[JsonMapping]) -> str | None:
    try:
        return renderer.prompt(messages)
    except TuneryError:  # some templates take no system message
        return None


def _system_pieces(
    text: str | None, s: str, u: str, alone: str, before_user: str
) -> tuple[tuple[str, str] | None, str | None]:
    """(texts around a system message at the front, text after one inside the first user message)"""
    if text is None or text.count(s) != 1 or text.count(u) != 1 or text.index(s) > text.index(u):
        return None, None
    before, after = text.split(u)[0].split(s)
    if after.endswith(before_user):
        return (before, after[: len(after) - len(before_user)]), None
    if before == alone + before_user:
        return None, after
    return None, None


def write_modelfile(subject: Subject, sample: Sample, folder: Path) -> list[str]:
    """Write the Modelfile.

    Returns:
        What a person should know: what of the template it does not do.

    Raises:
        ConfigError: the run's template cannot be said in a Modelfile.
    """
    notes, template, system = [], "{{ .Prompt }}", None
    if subject.kind.templated:
        pieces = pieces_of(subject, sample.prompts)
        template, system = go_template(pieces), subject.task.data.system
        notes = _limits(subject, pieces)
    commands = [("FROM", f"./{MODEL}"), ("TEMPLATE", template), *([("SYSTEM", system)] if system else [])]
    commands += _parameters(subject)
    (folder / FILE).write_text(
        "".join(f"{name} {_quoted(name, value)}\n" for name, value in commands), encoding="utf-8"
    )
    if read_modelfile((folder / FILE).read_text(encoding="utf-8")) != commands:
        raise ConfigError("a text of this run cannot be said in a Modelfile", _HINT)
    return notes


def _quoted(name: str, value: str) -> str:
    """As Ollama reads it: what stands in quotes is taken as it is, there are no escapes."""
    quotes = {"TEMPLATE": '"""', "SYSTEM": '"""', "PARAMETER stop": '"'}.get(name, "")
    return f"{quotes}{value}{quotes}"


_COMMAND = re.compile(
    r'(FROM|TEMPLATE|SYSTEM|PARAMETER \w+) (?:"""((?:(?!""").)*)"""|"([^"\n]*)"|([^"\n]*))\n',
    re.DOTALL,
)


def read_modelfile(text: str) -> list[tuple[str, str]] | None:
    """The commands of a Modelfile, as Ollama reads those that are written here; None where there is anything else."""
    commands, place = [], 0
    while place < len(text):
        match = _COMMAND.match(text, place)
        if match is None:
            return None
        commands.append((match[1], next(value for value in match.groups()[1:] if value is not None)))
        place = match.end()
    return commands


def unsayable(renderer: Renderer, system: str | None) -> str | None:
    """What of a run besides its template has no form in a Modelfile, in words; None if all has."""
    if system and ('"""' in system or system.endswith('"')):
        return 'the system message holds """, or ends with ", which ends a text in a Modelfile'
    odd = [token for token in _stop_tokens(renderer) if re.search(r'["\\\n]', token)]
    return f"the stop token {odd[0]!r} holds signs that mean something else in a Modelfile" if odd else None


_HINT = "use --to gguf with llama.cpp, which runs the template itself; or write a Modelfile by hand"


def pieces_of(subject: Subject, prompts: Sequence[Prompt]) -> Pieces:
    """The fixed texts of the run's template, held against it.

    Raises:
        ConfigError: they do not give the prompts that the template gives.
    """
    from tunery.export.gguf_tokenizer import begins_with_bos

    pieces = find_pieces(subject.renderer)
    if pieces is None:
        raise ConfigError("the chat template does more than a Modelfile's template can say", _HINT)
    if any('"""' in text or "{{" in text for text in _texts(pieces)):
        raise ConfigError("the chat template holds signs that mean something else in a Modelfile", _HINT)
    for prompt in prompts:
        sayable = not prompt.tools and all(
            m["role"] in ("system", "user", "assistant") and isinstance(m["content"], str) for m in prompt.messages
        )
        if sayable and pieces.render(prompt.messages) != prompt.text:
            raise ConfigError("the chat template does more than a Modelfile's template can say", _HINT)
    bos = str(subject.tokenizer.bos_token or "")
    return pieces.without(bos) if bos and begins_with_bos(subject.renderer, templated=True) else pieces


def _texts(pieces: Pieces) -> list[str]:
    return [
        pieces.alone,
        *(pieces.system or ()),
        pieces.system_in_user or "",
        *pieces.user,
        *pieces.assistant,
        pieces.ask,
    ]


def go_template(pieces: Pieces) -> str:
    """The pieces in Go's template language, as Ollama fills it: .System is all system messages, .Messages all of
    them, system messages among them."""
    if pieces.system:
        head = f"{{{{ if .System }}}}{pieces.system[0]}{{{{ .System }}}}{pieces.system[1]}"
        head += f"{{{{ else }}}}{pieces.alone}{{{{ end }}}}" if pieces.alone else "{{ end }}"
    else:
        head = pieces.alone
    inside = ""
    if pieces.system_in_user is not None:  # the system message is number 0, so the first user message is number 1
        inside = f"{{{{ if and $.System (le $i 1) }}}}{{{{ $.System }}}}{pieces.system_in_user}{{{{ end }}}}"
    user = f"{pieces.user[0]}{inside}{{{{ .Content }}}}{pieces.user[1]}"
    assistant = f"{pieces.assistant[0]}{{{{ .Content }}}}{pieces.assistant[1]}"
    turns = (
        f'{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
        f'{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}'
    )
    return head + turns + pieces.ask


def _limits(subject: Subject, pieces: Pieces) -> list[str]:
    notes = ["Ollama itself was not run: its template was held against the model's own on the same rows"]
    if pieces.system is None and pieces.system_in_user is None:
        notes.append("the chat template takes no system message, so a SYSTEM in Ollama has no effect")
    if "tools" in str(subject.tokenizer.chat_template):
        notes.append("the Modelfile's template has no tools")
    return notes


def _stop_tokens(renderer: Renderer) -> list[str]:
    return [str(renderer.tokenizer.convert_ids_to_tokens(i)) for i in renderer.stop_ids]


def _parameters(subject: Subject) -> list[tuple[str, str]]:
    context = int(getattr(subject.config, "max_position_embeddings", CONTEXT))
    return [
        *(("PARAMETER stop", token) for token in _stop_tokens(subject.renderer)),
        ("PARAMETER temperature", str(0 if subject.kind.labelled else _temperature(subject))),
        ("PARAMETER num_ctx", str(min(context, CONTEXT))),
    ]


def _temperature(subject: Subject) -> float:
    """As the base's release recommends; else that of plain sampling."""
    file = subject.source.folder / "generation_config.json"
    try:
        value = json.loads(file.read_text(encoding="utf-8")).get("temperature")
    except (OSError, ValueError, AttributeError):
        value = None
    return float(value) if isinstance(value, int | float) else 0.7
