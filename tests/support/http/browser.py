"""A real Chromium, without a window, for tests of pages: the one of the system, driven by playwright."""

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
# Chromium says so itself of each answer that is not 2xx, whatever the script makes of it.
_EXPECTED = "Failed to load resource"

expect.set_options(timeout=DEADLINE_S * 1000)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser. Skips the test where there is none, and fails it under CI."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        why = "needs a browser: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    with sync_playwright() as playwright:
        # Its sandbox needs what containers, and root, do not have; the pages are our own.
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def page_at(browser: Browser, url: str, **context: Any) -> Iterator[Page]:
    """A page in a session of its own. Whatever goes wrong in its scripts fails the test at the end."""
    wrong: list[str] = []
    session = browser.new_context(**context)
    session.set_default_timeout(DEADLINE_S * 1000)
    page = session.new_page()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console",
        lambda message: (
            wrong.append(message.text)
            if message.type in ("error", "warning") and not message.text.startswith(_EXPECTED)
            else None
        ),
    )
    try:
        page.goto(url)
        yield page
        assert wrong == []
    finally:
        session.close()
