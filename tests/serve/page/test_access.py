"""The page for everyone: keyboard alone, screen readers, contrast, a phone's width, light and dark, calm."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.serve.page.conftest import Files, Site
from tests.serve.page.reader import (
    audit,
    choose_file,
    go,
    not_reached,
    start_job,
    tab_stops,
    unnamed,
    wait_for_curves,
    wait_until_still,
)

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect


@pytest.fixture
def filled(page: Any, site: Site) -> Any:
    """The page on a server that has jobs in every state."""
    fake = site.need_fake()
    from tests.serve.page.demo import fill

    fake.state.seconds_a_step = 1000.0  # nothing changes while it is looked at
    fill(fake.state)
    page.reload()
    page.get_by_role("link", name="desk").first.wait_for()
    return page


def views(page: Any, files: Files) -> Any:
    """Each view in turn, once it has something to show."""
    yield "jobs"
    for name in ("desk", "tone", "export"):
        page.locator(".jobs a").filter(has=page.locator(".name", has_text=name)).click()
        page.get_by_role("heading", name=name, level=1).wait_for()
        if name == "export":
            page.get_by_role("rowheader", name=re.compile(r"^(Line )?8$")).wait_for()
        else:
            wait_for_curves(page)
        yield f"job {name}"
        go(page, "Jobs")
    go(page, "New job")
    choose_file(page, files.good)
    page.get_by_role("heading", name="No problems in").wait_for()
    yield "new job, sound"
    page.get_by_role("button", name="Remove").click()
    choose_file(page, files.bad)
    page.get_by_role("region", name="Problems in").wait_for()
    yield "new job, bad"
    go(page, "Chat")
    page.locator(".sampling summary").click()
    page.get_by_role("textbox", name="Message", exact=True).fill("hello")
    page.keyboard.press("Enter")
    expect(page.locator(".answer").last).to_have_attribute("data-state", "done")
    yield "chat"
    go(page, "Models")
    page.get_by_role("button", name="Delete").first.wait_for()
    yield "models"
    page.get_by_role("button", name="Delete").first.click()
    yield "question"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_contrast_structure_sizes_and_names(filled: Any, files: Files, scheme: str, width: int) -> None:
    filled.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    filled.set_viewport_size({"width": width, "height": 800})
    found = {}
    for name in views(filled, files):
        problems = audit(filled) + [f"a {role} without a name" for role in unnamed(filled)]
        if problems:
            found[name] = problems
    assert found == {}


def test_the_audit_sees_what_is_wrong(page: Any) -> None:
    page.evaluate(
        """() => {
          const main = document.querySelector("main");
          const bad = document.createElement("button");
          bad.textContent = "pale";
          bad.style.color = "rgb(200, 200, 200)";
          bad.style.minHeight = bad.style.height = "10px";
          const input = document.createElement("input");
          const heading = document.createElement("h1");
          heading.textContent = "wide";
          heading.style.width = "5000px";
          main.append(bad, input, heading);
        }"""
    )
    found = "\n".join(audit(page))
    for problem in ("contrast", "2 main headings", "24 is the least", "wider than the window"):
        assert problem in found
    assert unnamed(page) == ["textbox"]


def test_tab_reaches_everything_in_order_and_shows_where_it_is(filled: Any, files: Files) -> None:
    for name in views(filled, files):
        if name == "question":
            continue
        wait_until_still(filled)
        stops = tab_stops(filled)
        orders = [stop["order"] for stop in stops]
        assert orders == sorted(orders), name
        assert [stop["name"] for stop in stops if not stop["ring"]] == [], name
        assert [stop["name"] for stop in stops if not stop["seen"]] == [], name
        assert not_reached(filled) == [], name
        assert len(stops) > 7, name


def press_until(page: Any, name: str, key: str = "Tab", most: int = 60) -> None:
    """Tab on until what has the focus carries this name."""
    for _ in range(most):
        page.keyboard.press(key)
        label = page.evaluate(
            """() => { const at = document.activeElement;
              return (at.getAttribute("aria-label") ?? at.labels?.[0]?.textContent ?? at.textContent ?? "").trim(); }"""
        )
        if label.startswith(name):
            return
    raise AssertionError(f"Tab did not reach {name!r}")


def test_a_job_by_keyboard_alone(page: Any, files: Files) -> None:
    page.on("filechooser", lambda _: None)  # from now on, not only once a chooser is waited for, which comes too late
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    press_until(page, "New job")
    page.keyboard.press("Enter")
    page.get_by_role("group", name="Training file").wait_for()
    press_until(page, "Choose a file")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(files.long)
    page.get_by_role("heading", name="No problems in").wait_for()
    press_until(page, "Name")
    page.keyboard.type("by-keyboard")
    press_until(page, "Start")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="by-keyboard", level=1).wait_for()
    wait_for_curves(page)
    press_until(page, "Pause")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Resume")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".page-head .status")).to_have_text(re.compile("Queued|Running"))


def test_the_theme_follows_the_system_until_chosen(page: Any) -> None:
    def dark() -> bool:
        return page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 20, 23)"

    button = page.get_by_role("button", name="Dark theme")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert dark() == (scheme == "dark")
        expect(button).to_have_attribute("aria-pressed", str(dark()).lower())
    button.click()
    assert not dark()
    page.reload()
    assert not dark()
    button.click()
    page.emulate_media(color_scheme="light")
    assert not dark()


def test_events_are_told_politely(page: Any, files: Files) -> None:
    start_job(page, files.good, "told")
    live = page.locator("#live")
    assert live.get_attribute("aria-live") == "polite"
    expect(live).to_have_text(re.compile("Succeeded|successfully completed"))


def test_nothing_moves_for_those_who_ask_for_calm(page: Any, files: Files) -> None:
    page.emulate_media(reduced_motion="reduce")
    start_job(page, files.long, "still")
    moving = page.evaluate("document.getAnimations().filter((each) => each.playState === 'running').length")
    assert moving == 0


def test_the_page_keeps_to_its_policy(page: Any, site: Site) -> None:
    response = page.request.get(site.url)
    policy = response.headers["content-security-policy"]
    assert "unsafe-inline" not in policy
    assert "unsafe-eval" not in policy
    text = response.text()
    assert not re.search(r"<script(?![^>]*src=)[^>]*>|\sstyle=|<style|\son\w+=", text)
