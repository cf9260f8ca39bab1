"""The server that the official client talks to: once over stand-ins, once over the real parts."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serve.echo import EchoBackend
from tests.serve.fakes import FakeFiles, FakeJobs, FakeRegistry
from tests.serve.running import Running, running
from tests.tiny import save_tiny_llama, tiny_tokenizer
from tunery.serve.app import make_parts
from tunery.serve.server_settings import make_settings

ALIAS = "gpt-4o-mini"

_CHATML_WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session", params=["stand-ins", "real"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with one base under the name gpt-4o-mini."""
    home = tmp_path_factory.mktemp(f"contract-{request.param}")
    if request.param == "stand-ins":
        settings = make_settings(bases=("tiny",), aliases={ALIAS: "tiny"}, home=home)
        files, registry = FakeFiles(home / "files"), FakeRegistry(settings.bases, dict(settings.aliases))
        jobs = FakeJobs(files, registry, home / "jobs")
        with running(settings, jobs, files, registry, EchoBackend()) as found:
            yield found
        return
    base = save_tiny_llama(home / "base", tiny_tokenizer(_CHATML_WITH_TOOLS))
    settings = make_settings(bases=(str(base),), aliases={ALIAS: str(base)}, home=home)
    with contextlib.ExitStack() as stack, running(settings, *make_parts(settings, stack)) as found:
        yield found


@pytest.fixture(scope="session")
def client(server: Running) -> openai.OpenAI:
    """The official client, as strict as it can be."""
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="anything", max_retries=0, _strict_response_validation=True
    )


@pytest.fixture(scope="session")
def lenient(server: Running) -> openai.OpenAI:
    """The official client with its defaults."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="anything", max_retries=0)


def async_client(server: Running) -> openai.AsyncOpenAI:
    """The asynchronous client, as strict; it belongs to the event loop it is first used in."""
    return openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="anything", max_retries=0, _strict_response_validation=True
    )


def chat_rows(count: int = 12, reply: str = "the answer is good") -> bytes:
    """A small training file."""
    rows = [
        {"messages": [{"role": "user", "content": f"film {n}?"}, {"role": "assistant", "content": f"{reply} {n}"}]}
        for n in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def wait_for(client: openai.OpenAI, job_id: str, seconds: float = 600) -> Any:
    """The job, once it has ended."""
    end = time.monotonic() + seconds
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        assert time.monotonic() < end, f"{job_id} is still {job.status}"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def trained(client: openai.OpenAI, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A job that has succeeded, with a validation file, a suffix and metadata."""
    path: Path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    path.write_bytes(chat_rows())
    training = client.files.create(file=path, purpose="fine-tune")
    validation = client.files.create(file=("valid.jsonl", chat_rows(4, "a dull film")), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=ALIAS,
        training_file=training.id,
        validation_file=validation.id,
        suffix="my films",
        seed=3,
        metadata={"team": "films", "run": "1"},
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5},
            },
        },
    )
    assert job.status in ("validating_files", "queued")
    done = wait_for(client, job.id)
    assert done.status == "succeeded", done.error
    return done


@pytest.fixture(scope="session")
def older(client: openai.OpenAI) -> Any:
    """A job that has succeeded, its hyperparameters in their older place; its model may be deleted."""
    file = client.files.create(file=("rows.jsonl", chat_rows()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=ALIAS, training_file=file.id, hyperparameters={"n_epochs": 1, "batch_size": "auto"}
    )
    done = wait_for(client, job.id)
    assert done.status == "succeeded", done.error
    return done
