"""The tables: ratios of neighbouring steps, medians, and words in place of a speed that does not count."""

from __future__ import annotations

import json

import pytest
from bench.judge import Spread, all_figures, curves_differ, float32_differs
from bench.run import merged
from bench.scaling_report import scaling_section

from bench import plan, report
from tests.bench.recorded import CURVE, ours, results, run


def figures(found: dict) -> dict:
    """By program."""
    return {f.name: f for f in all_figures(found, found["workloads"][0])}


def test_the_ratio_is_the_median_over_neighbouring_steps_without_the_first() -> None:
    peer = figures(results(peft=run([90, 4, 6, 5], CURVE)))["peft"]
    assert peer.ratio == Spread(4.0, 3.0, 5.0), "4/1, 6/2 and 5/1"
    assert peer.problem is None


def test_speeds_are_medians_and_tunerys_own_come_from_all_its_runs() -> None:
    found = figures(results(peft=run([9, 4, 6, 5], CURVE), trl_tuned=run([9, 10, 10, 10], CURVE)))
    assert found["tunery"].data_tokens == Spread(1000.0, 500.0, 1000.0)
    assert found["peft"].data_tokens == Spread(200.0, 1000 / 6, 250.0)
    assert found["peft"].trained_tokens == 20.0
    assert found["tunery"].share == pytest.approx(0.6), "its own operations over the rate beside it"
    assert found["peft"].share == pytest.approx(1.5e9 / 5 / 1e9), "a peer's: every token once"
    assert found["tunery"].peak_bytes == 10**9
    assert [found[name].at_once for name in ("tunery", "trl-tuned", "peft")] == [8, 8, 4]


def line(text: str, program: str) -> str:
    """The line of a program in the first table that has one."""
    return next(line for line in text.splitlines() if line.startswith(f"| {program} "))


def test_losses_that_differ_in_float32_take_the_place_of_the_speed() -> None:
    found = results(peft=run([9, 4, 6, 5], CURVE))
    found["checks"]["rows"]["peft"] = run([1, 1], [3.0, 2.6])
    said = line("\n".join(report.cpu_section(found)), "PEFT in a bare loop")
    assert "no speed: losses differ in float32, step 2: 2.60000 against tunery's 2.50000" in said
    assert "200" not in said
    assert "**" not in said


def test_a_loss_that_is_no_number_does_not_agree() -> None:
    assert float32_differs(run([1], [3.0]), run([1], [float("nan")]))


def test_loss_curves_may_differ_by_rounding_only() -> None:
    assert curves_differ(ours([1] * 4, CURVE), run([1] * 4, [x * 1.04 for x in CURVE])) is None
    words = curves_differ(ours([1] * 4, CURVE), run([1] * 4, [2.0, 1.9, 1.9, 1.9]))
    assert words is not None
    assert "apart (2.000 1.900 1.900 1.900 against 2.000 1.800 1.700 1.600)" in words


@pytest.mark.parametrize(
    ("key", "words"), [("data_tokens", "other tokens"), ("trained_tokens", "other trained tokens")]
)
def test_a_peer_that_trains_other_tokens_has_no_speed(key: str, words: str) -> None:
    other = run([9, 4, 6, 5], CURVE)
    other["steps"][2][key] += 1
    peer = figures(results(peft=other))["peft"]
    assert peer.problem is not None
    assert words in peer.problem
    assert peer.data_tokens is None


def test_a_peer_that_failed_says_why_and_leaves_the_others_alone() -> None:
    found = figures(results(peft={"steps": [], "failed": "was ended by signal 9"}, litgpt=run([9, 4, 6, 5], CURVE)))
    assert found["peft"].problem == "was ended by signal 9"
    assert found["litgpt"].ratio is not None


def test_without_tunery_the_peer_has_a_speed_and_no_ratio() -> None:
    found = results(peft=run([9, 4, 6, 5], CURVE))
    failed = {"steps": [], "failed": "ended with code 1: not yet"}
    found["workloads"][0]["comparisons"]["peft"]["tunery"] = found["checks"]["rows"]["tunery"] = failed
    table = report.speed_table(all_figures(found, found["workloads"][0]))
    assert "no speed: ended with code 1: not yet" in line(table, "tunery")
    assert "| 200 " in line(table, "PEFT in a bare loop")
    assert "**" not in table


def test_goals_are_reached_or_missed() -> None:
    found = results(peft=run([9, 3, 3, 3], CURVE), trl_tuned=run([9, 4, 4, 4], CURVE))
    title = "Long free text, batch 8"

    def rows() -> dict[str, list[str]]:
        return {row[0]: row[1:] for row in report.goal_rows(found)}

    assert rows()[f"{title}: the fastest peer, PEFT in a bare loop"] == ["≥ 1 ×", "3.0 ×", "reached"]
    assert rows()["Long free text: peak memory against the fastest peer's, PEFT in a bare loop"][0] == "≤ 0.5 ×"
    for dtype, goal in (("float32", "≥ 85%"), ("bfloat16", "≥ 70%")):
        for comparison in found["workloads"][0]["comparisons"].values():
            comparison["tunery"]["dtype"] = dtype
        assert rows()[f"{title}: share of the matmul rate in {dtype}"] == [goal, "60%", "missed"]


def test_no_goal_where_nothing_was_measured() -> None:
    assert report.goal_rows(results(peft={"steps": [], "failed": "was ended by signal 9"})) == []


def test_the_page_says_where_when_how_and_on_what() -> None:
    text = "\n".join(report.cpu_section(results(peft=run([9, 4, 6, 5], CURVE))))
    for words in ("A processor, 2 threads, 24 GB", "2026-11-24", "commit abc", "python -m bench.run", "torch 2.13.0"):
        assert words in text
    assert "**4.0** (3.0 to 5.0)" in text


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({}, "A processor, 2"),
        ({"bfloat16_instructions": None}, "A processor, 2"),
        ({"bfloat16_instructions": True}, "A processor with bfloat16 instructions, 2"),
        ({"bfloat16_instructions": False}, "A processor without bfloat16 instructions, 2"),
    ],
)
def test_the_page_says_what_kind_of_processor_it_was(known: dict[str, bool | None], words: str) -> None:
    found = results(peft=run([9, 4, 6, 5], CURVE))
    assert report.head(found | {"machine": found["machine"] | known})[0].startswith(words)


def test_the_columns_of_a_table_line_up() -> None:
    lines = report.table(("a", "longer"), [["wide cell", "1"], ["x", "22"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| --------- | ------ |"


def test_a_part_measured_again_takes_the_place_of_that_part_only() -> None:
    before = results(peft=run([9, 4, 6, 5], CURVE), litgpt=run([9, 8, 8, 8], CURVE))
    now = results(peft=run([9, 2, 2, 2], CURVE)) | {"commit": "def"}
    both = figures(merged(before, now))
    assert both["peft"].data_tokens == Spread.of([500.0] * 3)
    assert both["litgpt"].data_tokens == Spread.of([125.0] * 3)
    assert merged(None, now) is now


def test_scaling_compares_with_the_time_at_the_matrix_multiply_rate() -> None:
    point = {
        "at": 1024,
        "seconds": 4.0,
        "data_tokens": 2048,
        "computed_tokens": 2046,
        "matmul_rate": 1e11,
        "flops": 2e11,
        "attention_flops": 1e10,
    }
    text = "\n".join(scaling_section(results() | {"axes": {"length": [point]}}))
    assert [cell.strip() for cell in line(text, "1,024").split("|")[1:-1]] == [
        "1,024",
        "2,048",
        "2,046",
        "200",
        "5.0%",
        "2.00 s",
        "4.00 s",
        "50%",
        "512",
    ]


def test_the_page_is_what_the_recorded_results_say() -> None:
    assert report.TARGET.read_text(encoding="utf-8") == report.main_report()


def test_saving_writes_results_and_page(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "TARGET", tmp_path / "page.md")
    found = results(peft=run([9, 4, 6, 5], CURVE))
    report.save("cpu", found)
    assert json.loads((tmp_path / "results" / "cpu.json").read_text()) == found
    assert (tmp_path / "page.md").read_text().startswith("# Benchmarks\n")
    assert plan.WORKLOADS[2].title in (tmp_path / "page.md").read_text()
