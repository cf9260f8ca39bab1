"""A server without HTTP, to be killed: `python -m tests.serve.torture.drive HOME BASE`.

It goes on with the job that it finds in HOME, creates one if there is none that is unfinished, and ends when that is
done. The last line of its output is the job's id and status.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.serve.jobs.conftest import QUICK
from tests.serve.jobs.world import World, chat_rows
from tunery.serve.records import FINAL, Job

SEED = 7
STEPS = 150


def main() -> None:
    """Serve until the job is done."""
    home, base = Path(sys.argv[1]), sys.argv[2]
    with World(home, base, defaults=QUICK) as world:
        jobs = world.store.list(Job).data
        job = jobs[0] if jobs and jobs[0].status not in FINAL else new_job(world)
        while (now := world.jobs.get(job.id)).status not in FINAL:
            time.sleep(0.05)
    sys.stdout.write(f"{now.id} {now.status}\n")


def new_job(world: World) -> Job:
    """A job of 150 short steps."""
    return world.create(
        world.upload(chat_rows(24)),
        validation_file=world.upload(chat_rows(4, start=100)),
        seed=SEED,
        hyperparameters={"n_epochs": 50, "batch_size": 8},
    )


if __name__ == "__main__":
    main()
