"""The server goes away and comes back, asks for a key, or has nothing yet."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.page.conftest import Files, Site, Watch
from tests.serve.page.reader import ask, go, points, start_job, until, wait_for_points

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect


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
    wait_for_points(page, before + 1)


def test_a_stream_goes_on_after_a_restart(page: Any, site: Site, watch: Watch) -> None:
    fake = site.need_fake()
    watch.may_fail = True
    fake.state.seconds_a_token = 0.1
    go(page, "Chat")
    ask(page, "hello")
    until(page, "() => document.querySelector('.answer .text')?.textContent.length > 4")
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
