"""The live page under the load of three tenants: screenshots, and the cost of open pages.

`python -m benchmarks.dashboard [--seconds N] [--images FOLDER]`

Serves *wide* with [auth]; callers of *search* (weight 4), *ads* (weight 2) and *jobs* (weight 1, limited to
48 concurrent requests, which it reaches) come in waves. After `--seconds` a real Chromium opens the page and
takes the screenshots. Before that, it measures the CPU time of an idle server with no page open, with one and
with ten. `docs/images` has the screenshots of the last run, which need a human check.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import math
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from benchmarks.common import wire
from benchmarks.common.models import OUT, model_path
from benchmarks.common.processes import Server, cobatch
from benchmarks.common.procstat import cpu_us
from cobatch.server.auth import api_keys

IMAGES = Path(__file__).parents[1] / "docs" / "images"
_PATH = "/v2/models/wide/infer"
_COST_S = 20
# Of each tenant: callers, the rows of their requests, and the mean pause between requests in seconds.
_CALLERS = {"search": (32, (1, 1, 2), 0.05), "ads": (16, (1, 2, 4), 0.06), "jobs": (64, (4, 8), 0.25)}
_WAVE_S = 50
_RULES = """
[[auth.tenants]]
tenant = "search"
weight = 4

[[auth.tenants]]
tenant = "ads"
weight = 2

[[auth.tenants]]
tenant = "jobs"
max_concurrent = 48
"""
_SHOWN = (("light", 1400, 900), ("dark", 1400, 900), ("phone", 390, 844))


def configure(folder: Path) -> tuple[Path, dict[str, str]]:
    """Write a configuration with API keys for the tenants, and for *ops*, who may read the page."""
    folder.mkdir(parents=True, exist_ok=True)
    scopes = dict.fromkeys(_CALLERS, ("infer",)) | {"ops": ("admin",)}
    minted = {tenant: api_keys.mint(tenant, scopes[tenant]) for tenant in scopes}
    (folder / "api-keys.toml").write_text("".join(table for _, table in minted.values()))
    config = folder / "cobatch.toml"
    config.write_text(f'[auth]\napi_keys_file = "api-keys.toml"\n{_RULES}')
    return config, {tenant: key for tenant, (key, _) in minted.items()}


async def _call(address: str, key: str, sizes: tuple[int, ...], think_s: float, end_s: float) -> None:
    """Run a caller: send a request, pause, repeat."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    encoded = [wire.encode("wide", wire.rows_of("wide", size, 0), True) for size in sizes]
    messages = [
        wire.raw_request(wire.Message(one.body, one.headers | {"X-API-Key": key}), address, _PATH)
        for one in encoded
    ]
    while (now_s := time.monotonic()) < end_s:
        calm = 1.6 + 1.4 * math.sin(2 * math.pi * now_s / _WAVE_S)
        await asyncio.sleep(random.expovariate(1 / (think_s * (0.4 + calm))))
        message = random.choice(messages)
        writer.write(message)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        await reader.readexactly(int(answer.partition("content-length: ")[2].partition("\r")[0]))
    writer.close()


async def _load(address: str, keys: dict[str, str], end_s: float) -> None:
    callers = [
        _call(address, keys[tenant], sizes, think_s, end_s)
        for tenant, (count, sizes, think_s) in _CALLERS.items()
        for _ in range(count)
    ]
    await asyncio.gather(*callers)


@contextmanager
def loaded(server: Server, keys: dict[str, str], seconds: float) -> Iterator[None]:
    """Run all callers in a thread of this process, for at most `seconds`."""
    end_s = time.monotonic() + seconds
    thread = threading.Thread(target=lambda: asyncio.run(_load(server.address, keys, end_s)))
    thread.start()
    try:
        yield
    finally:
        thread.join()


@contextmanager
def open_page(server: Server, key: str) -> Iterator[None]:
    """Read the events of the page, as an open page does."""
    connection = http.client.HTTPConnection(server.address)
    connection.request("GET", "/dashboard/events", headers={"X-API-Key": key})
    response = connection.getresponse()

    def read() -> None:
        with suppress(OSError, http.client.HTTPException):  # the other thread closes it
            while response.read1(1 << 16):
                pass

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        if connection.sock is not None:
            connection.sock.shutdown(2)
        thread.join()
        connection.close()


def cost(server: Server, key: str) -> None:
    """Print the CPU share of an otherwise idle server by open pages."""
    for pages in (0, 1, 10):
        with ExitStack() as stack:
            for _ in range(pages):
                stack.enter_context(open_page(server, key))
            time.sleep(1)
            before_us = cpu_us(server.pid)
            time.sleep(_COST_S)
            share = (cpu_us(server.pid) - before_us) / (_COST_S * 1e6)
            print(f"{pages} pages open: {share:.2%} of a core", flush=True)


def pictures(server: Server, key: str, folder: Path) -> None:
    """Write the screenshots."""
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for name, width, height in _SHOWN:
            page = browser.new_page(
                viewport={"width": width, "height": height},
                color_scheme="dark" if name == "dark" else "light",
            )
            page.goto(f"http://{server.address}/dashboard")
            page.fill("#token", key)
            page.keyboard.press("Enter")
            page.wait_for_selector("#c-timeline .about:has-text('batch')")
            page.wait_for_timeout(2500)
            if name == "dark":
                _choose(page)
            page.screenshot(path=folder / f"dashboard-{name}.png", full_page=True)
            page.close()
        browser.close()


def _choose(page: Page) -> None:
    """Select the last batch but one, and explain one of its requests."""
    page.click("#c-timeline button >> nth=1")
    page.focus("#c-timeline canvas")
    for pressed in ("End", "ArrowLeft", "Enter"):
        page.keyboard.press(pressed)
    page.wait_for_selector("#explained p")
    page.evaluate("() => scrollTo(0, 0)")


def main(arguments: list[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dashboard")
    parser.add_argument("--seconds", type=int, default=170, help="of load before the screenshots")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the screenshots")
    options = parser.parse_args(arguments)
    config, keys = configure(OUT / "dashboard")
    with cobatch(model_path("wide"), "wide", True, config, ["--keep-alive-s", "60"]) as server:
        cost(server, keys["ops"])
        with loaded(server, keys, options.seconds + 20):
            time.sleep(options.seconds)
            pictures(server, keys["ops"], options.images)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
