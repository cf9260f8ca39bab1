"""A fine-tuning script as teams have them, written for OpenAI's API: upload, create, follow, ask.

    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 python examples/openai_script.py TRAIN.jsonl [VALIDATION.jsonl]

Nothing in it knows of tunery: `tunery serve --alias gpt-4o-mini=smollm2-135m-instruct` answers to the model's name.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from openai import OpenAI

MODEL = "gpt-4o-mini-2024-07-18"
QUESTION = "What is RAM?"
DONE = ("succeeded", "failed", "cancelled")

# A server on this machine asks for no key; OpenAI's own does, and the client insists on one.
client = OpenAI(api_key=os.environ.get("OPENAI_API_KEY") or "none-needed")


def upload(path: Path) -> str:
    """A file's id."""
    with path.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="fine-tune")
    print(f"uploaded {path} as {uploaded.id}, {uploaded.bytes:,} bytes")
    return uploaded.id


def ask(model: str) -> str:
    """The model's answer to QUESTION."""
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=60
    )
    return (answer.choices[0].message.content or "").strip()


def main() -> None:
    """The life of a job."""
    files = [upload(Path(name)) for name in sys.argv[1:3]]
    if not files:
        sys.exit(__doc__)
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=files[0],
        validation_file=files[1] if len(files) > 1 else None,
        suffix="help-desk",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
    )
    print(f"created {job.id}")
    seen: set[str] = set()
    while True:
        job = client.fine_tuning.jobs.retrieve(job.id)
        for event in reversed(list(client.fine_tuning.jobs.list_events(job.id, limit=100))):
            if event.id not in seen:
                seen.add(event.id)
                print(f"  {event.message}")
        if job.status in DONE:
            break
        time.sleep(2)
    if job.status != "succeeded" or job.fine_tuned_model is None:
        sys.exit(f"{job.id} {job.status}: {job.error.message if job.error else 'no reason given'}")
    for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id):
        print(f"checkpoint at step {checkpoint.step_number}: {checkpoint.fine_tuned_model_checkpoint}")
    for result in job.result_files:
        print(f"metrics by step: {len(client.files.content(result).text.splitlines()) - 1} lines in {result}")
    print(f"\n{QUESTION}\n{MODEL}: {ask(MODEL)}\n{job.fine_tuned_model}: {ask(job.fine_tuned_model)}")


if __name__ == "__main__":
    main()
