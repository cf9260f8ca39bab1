"""`make demo-migrate`: a model tuned on a server, captured, the server stopped, and the model trained anew here.

    python examples/demo_migrate.py TRAIN.csv HELD_OUT.csv

`tunery serve` stands in for OpenAI: it answers to gpt-4o-mini. The rows are the reviews of examples/sentiment.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from demo_api import ALIAS, SERVER, free_port, wait_for
from openai import OpenAI

HOME = Path("runs/demo-migrate-server")
OUT = Path("runs/demo-migrate")
MODEL, HERE = "gpt-4o-mini-2024-07-18", "smollm2-135m-instruct"
QUESTION = "Is the sentiment of this movie review positive or negative? Answer with one word."
WORDS = {"0": "negative", "1": "positive"}
TRAINED, HELD_OUT = 480, 120


def write_rows(table: Path, target: Path, rows: int) -> Path:
    """The first rows of a CSV of reviews, in OpenAI's form."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with table.open(encoding="utf-8", newline="") as source, target.open("w", encoding="utf-8") as file:
        for row, _ in zip(csv.DictReader(source), range(rows), strict=False):
            asked = {"role": "user", "content": f"{QUESTION}\n\n{row['text']}"}
            answer = {"role": "assistant", "content": WORDS[row["label"]]}
            file.write(json.dumps({"messages": [asked, answer]}) + "\n")
    return target


def tune(client: OpenAI, files: list[Path]) -> str:
    """Have a model tuned, as any script would; the job's id."""
    sent = [client.files.create(file=path.open("rb"), purpose="fine-tune").id for path in files]
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=sent[0],
        validation_file=sent[1],
        suffix="reviews",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 16}}},
    )
    print(f"the server tunes {job.id}", flush=True)
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    if job.status != "succeeded":
        sys.exit(f"{job.id} {job.status}: {job.error.message if job.error else 'no reason given'}")
    return job.id


def tunery(*arguments: str, **environment: str) -> None:
    """Run a command, shown as one would type it."""
    shown = " ".join(f"{name}={value}" for name, value in environment.items())
    print(f"\n$ {f'{shown} ' if shown else ''}tunery {' '.join(arguments)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "tunery.cli", *arguments], env={**os.environ, **environment}, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Tune there, capture, stop the server, train here."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    for left in (HOME, OUT):
        shutil.rmtree(left, ignore_errors=True)
    files = [
        write_rows(Path(sys.argv[1]), HOME / "rows" / "train.jsonl", TRAINED),
        write_rows(Path(sys.argv[2]), HOME / "rows" / "held-out.jsonl", HELD_OUT),
    ]
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([*SERVER, "--alias", ALIAS, "--port", str(port), "--home", str(HOME)])
    try:
        wait_for(server, address)
        job = tune(OpenAI(base_url=f"{address}/v1", api_key="none-needed"), files)
        tunery("migrate", job, "--capture-only", "--out", str(OUT), "--yes", OPENAI_BASE_URL=f"{address}/v1")
    finally:
        server.terminate()
        server.wait(timeout=60)
    print("\nthe server is gone; what was captured is enough", flush=True)
    tunery("migrate", str(OUT), "--to", HERE)


if __name__ == "__main__":
    main()
