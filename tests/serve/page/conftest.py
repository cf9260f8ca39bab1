"""A real Chromium on a page, and what every test demands of it: no error in its console, no request to elsewhere.

The page is served by the stand-in. With TUNERY_PAGE_URL=http://127.0.0.1:8000 the same tests run against a real server,
without those that need to break it; its jobs take longer, which TUNERY_PAGE_SECONDS allows for (default 300).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.serve.page.demo import bad_rows, chat_rows
from tests.serve.page.reader import REAL, SECONDS, start_job, wait_for_curves

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """Chromium, without a window. Not for the whole session: playwright's event loop runs as long as it is there."""
    playwright_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")
    playwright_api.expect.set_options(timeout=SECONDS * 1000)
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Watch:
    """What went wrong in a page that the reader would not see."""

    origin: str
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    may_fail: bool = False  # the test breaks the server: the browser itself logs each failed request

    def follow(self, page: Any) -> None:
        """Listen to `page`."""
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        page.on("request", self._asked)

    def _said(self, message: Any) -> None:
        if message.type not in ("error", "warning"):
            return
        if not (self.may_fail and "Failed to load resource" in message.text):
            self.errors.append(message.text)

    def _asked(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme != "blob" and f"{parts.scheme}://{parts.netloc}" != self.origin:
            self.elsewhere.append(request.url)


@dataclass
class Files:
    """Training files on disk."""

    good: Path  # short: a job on it is soon done
    long: Path  # a job on it lasts long enough to be paused
    held: Path  # rows to validate on
    bad: Path  # mistakes on the lines 3, 5 and 8


@dataclass
class Site:
    """A server with the page, and where to open it."""

    url: str
    fake: Any  # the FakeServer, or None

    def finished_job(self, page: Any, files: Files, suffix: str) -> None:
        """Show a job that succeeded: made at once on the stand-in, trained on a real server."""
        if self.fake is None:
            start_job(page, files.good, suffix, held=files.held)
        else:
            from tests.serve.page.demo import add_job
            from tests.serve.page.fake_jobs import StoredFile

            rows, held = (StoredFile(path.name, path.read_bytes()) for path in (files.good, files.held))
            self.fake.state.files[held.id] = held
            job = add_job(self.fake.state, rows, suffix, 1.0, validation_file=held.id)
            page.goto(f"{self.url}/#/jobs/{job.id}")
            wait_for_curves(page)
        page.get_by_role("link", name="Download the adapter").wait_for()

    def need_fake(self) -> Any:
        """The stand-in, for a test that breaks it; skips where there is none."""
        if self.fake is None:
            pytest.skip("breaks the server, which a real one is spared")
        return self.fake


@pytest.fixture
def site() -> Iterator[Site]:
    """The stand-in, afresh for each test; or the real server."""
    if REAL:
        yield Site(REAL.rstrip("/"), None)
        return
    pytest.importorskip("uvicorn", reason="needs tunery[serve]")
    from tests.serve.page.fake_server import FakeServer, State

    fake = FakeServer(State())
    fake.start()
    yield Site(fake.url, fake)
    fake.stop()


@pytest.fixture
def watch(site: Site) -> Iterator[Watch]:
    """What the pages of this test do behind the scenes; checked at its end."""
    watched = Watch(site.url)
    yield watched
    assert watched.errors == []
    assert watched.elsewhere == []


@pytest.fixture
def page(browser: Any, site: Site, watch: Watch) -> Iterator[Any]:
    """A tab of its own, nothing stored, at the list of jobs."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(SECONDS * 1000)
    page = context.new_page()
    watch.follow(page)
    page.goto(site.url)
    yield page
    context.close()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Training files, good and bad."""
    folder = tmp_path_factory.mktemp("rows")
    made = Files(folder / "good.jsonl", folder / "long.jsonl", folder / "held.jsonl", folder / "bad.jsonl")
    made.good.write_bytes(chat_rows(40))
    made.long.write_bytes(chat_rows(600))
    made.held.write_bytes(chat_rows(12))
    made.bad.write_bytes(bad_rows())
    return made
