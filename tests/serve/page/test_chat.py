"""Chat and models: base and tuned side by side, streams that break, checkpoints, deletion."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.serve.page.conftest import Files, Site, Watch
from tests.serve.page.reader import ask, go, until

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect


def tuned_model(page: Any, site: Site, files: Files) -> None:
    """Have a fine-tuned model and open the chat with it."""
    site.finished_job(page, files, "tuned")
    page.locator(".page-head").get_by_role("link", name="Chat").click()
    page.get_by_role("textbox", name="Message", exact=True).wait_for()


def test_base_and_tuned_answer_side_by_side(page: Any, site: Site, files: Files) -> None:
    tuned_model(page, site, files)
    assert page.get_by_label("Second model").input_value().startswith("ft:")
    page.get_by_text("Temperature 0.7").click()
    page.get_by_label("System message").fill("Be brief")
    page.get_by_label("Most tokens").fill("40")
    ask(page, "My parcel has not come")
    grown = "side => document.querySelectorAll('.answer .text')[side].textContent.length > 10"
    until(page, grown, 0)
    until(page, grown, 1)
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
    tuned_model(page, site, files)
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
    until(page, "() => document.querySelector('.answer .text')?.textContent.length > 8")
    page.get_by_role("button", name="Stop").click()
    answer = page.locator(".answer").first
    expect(answer).to_have_attribute("data-state", "stopped")
    expect(answer.locator(".text")).to_have_text(re.compile("^As a language"))
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


def test_a_checkpoint_is_chatted_with(page: Any, site: Site, files: Files) -> None:
    site.finished_job(page, files, "checked")
    page.get_by_role("table").get_by_role("link", name="Chat with step").last.click()
    select = page.get_by_label("Second model")
    expect(select).to_have_value(re.compile(r":ckpt-step-\d+$"))
    expect(select.locator("optgroup[label=Checkpoints] option").first).to_contain_text("step")


def test_a_model_is_deleted_after_a_question(page: Any, site: Site, files: Files) -> None:
    site.finished_job(page, files, "gone-soon")
    go(page, "Models")
    row = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name="gone-soon"))
    expect(row).to_contain_text(re.compile("Size[0-9.]+ [kM]B"))
    with page.expect_download():
        row.get_by_role("link", name="Download").click()
    row.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Keep it").click()
    expect(row).to_be_visible()
    row.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)
