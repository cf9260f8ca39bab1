"""The Modelfile: its template, run as Ollama would run it, gives the chat template's own prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest

import tunery
from tests.export.runs import GEMMA_TEMPLATE, QUIET, byte_level, make_run, save_base, sentencepiece
from tests.tiny import CHATML
from tunery.data.render import Renderer
from tunery.errors import ConfigError
from tunery.export.targets.ollama import find_pieces, go_template, read_modelfile, unsayable
from tunery.models.templates import PLAIN_TEMPLATE

DEFAULT_SYSTEM = CHATML.replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}",
)

NO_SYSTEM = GEMMA_TEMPLATE.replace(
    "{% set first = messages[0]['content'] + '\n\n' %}", "{{ raise_exception('no system message') }}"
)

COUNTING = CHATML.replace("<|im_start|>{{ message['role'] }}", "<|im_start|>{{ loop.index }} {{ message['role'] }}")


def run_go(template: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """The few words of Go's template language that are used: if, else, range, end, eq, and, le, fields."""
    tokens = re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")

    def value(expression: str, scope: Mapping[str, Any]) -> Any:
        words = re.findall(r"\(.*?\)|\"[^\"]*\"|\S+", expression)
        if words[0] == "eq":
            return value(words[1], scope) == value(words[2], scope)
        if words[0] == "le":
            return value(words[1], scope) <= value(words[2], scope)
        if words[0] == "and":
            return value(words[1], scope) and value(words[2], scope)
        word = words[0]
        if word.startswith("("):
            return value(word[1:-1], scope)
        if word.startswith('"'):
            return word[1:-1]
        return int(word) if word.isdigit() else scope[word]

    def block(at: int, scope: Mapping[str, Any], live: bool) -> tuple[str, int, str]:
        out = ""
        while at < len(tokens):
            token = tokens[at]
            if not token.startswith("{{"):
                out, at = out + (token if live else ""), at + 1
                continue
            word = token[2:-2].strip()
            if word == "end" or word.startswith("else"):
                return out, at, word
            if word.startswith("if "):
                text, at = branches(at, word[3:], scope, live)
                out += text
            elif word.startswith("range "):
                start, text = at + 1, ""
                for index, message in enumerate(messages if live else ()):
                    inner = {".Role": message["role"], ".Content": message["content"], "$i": index, "$.System": system}
                    text += block(start, inner, True)[0]
                _, at, _ = block(start, scope, False)
                out, at = out + text, at + 1
            else:
                out, at = out + (str(value(word, scope)) if live else ""), at + 1
        return out, at, "end"

    def branches(at: int, condition: str, scope: Mapping[str, Any], live: bool) -> tuple[str, int]:
        out, done, word = "", not live, f"if {condition}"
        while True:
            taken = not done and (word == "else" or bool(value(word.split("if ", 1)[1], scope)))
            text, at, word = block(at + 1, scope, taken)
            out, done = out + text, done or taken
            if word == "end":
                return out, at + 1

    return block(0, {".System": system}, True)[0]


def said(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} says {i} {{x}}"} for i, role in enumerate(roles)]


CONVERSATIONS = (
    said("user"),
    said("user", "assistant", "user"),
    said("system", "user"),
    said("system", "user", "assistant", "user", "assistant", "user"),
)


@pytest.mark.parametrize(
    ("template", "tokenizer", "system"),
    [
        (CHATML, byte_level, True),
        (DEFAULT_SYSTEM, byte_level, True),
        (PLAIN_TEMPLATE, byte_level, True),
        (GEMMA_TEMPLATE, sentencepiece, True),
        (NO_SYSTEM, sentencepiece, False),
    ],
)
def test_the_modelfiles_template_gives_the_same_prompts(
    template: str, tokenizer: Callable[[], Any], system: bool
) -> None:
    made = tokenizer()
    made.chat_template = template
    renderer = Renderer(made)
    pieces = find_pieces(renderer)
    assert pieces is not None
    assert (pieces.system or pieces.system_in_user) is not None or not system
    for messages in CONVERSATIONS:
        if messages[0]["role"] == "system" and not system:
            continue
        prompt = renderer.prompt(messages)
        assert pieces.render(messages) == prompt
        assert run_go(go_template(pieces), messages) == prompt


def test_the_token_that_ollama_puts_in_front_is_left_out() -> None:
    pieces = find_pieces(Renderer(sentencepiece()))
    assert pieces is not None
    assert run_go(go_template(pieces.without("<bos>")), said("user")).startswith("<start_of_turn>user\n")


def test_a_template_that_does_more_is_not_said_in_a_modelfile(tmp_path: Path) -> None:
    tokenizer = byte_level(template=COUNTING)
    assert find_pieces(Renderer(tokenizer)) is None
    base = save_base(tmp_path / "base", "llama")
    byte_level("smollm", COUNTING).save_pretrained(base)
    run = make_run(tmp_path, base)
    with pytest.raises(ConfigError, match="more than a Modelfile's template can say"):
        tunery.export_run(run, "ollama", out=tmp_path / "out", device="cpu", progress=QUIET)
    assert not (tmp_path / "out").exists()
    tunery.export_run(run, "gguf", out=tmp_path / "out", device="cpu", progress=QUIET)


@pytest.mark.parametrize("system", ['Say """ always.', 'Say "yes"'])
def test_a_system_message_that_would_end_its_own_quotes(system: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, save_base(tmp_path / "base", "llama"), "chat", f"data.system={system!r}")
    (found,) = tunery.check_destinations(run / "task.yaml", ["ollama"])
    assert found.refused
    with pytest.raises(ConfigError, match="the system message holds"):
        tunery.export_run(run, "ollama", out=tmp_path / "out", device="cpu", progress=QUIET)


def test_a_stop_token_with_a_quote() -> None:
    tokenizer = byte_level()
    assert unsayable(Renderer(tokenizer), "Be brief.") is None
    tokenizer.add_special_tokens({"eos_token": '<"end">'})
    assert "stop token" in str(unsayable(Renderer(tokenizer), None))


def test_a_modelfile_is_read_as_ollama_reads_it() -> None:
    text = 'FROM ./m.gguf\nTEMPLATE """a "b"\n{{ .Prompt }}"""\nPARAMETER stop "<|e|>"\nPARAMETER num_ctx 8\n'
    assert read_modelfile(text) == [
        ("FROM", "./m.gguf"),
        ("TEMPLATE", 'a "b"\n{{ .Prompt }}'),
        ("PARAMETER stop", "<|e|>"),
        ("PARAMETER num_ctx", "8"),
    ]
    assert read_modelfile('SYSTEM """a """ b"""\n') is None


def test_an_answer_ends_at_the_trained_token_in_every_form(tmp_path: Path) -> None:
    """The base ends a text with another token than its chat template ends a turn with, and knows only the first."""
    base = save_base(tmp_path / "base", "llama")
    tokenizer = byte_level("smollm")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    (base / "generation_config.json").write_text('{"eos_token_id": 0}')
    run = make_run(tmp_path, base)
    assert json.loads((run / "receipt.json").read_text())["tokens"]["end_of_turn_token"] == "<|im_end|>"
    merged, ollama = (
        tunery.export_run(run, to, out=tmp_path / to, device="cpu", progress=QUIET).path for to in ("merged", "ollama")
    )
    assert json.loads((merged / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    lines = (ollama / "Modelfile").read_text().splitlines()
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert 'PARAMETER stop "<|endoftext|>"' in lines
    fields = gguf.GGUFReader(ollama / "model.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 2
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0


def test_parameters_and_the_runs_system_message(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    (base / "generation_config.json").write_text('{"temperature": 0.3}')
    run = make_run(tmp_path, base, "chat", "data.system=Be brief.")
    done = tunery.export_run(run, "ollama", out=tmp_path / "out", device="cpu", progress=QUIET)
    lines = (done.path / "Modelfile").read_text().splitlines()
    assert 'SYSTEM """Be brief."""' in lines
    assert lines[-3:] == ['PARAMETER stop "<|im_end|>"', "PARAMETER temperature 0.3", "PARAMETER num_ctx 256"]
    assert any("Ollama itself was not run" in note for note in done.record["notes"])
    card = (done.path / "README.md").read_text()
    assert "ollama create films -f Modelfile" in card
