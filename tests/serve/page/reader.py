"""What a reader does with the page, in words of the page."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

REAL = os.environ.get("TUNERY_PAGE_URL")
SECONDS = float(os.environ.get("TUNERY_PAGE_SECONDS", "300" if REAL else "15"))
"""How long anything may take; a job of the real server takes its time."""

AUDIT = (Path(__file__).parent / "audit.js").read_text(encoding="utf-8")


def go(page: Any, name: str) -> None:
    """Follow a link of the bar at the top."""
    page.get_by_role("navigation", name="Pages").get_by_role("link", name=name, exact=True).click()


def choose_file(page: Any, path: Path, label: str = "Training file") -> None:
    """Give the form a file."""
    page.get_by_role("group", name=label).locator("input[type=file]").set_input_files(path)


def start_job(page: Any, path: Path, suffix: str, held: Path | None = None) -> None:
    """Start a job on `path`, validated on `held`, and wait until it trains."""
    go(page, "New job")
    choose_file(page, path)
    if held is not None:
        choose_file(page, held, "Validation file (optional)")
    page.get_by_label("Name", exact=True).fill(suffix)
    page.get_by_role("heading", name="No problems in").wait_for()
    page.get_by_role("button", name="Start").click()
    page.get_by_role("heading", name=suffix, level=1).wait_for()
    wait_for_curves(page)


def until(page: Any, function: str, argument: Any = None) -> None:
    """Wait until a function of the page gives true. (Playwright's own way needs eval, which the policy forbids.)"""
    end = time.monotonic() + SECONDS
    while not page.evaluate(function, argument):
        assert time.monotonic() < end, f"waited {SECONDS} s for {function} with {argument}"
        page.wait_for_timeout(50)


def wait_for_curves(page: Any) -> None:
    """Wait until there are steps to see."""
    until(page, "() => document.querySelector('.plot path.curve.main')?.getAttribute('d')?.includes('L')")


def curve(page: Any) -> str:
    """The shape of the first chart's main curve."""
    return page.locator(".plot path.curve.main").first.get_attribute("d")


def points(page: Any) -> int:
    """How many points that curve has."""
    return curve(page).count("L") + 1


def wait_for_points(page: Any, count: int) -> None:
    """Wait until the first chart's main curve has more than `count` points."""
    count_points = "document.querySelector('.plot path.curve.main').getAttribute('d').split('L').length"
    until(page, f"count => {count_points} > count", count)


def ask(page: Any, text: str) -> None:
    """Send a message to the chat."""
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def audit(page: Any) -> list[str]:
    """What is wrong with contrast, structure and sizes, by audit.js."""
    return page.evaluate(AUDIT)


def unnamed(page: Any) -> list[str]:
    """Roles of what can be operated but has no name for a screen reader, from Chromium's own accessibility tree."""
    operable = {"button", "link", "textbox", "combobox", "checkbox", "radio", "slider", "spinbutton", "progressbar"}
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    found = []
    for node in nodes:
        role = node.get("role", {}).get("value", "")
        if not node.get("ignored") and role in operable and not node.get("name", {}).get("value", "").strip():
            found.append(role)
    return found


FOCUSED = """() => {
  const at = document.activeElement;
  if (!at || at === document.body) return null;
  const shown = at.matches(".zone input[type=file]") ? at.closest(".zone") : at;
  const style = getComputedStyle(shown);
  const order = [...document.querySelectorAll("*")].indexOf(at);
  at.reachedByTab = true;
  const box = shown.getBoundingClientRect();
  return {
    order,
    name: `${at.tagName.toLowerCase()} “${(at.getAttribute("aria-label") ?? at.textContent).trim().slice(0, 40)}”`,
    ring: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
    seen: box.width > 0 && box.bottom > 0 && box.top < innerHeight,
  };
}"""


def not_reached(page: Any) -> list[str]:
    """What a keyboard has to reach (of radio buttons the chosen one) and `tab_stops` has not met."""
    return page.evaluate(
        """() => [...document.querySelectorAll("a[href], button, input, select, textarea, summary, [tabindex='0']")]
          .filter((each) => each.checkVisibility() && !each.disabled && (each.type !== "radio" || each.checked))
          .filter((each) => !each.reachedByTab)
          .map((each) => each.outerHTML.slice(0, 80))"""
    )


def wait_until_still(page: Any, milliseconds: int = 400, most: int = 3000) -> None:
    """Wait until nothing has been put into the page, or taken away, for a while; not for ever: a job's page lives."""
    page.evaluate(
        """([still, most]) => new Promise((done) => {
          setTimeout(done, most);
          let timer = setTimeout(done, still);
          new MutationObserver(() => { clearTimeout(timer); timer = setTimeout(done, still); })
            .observe(document.body, { childList: true, subtree: true });
        })""",
        [milliseconds, most],
    )


def tab_stops(page: Any, most: int = 120) -> list[dict[str, Any]]:
    """What Tab reaches from the top of the page: name, whether the focus is visible, place in the document."""
    page.locator("#skip").focus()  # where Tab begins on a fresh page; where the reader clicked last counts otherwise
    page.keyboard.press("Shift+Tab")
    stops: list[dict[str, Any]] = []
    for _ in range(most):
        page.keyboard.press("Tab")
        at = page.evaluate(FOCUSED)
        if at is None or (stops and at["order"] == stops[0]["order"]):
            break
        stops.append(at)
    return stops
