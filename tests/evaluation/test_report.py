"""The report: what it says, that it escapes, that it survives holes, and its charts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tunery.errors import CheckpointError, ConfigError
from tunery.evaluation import charts
from tunery.evaluation.report import render_report, write_report
from tunery.evaluation.scores import classification_scores

LABELS = ["negative", "positive"]
EVIL = '<script>alert("x")</script>'


def evaluation(base_right: int = 60, tuned_right: int = 90) -> dict[str, Any]:
    truth = [i % 2 for i in range(100)]

    def side(right: int) -> dict[str, Any]:
        predicted = [label if i < right else 1 - label for i, label in enumerate(truth)]
        return {"loss": 2.0 - right / 100, "perplexity": 3.0, **classification_scores(truth, predicted, LABELS)}

    return {
        "kind": "classification",
        "split": "validation",
        "rows": 100,
        "labels": LABELS,
        "base": side(base_right),
        "tuned": side(tuned_right),
        "samples": [
            {
                "where": "reviews.csv:17",
                "prompt": "a lovely film",
                "reference": "positive",
                "base": "negative (51%)",
                "tuned": "positive (98%)",
            }
        ],
    }


def receipt(**changes: Any) -> dict[str, Any]:
    tensors = {f"layer.{i}.lora_A.weight": {"shape": [16, 576], "moved": 0.01} for i in range(4)}
    return {
        "tunery": "0.1.0",
        "name": "sentiment",
        "model": {"name": "tiny", "sha256": "ab" * 32},
        "data": {
            "rows_read": 120,
            "rows_skipped": 0,
            "dropped": 0,
            "truncated": 0,
            "files": {"reviews.csv": "cd" * 32},
        },
        "tokens": {"end_of_turn_token": "<|im_end|>", "end_of_turn_trained": True},
        "lora": {"tensors": tensors},
        "reload": {"rows": 16, "difference": 0.0, "ok": True},
        "versions": {"torch": "2.13.0"},
        "warnings": [],
        **changes,
    }


def run_dir(
    root: Path, *, evaluated: Any = None, proof: Any = None, metrics: list[dict[str, Any]] | None = None
) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "task.yaml").write_text("name: sentiment\nmodel: tiny\n")
    for name, value in (("evaluation.json", evaluated), ("receipt.json", proof)):
        if value is not None:
            (root / name).write_text(json.dumps(value))
    if metrics is not None:
        (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return root


METRICS = [
    *({"step": i, "train_loss": 2.0 - i / 50, "learning_rate": 1e-4} for i in range(1, 41)),
    {"step": 20, "valid_loss": 1.5, "valid_token_accuracy": 0.6},
    {"step": 40, "valid_loss": 1.25, "valid_token_accuracy": 0.7},
]


class _Page(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def test_the_headline_numbers_and_their_uncertainty(tmp_path: Path):
    page = _Page(render_report(run_dir(tmp_path, evaluated=evaluation(), proof=receipt(), metrics=METRICS)))
    assert "labels 90.0% of 100 held-out rows correctly; the base model 60.0%" in page.text
    assert "95% interval 82.6% to 94.5%" in page.text
    assert "+30.0 points better" in page.text


def test_a_difference_that_could_be_chance_is_called_so(tmp_path: Path):
    page = _Page(render_report(run_dir(tmp_path, evaluated=evaluation(60, 63))))
    assert "could be chance" in page.text


def test_a_training_that_did_harm_is_called_so(tmp_path: Path):
    page = _Page(render_report(run_dir(tmp_path, evaluated=evaluation(90, 50))))
    assert "made it worse" in page.text
    assert "−40.0 points worse" in page.text


def test_samples_say_which_answer_is_right(tmp_path: Path):
    text = _Page(render_report(run_dir(tmp_path, evaluated=evaluation()))).text
    assert "Base ✗ wrong" in text
    assert "Tuned ✓ right" in text


def predicted(where: str, expected: str, tuned: str, probability: float) -> dict[str, Any]:
    return {
        "where": where,
        "input": f"a film {EVIL} of {where}",
        "expected": expected,
        "base": "negative",
        "tuned": tuned,
        "base_probability": 0.51,
        "tuned_probability": probability,
    }


def test_mistakes_are_listed_the_surest_first(tmp_path: Path):
    folder = run_dir(tmp_path, evaluated=evaluation())
    rows = [
        predicted("rows.csv:1", "positive", "negative", 0.61),
        predicted("rows.csv:2", "positive", "positive", 0.999),
        predicted("rows.csv:3", "negative", "positive", 0.98),
        *(predicted(f"rows.csv:{i}", "negative", "positive", 0.55) for i in range(4, 100)),
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = render_report(folder)
    assert EVIL not in page
    text = _Page(page).text
    assert "labels wrongly: 98 of 100, the surest first; 50 are shown" in text
    assert text.index("rows.csv:3") < text.index("rows.csv:1")
    assert "rows.csv:2 " not in text
    assert "positive (98.0%)" in text
    assert "negative (51.0%)" in text


def test_pairs_ranked_the_wrong_way_round_are_mistakes(tmp_path: Path):
    metrics = {"rewards_accuracy": 0.5, "preference_accuracy": 0.5}
    folder = run_dir(
        tmp_path,
        evaluated={"kind": "preference", "unit": "pair", "rows": 2, "base": metrics, "tuned": metrics, "samples": []},
    )
    pair = {"input": "how?", "expected": "well", "rejected": "badly", "tuned_log_probability": -4.0}
    rows = [
        {**pair, "where": "pairs.jsonl:1", "tuned_rejected_log_probability": -9.0},
        {**pair, "where": "pairs.jsonl:2", "tuned_rejected_log_probability": -1.5},
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = _Page(render_report(folder)).text
    assert "ranks the wrong way round: 1 of 2" in text
    assert "pairs.jsonl:2" in text
    assert "pairs.jsonl:1" not in text
    assert "2.5 nats likelier" in text


def test_a_run_without_predictions_or_mistakes_has_no_list(tmp_path: Path):
    folder = run_dir(tmp_path, evaluated=evaluation())
    assert "Mistakes" not in render_report(folder)
    (folder / "predictions.jsonl").write_text(json.dumps(predicted("a:1", "positive", "positive", 0.9)) + "\n")
    assert "Mistakes" not in render_report(folder)


def test_receipt_checks_pass_or_fail(tmp_path: Path):
    good = _Page(render_report(run_dir(tmp_path / "good", proof=receipt()))).text
    assert "All 4 adapter tensors moved" in good
    assert "What was saved is what was trained" in good
    assert "No row was lost" in good
    bad = receipt(
        lora={"tensors": {"stuck": {"shape": [1], "moved": 0.0}, "fine": {"shape": [1], "moved": 0.1}}},
        tokens={"end_of_turn_trained": False},
        warnings=["7 rows were dropped"],
    )
    text = _Page(render_report(run_dir(tmp_path / "bad", proof=bad))).text
    assert "1 of 2 did not move, such as stuck" in text
    assert "may not know when to stop" in text
    assert "Know this before you trust it 7 rows were dropped" in text


def test_no_text_of_the_users_becomes_markup(tmp_path: Path):
    evil = evaluation()
    evil["labels"] = [EVIL, "b"]
    evil["samples"] = [dict.fromkeys(("where", "prompt", "reference", "base", "tuned"), EVIL)]
    evil["tuned"]["per_label"] = {EVIL: {"precision": 1, "recall": 1, "f1": 1, "support": 1}}
    proof = receipt(
        name=EVIL,
        model={"name": EVIL},
        warnings=[EVIL],
        data={"files": {EVIL: EVIL}, "skipped": [EVIL]},
        lora={"tensors": {EVIL: {"shape": [EVIL], "moved": 1.0}}},
    )
    root = run_dir(tmp_path, evaluated=evil, proof=proof, metrics=METRICS)
    (root / "task.yaml").write_text(f"name: '{EVIL}'\n")
    html = render_report(root)
    assert EVIL not in html
    page = _Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) >= 10  # shown as text all the same


def test_the_page_asks_the_network_for_nothing(tmp_path: Path):
    html = render_report(run_dir(tmp_path, evaluated=evaluation(), proof=receipt(), metrics=METRICS))
    page = _Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert all(str(attrs["href"]).startswith("#") for _, attrs in page.tags if "href" in attrs)
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_every_link_inside_the_page_has_its_target_and_ids_are_unique(tmp_path: Path):
    page = _Page(render_report(run_dir(tmp_path, evaluated=evaluation(), proof=receipt(), metrics=METRICS)))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {str(attrs["href"])[1:] for _, attrs in page.tags if "href" in attrs} <= set(ids)


@pytest.mark.parametrize("proof", [None, {}, {"model": None, "data": [], "lora": {"tensors": None}, "warnings": "x"}])
@pytest.mark.parametrize(
    "evaluated", [None, {}, {"tuned": None}, {"base": {"loss": None}, "rows": "many", "samples": [None]}]
)
def test_holes_in_the_files_are_no_error(tmp_path: Path, proof: Any, evaluated: Any):
    page = _Page(render_report(run_dir(tmp_path, evaluated=evaluated, proof=proof))).text
    assert "No training step was logged" in page
    assert "None" not in page


def test_missing_sections_say_so(tmp_path: Path):
    text = _Page(render_report(run_dir(tmp_path))).text
    assert "has not been evaluated yet" in text
    assert "There is no receipt" in text


def test_advice_from_the_curves_is_shown(tmp_path: Path):
    climbing = [{"step": i, "train_loss": 1 + i / 10, "learning_rate": 0.01} for i in range(1, 41)]
    assert "diverging" in _Page(render_report(run_dir(tmp_path, metrics=climbing))).text


def test_many_labels_are_listed_by_their_mistakes(tmp_path: Path):
    labels = [f"intent-{i}" for i in range(30)]
    truth = list(range(30)) * 3
    predicted = [(label + 1) % 30 if label == 7 else label for label in truth]
    scores = classification_scores(truth, predicted, labels)
    many = {"kind": "classification", "rows": 90, "labels": labels, "base": scores, "tuned": scores}
    assert "3intent-7intent-8" in _Page(render_report(run_dir(tmp_path, evaluated=many))).text


def test_write_report_writes_beside_the_run(tmp_path: Path):
    path = write_report(run_dir(tmp_path))
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8").lstrip().startswith("<!doctype html>")


def test_a_folder_that_is_no_run_and_a_damaged_file_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="not a run directory"):
        render_report(tmp_path)
    root = run_dir(tmp_path)
    (root / "evaluation.json").write_text('{"kind": ')
    with pytest.raises(CheckpointError, match=r"evaluation\.json"):
        render_report(root)


# --------------------------------------------------------------------------- charts


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.3, 9.7, [0, 2, 4, 6, 8, 10]), (0, 1e-4, [0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4])],
)
def test_ticks_are_round_and_cover(low: float, high: float, ticks: list[float]):
    assert charts.nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-9])
def test_ticks_around_a_single_value(value: float):
    ticks = charts.nice_ticks(value, value)
    assert ticks[0] < value < ticks[-1]


def test_log_ticks_cover():
    assert charts.log_ticks(0.03, 4) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5])


def test_tick_labels_are_short():
    assert [charts.tick_label(v) for v in (0, 0.25, 1500, 2e-5, 9.3e-4, 2.5e7)] == [
        "0",
        "0.25",
        "1,500",
        "2e-5",
        "9.3e-4",
        "2.5e7",
    ]


def test_a_chart_is_well_formed_named_and_within_its_box():
    svg = charts.line_chart(
        [charts.Series("a & <b>", [(1, 3.0), (2, 1.0), (3, 2.0)]), charts.Series("v", [(2, 1.5)], 2, "dots")],
        title="Loss & <more>",
        marks=[(2, "best")],
    )
    root = parse(svg)
    space = "{http://www.w3.org/2000/svg}"
    assert root.findtext(f"{space}title") == "Loss & <more>"
    texts = [element.text for element in root.iter(f"{space}text")]
    assert {"a & <b>", "v", "best"} <= set(texts)
    for line in root.iter(f"{space}polyline"):
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 720
            assert 0 <= y <= 300


def test_a_higher_value_is_drawn_higher_on_both_scales():
    for log_y in (False, True):
        svg = charts.line_chart([charts.Series("a", [(1, 0.1), (2, 10.0)])], title="t", log_y=log_y)
        first, last = re.findall(r"points=\"([^\"]+)\"", svg)[0].split()
        assert float(last.split(",")[1]) < float(first.split(",")[1])


@pytest.mark.parametrize("points", [[], [(1, float("nan"))], [(1, 2.0)], [(5, 0.0), (5, 0.0)]])
def test_charts_of_almost_nothing(points: list[tuple[float, float]]):
    svg = charts.line_chart([charts.Series("a", points)], title="t", log_y=True)
    parse(svg)
    assert "nan" not in svg


def test_thinning_keeps_spikes_and_order():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[7777] = (7777.0, 99.0)
    kept = charts.thin(points)
    assert len(kept) <= charts.MOST_POINTS
    assert (7777.0, 99.0) in kept
    assert kept == sorted(kept)


def test_smoothing_does_not_lag_behind_a_straight_fall_and_tames_noise():
    line = [(float(i), 10.0 - i / 10) for i in range(100)]
    assert [y for _, y in charts.smooth(line)] == pytest.approx([y for _, y in line])
    zigzag = [(float(i), float(i % 2)) for i in range(200)]
    assert max(abs(y - 0.5) for _, y in charts.smooth(zigzag)[10:-10]) < 0.1


# --------------------------------------------------------------------------- pairs of answers


def preference_run(tmp_path: Path, favoured: float, pairs: int = 100) -> Path:
    root = tmp_path / "taste"
    root.mkdir()
    sides = {
        "base": {"preference_accuracy": 0.4, "rewards_margin": 0.0, "preference_loss": 0.693, "loss": 1.5},
        "tuned": {"rewards_accuracy": favoured, "preference_accuracy": 0.7, "rewards_margin": 1.25, "loss": 1.4},
    }
    sample = {"where": "a:1", "prompt": "q", "reference": "yes", "rejected": "<b>no</b>", "base": "x", "tuned": "y"}
    evaluation = {"kind": "preference", "split": "test", "rows": pairs, "beta": 0.1, "samples": [sample], **sides}
    (root / "evaluation.json").write_text(json.dumps(evaluation))
    lines: list[dict[str, float]] = [
        {"step": s, "train_loss": 0.69 - s / 100, "rewards_chosen": s / 10, "rewards_rejected": -s / 10}
        for s in range(1, 9)
    ]
    lines.append({"step": 8, "valid_loss": 0.61, "valid_rewards_margin": 1.234, "valid_rewards_accuracy": 0.875})
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.mark.parametrize(
    ("favoured", "pairs", "words"),
    [
        (0.9, 100, "favours the preferred answer in 90.0% of 100 held-out pairs (chance: 50%).</p>"),
        (0.6, 10, "With this few pairs, that could be chance (95 % interval: 31% to 83%)."),
        (0.2, 100, "It made things worse."),
    ],
)
def test_the_first_sentence_on_pairs_says_how_often_and_whether_it_could_be_chance(
    tmp_path: Path, favoured: float, pairs: int, words: str
) -> None:
    assert words in render_report(preference_run(tmp_path, favoured, pairs))


def test_a_page_on_pairs_shows_rewards_validations_and_both_answers(tmp_path: Path) -> None:
    page = render_report(preference_run(tmp_path, 0.9))
    assert page.count("Rewards of preferred and rejected answers") >= 1
    assert '<td class="n">1.234</td><td class="n">87.5%</td>' in page
    assert "Tokens predicted right" not in page
    assert "&lt;b&gt;no&lt;/b&gt;" in page
    assert "with β = 0.1" in page
    assert "log 2 = 0.693" in page


def test_a_report_names_no_folder_of_the_machine_and_keeps_what_leads_from_the_readers_own(tmp_path: Path) -> None:
    base, rows = "/home/ada/models/tiny", "/home/ada/secret project/rows.csv"
    proof = receipt(model={"name": base, "source": base}, warnings=[f"read {rows} again", "tokens/s and/or ./here"])
    proof["data"]["files"] = {rows: "ab" * 32}
    folder = run_dir(tmp_path / "run", evaluated=evaluation(), proof=proof, metrics=METRICS)
    (folder / "task.yaml").write_text(f"model: {base}\ndata:\n  train: {rows}\n  validation: more/held-out.csv\n")
    page = render_report(folder)
    assert "/home/ada" not in page
    assert str(tmp_path) not in page
    text = _Page(page).text
    assert "model: tiny data: train: rows.csv validation: more/held-out.csv" in text
    assert "tokens/s and/or ./here" in text
    hub = receipt(model={"name": "Qwen/Qwen3-0.6B", "source": "Qwen/Qwen3-0.6B@abc"})
    assert "Qwen/Qwen3-0.6B" in render_report(run_dir(tmp_path / "hub", evaluated=evaluation(), proof=hub))


def test_what_a_report_says_of_versions_can_be_installed(tmp_path: Path) -> None:
    proof = receipt(tunery="0.1.0", versions={"torch": "2.13.0+cpu", "transformers": "5.23.0"})
    text = _Page(render_report(run_dir(tmp_path / "cpu", evaluated=evaluation(), proof=proof))).text
    assert "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" in text
    assert "pip install . transformers==5.23.0 # in a clone of tunery 0.1.0" in text
    plain = receipt(tunery="0.1.0", versions={"torch": "2.13.0"})
    text = _Page(render_report(run_dir(tmp_path / "plain", evaluated=evaluation(), proof=plain))).text
    assert "pip install torch==2.13.0 pip install ." in text
