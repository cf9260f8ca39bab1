"""Pictures of the page for the docs: a job from the form to the chat, on a server that runs or else on the stand-in.

python -m tests.serve.page.pictures docs/images --url http://127.0.0.1:8000 --train TRAIN.jsonl --held HELD.jsonl
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from tests.serve.page.demo import chat_rows
from tests.serve.page.fake_server import FakeServer, State
from tests.serve.page.reader import ask, choose_file, go, wait_for_curves

NAME = "help-desk"
PATIENCE = 3600.0
"""Seconds that the job may take."""


def shoot(page: Any, path: Path, most: int = 2400) -> None:
    """One picture, as tall as the page (up to `most`), so that what sticks to the window's bottom is at its end."""
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)
    before = page.viewport_size
    height = min(most, page.evaluate("document.documentElement.scrollHeight"))
    page.set_viewport_size({"width": before["width"], "height": height})
    page.wait_for_timeout(400)
    page.screenshot(path=path)
    page.set_viewport_size(before)


def open_tab(browser: Browser, url: str, width: int, scheme: Any) -> Any:
    """A tab of this width, light or dark; what its console says is printed."""
    page = browser.new_page(viewport={"width": width, "height": 780}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    page.on("console", lambda message: print(message.type, message.text))  # noqa: T201
    page.on("pageerror", lambda error: print("uncaught", error))  # noqa: T201
    page.goto(url)
    return page


def wait_for_share(page: Any, share: float) -> None:
    """Wait until this share of the steps is done."""
    end = time.monotonic() + PATIENCE
    while page.evaluate("document.querySelector('.run-progress progress').value") < share:
        assert time.monotonic() < end, f"the job did not reach {share:.0%}"
        page.wait_for_timeout(500)


def fill_form(page: Any, train: Path, held: Path) -> None:
    """All that a job needs, checked."""
    go(page, "New job")
    choose_file(page, train)
    choose_file(page, held, "Validation file (optional)")
    page.get_by_label("Name", exact=True).fill(NAME)
    page.get_by_text("Validated on").wait_for()


def chat(page: Any, questions: list[str]) -> None:
    """Ask base and tuned, and wait for their answers."""
    page.locator(".page-head").get_by_role("link", name="Chat").click(timeout=PATIENCE * 1000)
    page.get_by_role("textbox", name="Message", exact=True).wait_for()
    page.locator(".sampling summary").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("80")
    page.locator(".sampling summary").click()
    for question in questions:
        ask(page, question)
        page.get_by_role("button", name="Stop").wait_for(state="hidden")


def take(browser: Browser, url: str, chosen: Any, train: Path, held: Path) -> None:
    """All pictures, in the order in which things happen."""
    page = open_tab(browser, url, 1200, "light")
    fill_form(page, train, held)
    shoot(page, chosen.folder / "page-new-job.png", most=1640)
    page.get_by_role("button", name="Start").click()
    wait_for_curves(page)
    wait_for_share(page, 0.55)
    shoot(page, chosen.folder / "page-jobs.png")
    for name, width, scheme, most in (("phone", 360, "light", 1240), ("dark", 1200, "dark", 2400)):
        other = open_tab(browser, page.url, width, scheme)
        wait_for_curves(other)
        other.get_by_role("link", name="jsonl").last.wait_for()  # the names of the files come last
        shoot(other, chosen.folder / f"page-{name}.png", most)
        other.close()
    chat(page, chosen.question or ["My delivery is late, what now?"])
    shoot(page, chosen.folder / "page-chat.png")


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--url", help="of a server; left out, the stand-in")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--held", type=Path)
    parser.add_argument("--question", action="append", help="for the chat; repeatable")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    server = None if chosen.url else FakeServer(State())
    if server:
        server.start()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        train, held = chosen.train or Path(folder, "train.jsonl"), chosen.held or Path(folder, "held.jsonl")
        if not chosen.train:
            train.write_bytes(chat_rows(400))
            held.write_bytes(chat_rows(40))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        take(browser, server.url if server else chosen.url, chosen, train, held)
        browser.close()


if __name__ == "__main__":
    main()
