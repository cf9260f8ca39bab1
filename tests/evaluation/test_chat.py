"""A conversation at a real terminal: what Ctrl-C, Ctrl-D and odd answers do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import tunery
from tests.support.terminal import CTRL_C, CTRL_D, terminal
from tests.tiny import tiny_llama_config, tiny_tokenizer
from tunery.console import Console


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model never ends an answer by itself, and says control characters."""
    root = tmp_path_factory.mktemp("talkative")
    tokenizer = tiny_tokenizer()
    config = tiny_llama_config(len(tokenizer), 64)
    config.max_position_embeddings = 4096
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[2] = 0  # the largest of so many other logits is above 0
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    turns = [{"role": "user", "content": "how is it?"}, {"role": "assistant", "content": "fine"}]
    (root / "rows.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)))
    task = {
        "name": "talk",
        "model": str(root / "base"),
        "output": str(root / "runs"),
        "data": {"train": str(root / "rows.jsonl"), "validation": None},
        "train": {"max_steps": 1, "learning_rate": 1e-6, "precision": "float32"},
    }
    (root / "task.yaml").write_text(json.dumps(task))
    return tunery.train(root / "task.yaml", progress=Console(quiet=True)).path


def test_ctrl_c_ends_the_answer_and_not_the_chat(talkative: Path) -> None:
    with terminal(["chat", str(talkative), "--max-new-tokens", "4000"], talkative) as chat:
        chat.expect("tuned> ")
        for _ in range(2):
            chat.type("hello\n")
            chat.expect("hello\r\n.")
            chat.type(CTRL_C)
            chat.expect(r"\(ended\)\r\n\r\ntuned> ")
        chat.type("/both\n")
        chat.expect(r"base\+tuned> ")
        chat.type("and now?\n")
        chat.expect(r"\[base\] .")
        chat.type(CTRL_C)
        assert "[tuned]" not in chat.expect(r"\(ended\)\r\n\r\nbase\+tuned> ")
        chat.type(CTRL_D)
        assert chat.wait() == 0
    assert "terminate called" not in chat.seen
    assert "Traceback" not in chat.seen


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_then_leaves(talkative: Path) -> None:
    with terminal(["chat", str(talkative)], talkative) as chat:
        chat.expect("tuned> ")
        chat.type(CTRL_C)
        chat.expect(r"Ctrl-D or /quit leaves.*\r\n\r\ntuned> ")
        chat.type("/help\n")
        chat.expect("Ctrl-C ends an answer\r\n\r\ntuned> ")
        chat.type(CTRL_C)
        chat.expect("tuned> ")
        chat.type(CTRL_C)
        assert chat.wait() == 0
    with terminal(["chat", str(talkative)], talkative) as chat:
        chat.expect("tuned> ")
        chat.type("/exit\n")
        assert chat.wait() == 0


def test_what_a_model_says_does_not_steer_the_terminal(talkative: Path) -> None:
    with terminal(["chat", str(talkative), "--temperature", "9", "--max-new-tokens", "600"], talkative) as chat:
        chat.expect("tuned> ")
        chat.type("hello\n")
        answer = chat.expect(r"\r\n\r\ntuned> ")
        chat.type(CTRL_D)
        chat.wait()
    spoken = {character for character in answer if unicodedata.category(character) == "Cc"}
    assert spoken <= set("\r\n\t")
    assert "�" in answer


def test_an_interrupted_answer_to_piped_questions_ends_the_command(talkative: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tunery", "chat", str(talkative), "--max-new-tokens", "4000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        assert chat.stderr is not None
        chat.stdin.write(b"hello\nhello again\n")
        chat.stdin.close()
        chat.stdout.readline()  # who answers
        chat.stdout.read(20)
        chat.send_signal(signal.SIGINT)
        chat.stdout.read()
        told = chat.stderr.read().decode()
    assert chat.returncode == 130, told
    assert told.strip() == "tunery: interrupted"
