"""`tunery serve` as a person starts and stops it, over a tiny model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from tests.serve.contract.conftest import chat_rows
from tests.test_cli import tunery
from tests.tiny import save_tiny_llama


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    base = save_tiny_llama(tmp_path / "base")
    command = ["serve", "--base", str(base), "--alias", f"gpt-4o-mini={base}", "--port", "0", "--home", "home"]
    started = subprocess.Popen(
        [sys.executable, "-m", "tunery.cli", *command],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    yield started
    started.kill()
    started.wait()
    assert started.stderr is not None
    started.stderr.close()


def address(process: subprocess.Popen[str]) -> str:
    """What it says at its start: where the API is."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"OPENAI_BASE_URL=(\S+)", line):
            assert "OPENAI_API_KEY" in next(process.stderr)
            return found[1]
    raise AssertionError(f"it ended with {process.wait()}")


def the_page_is_complete(root: str) -> None:
    """The page, and every part that it or another part names, is there, with a policy that lets them run."""
    with httpx2.Client() as http:
        page = http.get(f"{root}/")
        assert page.headers["content-type"].startswith("text/html")
        assert "script-src" not in page.headers["content-security-policy"]  # default-src 'self' holds for scripts
        waiting, seen = set(re.findall(r'"(/web/[^"]+)"', page.text)), set[str]()
        assert len(waiting) > 2
        while waiting:
            name = waiting.pop()
            part = http.get(root + name)
            assert part.status_code == 200, name
            seen.add(name)
            if name.endswith(".js"):
                imported = {f"/web/{found}" for found in re.findall(r'from "\./([^"]+)"', part.text)}
                waiting |= imported - seen
        assert len(seen) > 5


def test_start_answer_refuse_a_second_one_and_stop(process: subprocess.Popen[str], tmp_path: Path) -> None:
    url = address(process)
    client = openai.OpenAI(base_url=url, api_key="anything")
    answer = client.chat.completions.create(
        model="gpt-4o-mini-2024-07-18", messages=[{"role": "user", "content": "hello"}], max_tokens=3
    )
    assert answer.choices[0].message.content is not None
    the_page_is_complete(url.removesuffix("/v1"))
    second = tunery("serve", "--base", "base", "--port", "0", "--home", "home", cwd=tmp_path)
    assert second.returncode == 2
    assert "--home" in second.stderr
    port = re.findall(r":(\d+)/", url)[0]
    third = tunery("serve", "--base", "base", "--port", port, "--home", "other", cwd=tmp_path)
    assert third.returncode == 2
    assert f"port {port}" in third.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) in (-signal.SIGTERM, 128 + signal.SIGTERM)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url)


def test_a_look_at_a_file(process: subprocess.Popen[str]) -> None:
    url = address(process)
    api = url.replace("/v1", "/api")
    client = openai.OpenAI(base_url=url, api_key="anything")
    good = client.files.create(file=("good.jsonl", chat_rows()), purpose="fine-tune").id
    bad = client.files.create(
        file=("bad.jsonl", chat_rows() + b'{"messages": [{"role": "user"}]}\n'), purpose="fine-tune"
    ).id
    few = client.files.create(file=("few.jsonl", chat_rows(3)), purpose="fine-tune").id
    none = client.files.create(file=("none.jsonl", b"\xff\xfe\x00 no text"), purpose="fine-tune").id
    with httpx2.Client(timeout=120) as http:
        asked = {"model": "gpt-4o-mini", "n_epochs": 2, "batch_size": 4}
        found = http.post(f"{api}/files/{good}/check", params=asked).json()
        assert found["problems"] == []
        assert (found["rows"], found["kind"], found["steps"]) == (12, "chat", 6)
        assert found["hyperparameters"] == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0}
        assert 0 < found["trained_tokens"] < found["tokens"]
        preview = found["previews"][0]
        assert preview["line"] >= 1
        trained = "".join(piece["text"] for piece in preview["pieces"] if piece["trained"])
        assert trained.startswith("the answer is good")
        assert "film" not in trained
        broken = http.post(f"{api}/files/{bad}/check", params=asked).json()
        assert [problem["line"] for problem in broken["problems"]] == [13] * len(broken["problems"])
        assert broken["problems"][0]["field"].startswith("messages")
        assert broken["problems_total"] == len(broken["problems"]) > 0
        assert broken["previews"]
        small = http.post(f"{api}/files/{few}/check", params=asked).json()
        assert "at least 10" in small["problems"][0]["message"]
        for_validation = http.post(f"{api}/files/{few}/check", params={**asked, "use": "validation"}).json()
        assert (for_validation["problems"], for_validation["rows"]) == ([], 3)
        empty = http.post(f"{api}/files/{none}/check", params=asked).json()
        assert empty["problems"][0]["field"] == "(file)"
        assert "previews" not in empty
        pairs = http.post(f"{api}/files/{good}/check", params={"model": "gpt-4o-mini", "method": "dpo"}).json()
        assert pairs["problems"]
        assert http.post(f"{api}/files/file-{'a' * 24}/check", params=asked).status_code == 404
        assert http.post(f"{api}/files/{good}/check", params={**asked, "model": "gpt-9"}).status_code == 404
        wrong = http.post(f"{api}/files/{good}/check", params={**asked, "n_epochs": 99})
        assert wrong.json()["error"]["param"] == "n_epochs"
