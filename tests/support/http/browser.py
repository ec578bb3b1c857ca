"""A headless Chromium of the system for tests of pages, driven by playwright."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.http.serving import DEADLINE_S

_NAMES = ("chromium", "chromium-browser", "google-chrome")
# Chromium logs this for each response that is not 2xx, even if the script handles it.
_EXPECTED = "Failed to load resource"

expect.set_options(timeout=DEADLINE_S * 1000)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Run the browser. Skips the test if there is none, and fails it under CI."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        why = "needs a browser: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    with sync_playwright() as playwright:
        # The sandbox does not work in containers or as root; the pages are our own.
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def page_at(browser: Browser, url: str, **context: Any) -> Iterator[Page]:
    """Yield a page in its own session. Errors and warnings of its scripts fail the test at the end."""
    errors: list[str] = []
    session = browser.new_context(**context)
    session.set_default_timeout(DEADLINE_S * 1000)
    page = session.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda message: (
            errors.append(message.text)
            if message.type in ("error", "warning") and not message.text.startswith(_EXPECTED)
            else None
        ),
    )
    try:
        page.goto(url)
        yield page
        assert errors == []
    finally:
        session.close()
