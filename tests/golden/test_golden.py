"""Training gives the losses it gave before. A change that moves them says why: `python -m tests.golden.renew`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden import curve
from tests.golden.curve import Line, Tolerance
from tests.golden.renew import renew
from tests.golden.runs import RUNS, Golden
from tunery.training.build_receipt import versions


@pytest.mark.parametrize("name", RUNS)
def test_the_curve_is_that_of_the_file(name: str, tmp_path: Path) -> None:
    run, path = RUNS[name], curve.path_of(name)
    if why_not := run.why_not():
        pytest.skip(why_not)
    held = curve.read(path)
    moved = run.how_it_moved(held, run.record(tmp_path))
    assert moved is None, (
        f"the curve of {path.name} has moved: {moved}.{_other_versions(held['versions'])}\n"
        f"If that is meant, say why, which renews the file: {curve.RENEW}"
    )


def _other_versions(held: dict[str, str]) -> str:
    now = versions()
    other = [f"{name} {held[name]} → {now.get(name)}" for name in held if held[name] != now.get(name)]
    return f"\nVersions that differ from the file's: {', '.join(other)}." if other else ""


def test_every_file_belongs_to_a_run_and_gives_a_reason() -> None:
    assert {path.stem for path in curve.FOLDER.glob("*.json")} == set(RUNS)
    for name in RUNS:
        held = curve.read(curve.path_of(name))
        assert held["tolerance"] == str(RUNS[name].tolerance), f"{name}: renew it, its tolerance is another"
        assert all(entry["reason"] and entry["moved"] for entry in held["why"])
        assert held["why"]


# --------------------------------------------------------------------------- comparing and renewing

EACH = Tolerance(1e-5, "value")
STEP = Tolerance(2e-2, "step")
MEAN = Tolerance(2e-2, "mean")


def line(step: int, loss: float) -> Line:
    return {"step": step, "train_loss": loss}


def test_a_move_names_the_first_step_and_the_largest() -> None:
    held = [line(1, 2.0), line(2, 1.0), line(3, 0.5)]
    assert curve.how_it_moved(held, [line(1, 2.00001), line(2, 1.0), line(3, 0.5)], EACH) is None
    moved = curve.how_it_moved(held, [line(1, 2.0), line(2, 1.0001), line(3, 0.6)], EACH)
    assert moved is not None
    assert moved.startswith("first train_loss at step 2 by 1.0e-04 (held 1, now 1.0001), most train_loss at step 3")
    assert moved.endswith("2 of 3 values beyond 1e-05")


def test_on_another_processor_only_the_mean_of_a_bfloat16_run_is_held() -> None:
    held = {"curve": [line(step, 0.5) for step in range(1, 21)], "processor": curve.processor()}
    noisy = [line(step, 0.6 if step % 2 else 0.4) for step in range(1, 21)]
    higher = [line(step, 0.521) for step in range(1, 21)]
    run = Golden("one", STEP, lambda _: [], elsewhere=MEAN)
    assert str(run.how_it_moved(held, noisy)).startswith("first train_loss at step 1 by 1.0e-01")
    elsewhere = held | {"processor": "another"}
    assert run.how_it_moved(elsewhere, noisy) is None
    assert str(run.how_it_moved(elsewhere, higher)).startswith("first the mean train_loss by 2.1e-02")
    strict = Golden("one", STEP, lambda _: [])
    assert strict.how_it_moved(elsewhere, noisy) is not None


@pytest.mark.parametrize(
    "now", [[line(1, float("nan"))], [line(2, 1.0)], [], [{**line(1, 1.0), "valid_loss": 1.0}], [line(1, float("inf"))]]
)
def test_nan_and_other_lines_are_moves(now: list[Line]) -> None:
    for tolerance in (EACH, STEP, MEAN):
        assert curve.how_it_moved([line(1, 1.0)], now, tolerance) is not None


def test_renewing_writes_the_reason_and_only_where_the_curve_moved(tmp_path: Path) -> None:
    now = {"still": [line(1, 1.0)], "moving": [line(1, 1.0)]}
    runs = {name: Golden(name, EACH, lambda _, name=name: now[name]) for name in now}
    renew("so it began", runs=runs, folder=tmp_path)
    before = curve.path_of("still", tmp_path).read_text()
    now["moving"] = [line(1, 1.5)]
    done = renew("the sum became\n a mean", runs=runs, folder=tmp_path)
    assert done["still"].startswith("unmoved")
    assert done["moving"].startswith("renewed: first train_loss at step 1 by 5.0e-01")
    assert curve.path_of("still", tmp_path).read_text() == before
    held = json.loads(curve.path_of("moving", tmp_path).read_text())
    assert [entry["reason"] for entry in held["why"]] == ["so it began", "the sum became a mean"]
    assert held["curve"] == [line(1, 1.5)]
    assert held["versions"].keys() >= {"torch", "transformers"}


@pytest.mark.parametrize(("reason", "names"), [("", ()), ("update", ()), ("a good reason", ("nothing",))])
def test_renewing_without_a_reason_or_with_a_wrong_name_is_refused(
    reason: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    runs = {"one": Golden("one", EACH, lambda _: [line(1, 1.0)])}
    with pytest.raises(ValueError, match=r"why the curves moved|no such curve: nothing"):
        renew(reason, names, runs=runs, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_be_made_here_keeps_its_file(tmp_path: Path) -> None:
    run = Golden("one", EACH, lambda _: [line(1, 1.0)], lambda: "needs a package")
    assert renew("a good reason", runs={"one": run}, folder=tmp_path) == {"one": "not trained here: needs a package"}
    assert not list(tmp_path.iterdir())
