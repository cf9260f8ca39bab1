"""Pictures of the page for the docs, of the stand-in's jobs: python -m tests.serve.page.pictures docs/images"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from tests.serve.page.demo import bad_rows, chat_rows, fill
from tests.serve.page.fake_server import FakeServer, State
from tests.serve.page.reader import ask, choose_file, go, until, wait_for_curves

QUESTION = "My delivery is late, what now?"


def open_job(page: Any, name: str) -> None:
    """Show a job of the list."""
    go(page, "Jobs")
    page.locator(".jobs a").filter(has=page.locator(".name", has_text=name)).click()
    wait_for_curves(page)
    page.wait_for_timeout(400)


def shoot(page: Any, folder: Path, name: str, full: bool = False) -> None:
    """One picture."""
    page.mouse.move(0, 0)
    before = page.viewport_size
    if full:  # as tall as the page, so that what sticks to the bottom of the window is at the end of the picture
        height = page.evaluate("document.documentElement.scrollHeight")
        page.set_viewport_size({"width": before["width"], "height": height})
    page.wait_for_timeout(200)
    page.screenshot(path=folder / f"page-{name}.png")
    page.set_viewport_size(before)


def job_pictures(page: Any, folder: Path, more: bool) -> None:
    """A running job, and more of it for the eyes of who works on the page."""
    open_job(page, "desk")
    page.evaluate("document.activeElement.blur()")
    shoot(page, folder, "jobs", full=True)
    if more:
        open_job(page, "tone")
        shoot(page, folder, "job-done", full=True)
        go(page, "Jobs")
        page.wait_for_timeout(500)
        shoot(page, folder, "list")
        page.locator(".jobs a").filter(has=page.locator(".name", has_text="export")).click()
        page.get_by_role("rowheader", name=re.compile(r"^(Line )?8$")).wait_for()
        shoot(page, folder, "job-failed", full=True)


def form_pictures(page: Any, folder: Path, files: Path, more: bool) -> None:
    """The form with a sound file; with a bad one."""
    go(page, "New job")
    if more:
        choose_file(page, files / "bad.jsonl")
        page.get_by_role("region", name="Problems in").wait_for()
        shoot(page, folder, "new-job-bad", full=True)
        page.get_by_role("button", name="Remove").click()
    choose_file(page, files / "help-desk.jsonl")
    page.get_by_label("Name", exact=True).fill("help-desk")
    page.get_by_role("heading", name="No problems in").wait_for()
    page.evaluate("document.activeElement.blur()")
    shoot(page, folder, "new-job", full=True)


def chat_pictures(page: Any, folder: Path) -> None:
    """Base and tuned, having answered."""
    go(page, "Chat")
    for question in (QUESTION, "I was charged twice for one delivery."):
        ask(page, question)
        until(page, "() => document.querySelectorAll('.answer:not([data-state=done])').length === 0")
    shoot(page, folder, "chat")


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--more", action="store_true", help="also those that are not in the docs")
    parser.add_argument("--scheme", default="light")
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=860)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    state = State(seconds_a_step=0.7, seconds_a_token=0.01)
    fill(state)
    server = FakeServer(state)
    server.start()
    with tempfile.TemporaryDirectory() as files, sync_playwright() as playwright:
        Path(files, "help-desk.jsonl").write_bytes(chat_rows(1200))
        Path(files, "bad.jsonl").write_bytes(bad_rows())
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        size = {"width": chosen.width, "height": chosen.height}
        page = browser.new_page(viewport=size, color_scheme=chosen.scheme)
        page.on("console", lambda message: print(message.type, message.text))  # noqa: T201
        page.on("pageerror", lambda error: print("uncaught", error))  # noqa: T201
        page.goto(server.url)
        page.get_by_role("link", name="desk").first.wait_for()
        job_pictures(page, chosen.folder, chosen.more)
        form_pictures(page, chosen.folder, Path(files), chosen.more)
        chat_pictures(page, chosen.folder)
        if chosen.more:
            go(page, "Models")
            page.get_by_role("button", name="Delete").first.wait_for()
            shoot(page, chosen.folder, "models")
        browser.close()


if __name__ == "__main__":
    main()
