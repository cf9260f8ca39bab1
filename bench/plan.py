"""What is compared: the peers, the workloads, the settings that hold for all, and the speeds to reach."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODEL = "smollm2-135m-instruct"
RANK = 16
ALPHA = 32.0
SEED = 0
MAX_GRAD_NORM = 1.0
BETA = 0.1

REPEATS = 3
"""Timed steps of each program, after one to warm up."""

CHECK_STEPS = 2
"""Steps in float32 whose losses must agree before anything is timed."""

AGREEMENT_FLOAT32 = 1e-3
"""Largest relative difference of any step's loss in float32."""

AGREEMENT = 5e-2
"""Largest mean difference of the loss curves in the format that is timed, over their mean."""


@dataclass(frozen=True)
class Peer:
    """A program to compare with.

    Attributes:
        name: as in --peers.
        title: as in the table.
        environment: which virtual environment it runs in; "" is the one that runs this script (tunery's).
        module: under bench.peers.
        arguments: further ones for the module.
        kinds: of workloads it can train.
    """

    name: str
    title: str
    environment: str
    module: str
    arguments: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("rows",)


TUNERY = Peer("tunery", "tunery", "", "with_tunery", kinds=("rows", "pairs"))
PEERS = (
    Peer("trl-defaults", "TRL + PEFT, its defaults", "trl", "with_trl", ("--variant", "defaults"), ("rows", "pairs")),
    Peer("trl-tuned", "TRL + PEFT, tuned by hand", "trl", "with_trl", ("--variant", "tuned"), ("rows", "pairs")),
    Peer("peft", "PEFT in a bare loop", "peft", "with_peft"),
    Peer("litgpt", "LitGPT", "litgpt", "with_litgpt"),
    Peer("unsloth", "Unsloth", "unsloth-cpu", "with_unsloth", kinds=("rows", "pairs")),
)
NAMES = tuple(peer.name for peer in PEERS)


@dataclass(frozen=True)
class Plan:
    """One workload.

    Attributes:
        data: which rows (bench.workloads.SOURCES).
        kind: "rows" or "pairs".
        learning_rate: lower for pairs, as is usual.
        about: what it stands for, in a sentence of the report.
        speed_goal: how many times as fast as every peer tunery is to be; 1 where all is trained and nothing shared.
        share_goal: dtype → the part of the matmul rate to reach.
        micro_batch: peer → rows computed at a time where it is not the whole batch; the one that took the least
            processor time of those tried for TRL, PEFT and Unsloth (LitGPT: as PEFT).
    """

    name: str
    title: str
    data: str
    kind: str
    batch_size: int
    about: str
    learning_rate: float = 2e-4
    speed_goal: float = 2.0
    share_goal: dict[str, float] = field(default_factory=lambda: {"bfloat16": 0.7, "float32": 0.85})
    micro_batch: dict[str, int] = field(default_factory=dict)


SENTIMENT = "Film reviews as chat rows, the task of examples/sentiment: every row has the same instruction in front."
WORKLOADS = (
    Plan(
        "classification-16",
        "Templated classification, batch 16",
        "classification",
        "rows",
        16,
        SENTIMENT,
        share_goal={"bfloat16": 0.6, "float32": 0.8},
        micro_batch={"trl-tuned": 8, "peft": 8, "litgpt": 8, "unsloth": 4},
    ),
    Plan(
        "classification-64",
        "Templated classification, batch 64",
        "classification",
        "rows",
        64,
        SENTIMENT,
        micro_batch={"trl-tuned": 8, "peft": 8, "litgpt": 8, "unsloth": 8},
    ),
    Plan(
        "long-text",
        "Long free text, batch 8",
        "long-text",
        "rows",
        8,
        "IMDB reviews as plain text (kind `text`, what one does to teach a style): every token is trained, nothing is "
        "shared. Cut at 512 tokens; the rest of a longer review is a further row.",
        speed_goal=1.0,
        micro_batch={"trl-tuned": 2, "peft": 2, "litgpt": 2, "unsloth": 1},
    ),
    Plan(
        "chat",
        "Chat with a long system prompt, batch 16",
        "chat",
        "rows",
        16,
        "The conversations of examples/support-chat under a system prompt of a help desk (bench/help-desk.txt).",
        micro_batch={"trl-tuned": 4, "peft": 4, "litgpt": 4, "unsloth": 1},
    ),
    Plan(
        "preference",
        "Preference pairs, batch 8",
        "preference",
        "pairs",
        8,
        "DPO. The first sentences of an IMDB review with the order to continue it; the better answer is how it goes "
        "on, the worse one how another review goes on. The two answers of a pair share their prompt, different pairs "
        "only the order's few words.",
        learning_rate=5e-5,
        micro_batch={"trl-tuned": 2, "unsloth": 2},
    ),
)
CHECKS = (
    Plan("check-rows", "Losses in float32", "mixture", "rows", 4, "Film reviews as chat rows and short texts.", 2e-4),
    Plan("check-pairs", "DPO losses in float32", "preference", "pairs", 2, "Two pairs a step.", 1e-3),
)


def peers_of(plan: Plan, wanted: tuple[str, ...] = NAMES) -> list[Peer]:
    """The peers that can train this workload, tunery left out."""
    return [peer for peer in PEERS if peer.name in wanted and plan.kind in peer.kinds]
