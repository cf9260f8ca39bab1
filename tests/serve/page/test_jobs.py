"""The page in a real Chromium: what a person does with it, from a bad file to a chat with the tuned model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.serve.page.conftest import Files, Site, Watch
from tests.serve.page.demo import chat_rows
from tests.serve.page.reader import choose_file, curve, go, points, start_job, wait_for_curves, wait_for_points

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect


# --------------------------------------------------------------------------- new job


def test_a_bad_file_shows_its_problems_by_line(page: Any, files: Files) -> None:
    go(page, "New job")
    choose_file(page, files.bad)
    table = page.get_by_role("region", name="Problems in bad.jsonl")
    for line, path in (("3", "messages[2].role"), ("5", "JSON"), ("8", "messages[0].content")):
        row = table.get_by_role("row").filter(has=page.get_by_role("rowheader", name=line, exact=True))
        expect(row.first).to_contain_text(path)
    start = page.get_by_role("button", name="Start")
    expect(start).to_have_attribute("aria-disabled", "true")
    start.click(force=True)
    expect(page).to_have_url(re.compile("#/new$"))
    go(page, "Jobs")
    expect(page.get_by_role("main")).not_to_contain_text("bad.jsonl")


def test_a_mended_file_takes_the_place_of_the_bad_one(page: Any, files: Files) -> None:
    go(page, "New job")
    choose_file(page, files.bad)
    page.get_by_role("button", name="Remove").click()
    choose_file(page, files.good)
    expect(page.get_by_role("heading", name="No problems in good.jsonl")).to_be_visible()
    expect(page.get_by_role("main")).not_to_contain_text("Problem in")


def test_a_good_file_says_what_will_be_trained(page: Any, files: Files) -> None:
    go(page, "New job")
    choose_file(page, files.good)
    expect(page.locator(".figure", has_text="Rows")).to_contain_text("40")
    trained = page.locator(".preview mark").first
    expect(trained).to_contain_text("Please give me the order number")
    assert "underline" in trained.evaluate("node => getComputedStyle(node).textDecorationLine")
    steps = page.locator(".figure", has_text="Steps").locator("dd")
    before = steps.inner_text()
    page.get_by_label("Epochs").fill("1")
    page.get_by_label("Batch size").fill("8")
    page.get_by_label("Batch size").press("Tab")
    expect(steps).not_to_have_text(before)
    expect(steps).to_contain_text("5")


def test_a_validation_file_may_be_short_and_is_checked_too(page: Any, site: Site, files: Files, tmp_path: Path) -> None:
    site.need_fake()
    short = tmp_path / "held.jsonl"
    short.write_bytes(chat_rows(4))
    go(page, "New job")
    choose_file(page, files.good)
    choose_file(page, short, "Validation file (optional)")
    expect(page.get_by_text("Validated on 4 rows of held.jsonl.")).to_be_visible()
    page.get_by_role("group", name="Validation file").get_by_role("button", name="Remove").click()
    choose_file(page, files.bad, "Validation file (optional)")
    expect(page.get_by_role("heading", name="3 problems in bad.jsonl")).to_be_visible()
    expect(page.get_by_role("button", name="Start")).to_have_attribute("aria-disabled", "true")


def test_a_setting_out_of_range_is_named(page: Any, files: Files) -> None:
    go(page, "New job")
    choose_file(page, files.good)
    page.get_by_label("Epochs").fill("51")
    page.get_by_label("Epochs").press("Tab")
    expect(page.get_by_text("A whole number, 1 to 50.")).to_be_visible()
    expect(page.get_by_role("button", name="Start")).to_have_attribute("aria-disabled", "true")


def test_a_dropped_file_is_uploaded(page: Any, files: Files) -> None:
    go(page, "New job")
    text = files.good.read_text(encoding="utf-8")
    dropped = page.evaluate_handle(
        "text => { const held = new DataTransfer(); held.items.add(new File([text], 'dropped.jsonl')); return held; }",
        text,
    )
    zone = page.get_by_role("group", name="Training file").locator(".zone")
    zone.dispatch_event("drop", {"dataTransfer": dropped})
    expect(page.get_by_role("heading", name="No problems in dropped.jsonl")).to_be_visible()


def test_the_form_survives_a_refresh(page: Any, files: Files) -> None:
    go(page, "New job")
    choose_file(page, files.good)
    page.get_by_label("Name", exact=True).fill("kept")
    page.get_by_label("Epochs").fill("2")
    page.get_by_label("Epochs").press("Tab")
    page.get_by_role("heading", name="No problems in good.jsonl").wait_for()
    page.reload()
    expect(page.get_by_label("Name", exact=True)).to_have_value("kept")
    expect(page.get_by_label("Epochs")).to_have_value("2")
    expect(page.get_by_role("heading", name="No problems in good.jsonl")).to_be_visible()


def test_text_of_a_file_is_never_taken_for_html(page: Any, site: Site, tmp_path: Path) -> None:
    trap = "<img src=x onerror=\"document.title='caught'\">"
    row = {"messages": [{"role": "user", "content": trap}, {"role": "assistant", "content": trap}]}
    path = tmp_path / "trap <b>.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 12), encoding="utf-8")
    go(page, "New job")
    choose_file(page, path)
    expect(page.locator(".preview mark").first).to_contain_text(trap)
    assert page.locator("main img").count() == 0
    assert "caught" not in page.title()


# --------------------------------------------------------------------------- a job


def test_curves_move_and_stay_calm(page: Any, files: Files) -> None:
    start_job(page, files.long, "calm")
    page.evaluate("document.querySelector('.plot path.curve.main').marked = true")
    axis = page.locator(".plot .grid text").filter(has_text="step 0").first
    expect(axis).to_be_visible()
    last_tick = page.locator(".plot").first.locator(".grid text").last.text_content()
    before = points(page)
    wait_for_points(page, before + 5)
    assert page.evaluate("document.querySelector('.plot path.curve.main').marked") is True
    assert page.locator(".plot").first.locator(".grid text").last.text_content() == last_tick
    expect(page.get_by_text(re.compile(r"Step \d+ of \d+"))).to_be_visible()
    expect(page.get_by_text(re.compile(r"left, done at"))).to_be_visible()


def test_a_job_survives_a_refresh(page: Any, files: Files) -> None:
    start_job(page, files.long, "refreshed")
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    page.wait_for_timeout(1500)  # the last metrics have come
    shape, address = curve(page), page.url
    page.reload()
    wait_for_curves(page)
    assert page.url == address
    assert curve(page) == shape
    expect(page.get_by_role("button", name="Resume")).to_be_visible()


def test_pause_and_resume(page: Any, files: Files) -> None:
    start_job(page, files.long, "paused")
    page.get_by_role("button", name="Pause").click()
    resume = page.get_by_role("button", name="Resume")
    expect(resume).to_be_visible()
    expect(page.locator(".page-head .status")).to_have_text("Paused")
    page.wait_for_timeout(1500)
    still = points(page)
    page.wait_for_timeout(1000)
    assert points(page) == still
    resume.click()
    expect(page.locator(".page-head .status")).to_have_text("Running")
    wait_for_points(page, still + 1)


def test_cancelling_asks_first(page: Any, files: Files) -> None:
    start_job(page, files.long, "cancelled")
    page.get_by_role("button", name="Cancel job").click()
    dialog = page.get_by_role("dialog", name="Cancel this job?")
    expect(dialog.get_by_role("button", name="Let it run")).to_be_focused()
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    page.get_by_role("button", name="Cancel job").click()
    dialog.get_by_role("button", name="Cancel job").click()
    expect(page.locator(".page-head .status")).to_have_text("Cancelled")


def test_a_job_that_succeeded_gives_its_adapter_results_and_checkpoints(page: Any, site: Site, files: Files) -> None:
    site.finished_job(page, files, "finished")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the adapter").click()
    assert download.value.suggested_filename.endswith(".zip")
    with page.expect_download() as download:
        page.get_by_role("link", name="Result file").click()
    assert Path(download.value.path()).read_text(encoding="utf-8").startswith("step,train_loss")
    expect(page.get_by_role("link", name="Report")).to_have_attribute("target", "_blank")
    expect(page.get_by_role("table").get_by_role("link", name="Chat with step").first).to_be_visible()
    events = page.get_by_role("list", name="Events, newest first")
    expect(events.get_by_role("listitem").first).to_contain_text("The job has successfully completed")
    quiet = events.get_by_role("listitem").count()
    page.get_by_label("Each step").check()
    assert events.get_by_role("listitem").count() > quiet


def test_the_chart_is_read_with_the_arrow_keys(page: Any, site: Site, files: Files) -> None:
    site.finished_job(page, files, "read")
    slider = page.get_by_role("slider", name="Loss by step")
    slider.focus()
    page.keyboard.press("Home")
    expect(slider).to_have_attribute("aria-valuenow", "1")
    expect(page.locator(".readout .at").first).to_have_text("Step 1")
    expect(page.locator(".readout .at").last).to_have_text("Step 1")
    page.keyboard.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", re.compile(r"^Step 2: Training \d\.\d{3}, Validation –$"))
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 50)
    expect(slider).to_have_attribute("aria-valuetext", re.compile(r"Validation \d\.\d{3}$"))


def test_a_failed_job_says_why_by_line(page: Any, site: Site) -> None:
    fake = site.need_fake()
    from tests.serve.page.demo import fill

    fill(fake.state)
    page.reload()
    page.get_by_role("link", name="export").click()
    box = page.get_by_role("alert").filter(has_text="The job failed")
    expect(box).to_contain_text("Example 3: messages[2].role")
    expect(box).to_contain_text("invalid_training_file")
    expect(box.get_by_role("rowheader", name=re.compile(r"^(Line )?8$"))).to_be_visible()


def test_a_job_that_is_not_there(page: Any, watch: Watch) -> None:
    watch.may_fail = True
    page.goto(page.url.split("#")[0] + "#/jobs/ftjob-nosuchjob")
    expect(page.get_by_role("alert")).to_contain_text("There is no such job")
