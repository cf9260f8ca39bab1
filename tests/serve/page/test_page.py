"""The page in a real Chromium: what a person does with it, from a bad file to a chat with the tuned model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.serve.page.conftest import Files, Site, Watch
from tests.serve.page.reader import choose_file, curve, go, points, start_job, wait_for_curves

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect


# --------------------------------------------------------------------------- new job


def test_a_bad_file_shows_its_problems_by_line(page: Any, files: Files) -> None:
    go(page, "New job")
    choose_file(page, files.bad)
    table = page.get_by_role("region", name="Problems in bad.jsonl")
    for line, path in (("3", "messages[2].role"), ("5", "(row)"), ("8", "messages[0].content")):
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
    last_tick = page.locator(".plot").first.locator(".grid text").last.inner_text()
    before = points(page)
    page.wait_for_function(
        "n => document.querySelector('.plot path.curve.main').getAttribute('d').split('L').length > n + 5", arg=before
    )
    assert page.evaluate("document.querySelector('.plot path.curve.main').marked") is True
    assert page.locator(".plot").first.locator(".grid text").last.inner_text() == last_tick
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
    page.wait_for_function(
        "n => document.querySelector('.plot path.curve.main').getAttribute('d').split('L').length > n", arg=still + 1
    )


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


def test_a_job_that_succeeds_gives_its_adapter_results_and_checkpoints(page: Any, files: Files) -> None:
    start_job(page, files.good, "finished")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the adapter").click()
    assert download.value.suggested_filename == "finished-adapter.zip"
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


def test_the_chart_is_read_with_the_arrow_keys(page: Any, files: Files) -> None:
    start_job(page, files.good, "read")
    page.get_by_role("link", name="Download the adapter").wait_for()
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
    expect(box.get_by_role("rowheader", name="8", exact=True)).to_be_visible()


def test_a_job_that_is_not_there(page: Any, watch: Watch) -> None:
    watch.may_fail = True
    page.goto(page.url.split("#")[0] + "#/jobs/ftjob-nosuchjob")
    expect(page.get_by_role("alert")).to_contain_text("There is no such job")


# --------------------------------------------------------------------------- chat and models


def ask(page: Any, text: str) -> None:
    """Send a message."""
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def tuned_model(page: Any, files: Files, suffix: str = "tuned") -> None:
    """Have a fine-tuned model and open the chat with it."""
    start_job(page, files.good, suffix)
    page.locator(".page-head").get_by_role("link", name="Chat").click()
    page.get_by_role("textbox", name="Message", exact=True).wait_for()


def test_base_and_tuned_answer_side_by_side(page: Any, files: Files) -> None:
    tuned_model(page, files)
    assert page.get_by_label("Second model").input_value().startswith("ft:")
    page.get_by_text("Temperature 0.7").click()
    page.get_by_label("System message").fill("Be brief")
    page.get_by_label("Most tokens").fill("40")
    ask(page, "My parcel has not come")
    grown = "side => document.querySelectorAll('.answer .text')[side].textContent.length > 10"
    page.wait_for_function(grown, arg=0)
    page.wait_for_function(grown, arg=1)
    answers = page.locator(".answer")
    for side in (0, 1):
        expect(answers.nth(side)).to_have_attribute("data-state", re.compile("done|length"))
        expect(answers.nth(side).locator(".about")).to_contain_text("tokens/s")
    assert answers.nth(0).locator(".text").inner_text() != answers.nth(1).locator(".text").inner_text()
    left, right = answers.nth(0).bounding_box(), answers.nth(1).bounding_box()
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


def test_a_conversation_goes_on_and_survives_a_refresh(page: Any, site: Site, files: Files) -> None:
    site.need_fake()
    tuned_model(page, files)
    for text in ("first question", "second question"):
        ask(page, text)
        expect(page.locator(".answer").last).to_have_attribute("data-state", "done")
    expect(page.locator(".answer").nth(2)).to_contain_text("turn 2 answers “second question”")
    page.reload()
    expect(page.locator(".answer").nth(3)).to_contain_text("In short: turn 2")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".answer")).to_have_count(0)


def test_stop_keeps_what_came(page: Any, site: Site) -> None:
    fake = site.need_fake()
    fake.state.seconds_a_token = 0.2
    go(page, "Chat")
    ask(page, "tell me a lot")
    page.wait_for_function("document.querySelector('.answer .text')?.textContent.length > 8")
    page.get_by_role("button", name="Stop").click()
    answer = page.locator(".answer").first
    expect(answer).to_have_attribute("data-state", "stopped")
    expect(answer).to_contain_text("As a language model")
    answer.get_by_role("button", name="Ask again").click()
    expect(answer).to_have_attribute("data-state", "streaming")
    page.get_by_role("button", name="Stop").click()


@pytest.mark.parametrize("text", ["break this stream", "you are busy"])
def test_a_broken_stream_and_a_full_queue_are_tried_again(page: Any, site: Site, watch: Watch, text: str) -> None:
    site.need_fake()
    watch.may_fail = True
    go(page, "Chat")
    ask(page, text)
    answer = page.locator(".answer").first
    expect(answer.locator(".about")).to_contain_text("asking again")
    expect(answer).to_have_attribute("data-state", "done")
    expect(answer).to_contain_text(f"answers “{text}”")


def test_a_refused_message_says_why(page: Any, site: Site, watch: Watch) -> None:
    site.need_fake()
    watch.may_fail = True
    go(page, "Chat")
    ask(page, "refuse this")
    expect(page.locator(".answer").first).to_contain_text("the model reads up to 8,192")


def test_a_checkpoint_is_chatted_with(page: Any, files: Files) -> None:
    start_job(page, files.good, "checked")
    page.get_by_role("link", name="Download the adapter").wait_for()
    page.get_by_role("table").get_by_role("link", name="Chat with step").last.click()
    select = page.get_by_label("Second model")
    expect(select).to_have_value(re.compile(r":ckpt-step-\d+$"))
    expect(select.locator("optgroup[label=Checkpoints] option").first).to_contain_text("step")


def test_a_model_is_deleted_after_a_question(page: Any, files: Files) -> None:
    start_job(page, files.good, "gone-soon")
    page.get_by_role("link", name="Download the adapter").wait_for()
    go(page, "Models")
    row = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name="gone-soon"))
    expect(row).to_contain_text("MB")
    with page.expect_download():
        row.get_by_role("link", name="Download").click()
    row.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Keep it").click()
    expect(row).to_be_visible()
    row.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)


# --------------------------------------------------------------------------- the server goes away; the key


def test_a_restart_of_the_server_is_seen_and_outlived(page: Any, site: Site, watch: Watch, files: Files) -> None:
    fake = site.need_fake()
    watch.may_fail = True
    start_job(page, files.long, "restarted")
    fake.stop()
    banner = page.locator("#banner")
    expect(banner).to_contain_text("The server is not reachable")
    before = points(page)
    fake.start()
    expect(banner).to_be_hidden()
    page.wait_for_function(
        "n => document.querySelector('.plot path.curve.main').getAttribute('d').split('L').length > n", arg=before + 1
    )


def test_a_stream_goes_on_after_a_restart(page: Any, site: Site, watch: Watch) -> None:
    fake = site.need_fake()
    watch.may_fail = True
    fake.state.seconds_a_token = 0.1
    go(page, "Chat")
    ask(page, "hello")
    page.wait_for_function("document.querySelector('.answer .text')?.textContent.length > 4")
    fake.stop()
    answer = page.locator(".answer").first
    expect(answer.locator(".about")).to_contain_text("asking again")
    fake.start()
    expect(answer).to_have_attribute("data-state", "done")
    expect(answer).to_contain_text("As a language model")


def test_a_server_with_a_key_asks_for_it(page: Any, site: Site, watch: Watch) -> None:
    fake = site.need_fake()
    watch.may_fail = True
    fake.state.key = "right"
    page.reload()
    dialog = page.get_by_role("dialog", name="API key needed")
    field = dialog.get_by_label("API key")
    expect(field).to_be_focused()
    field.fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("Incorrect API key provided.")
    field.fill("right")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="No jobs yet")).to_be_visible()
    page.reload()
    expect(page.get_by_role("heading", name="No jobs yet")).to_be_visible()
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.get_by_role("button", name="Forget the key").click()
    expect(dialog).to_be_visible()


def test_empty_states_say_what_to_do(page: Any, site: Site) -> None:
    site.need_fake()
    expect(page.locator("main pre")).to_contain_text(f"OPENAI_BASE_URL={site.url}/v1")
    go(page, "Models")
    expect(page.get_by_role("heading", name="No fine-tuned models yet")).to_be_visible()
