"""The live page under the load of three tenants: pictures of it, and what it costs to keep it open.

`python -m benchmarks.dashboard [--seconds N] [--images FOLDER]`

Serves *wide* with [auth]; callers of *search* (weight 4), *ads* (weight 2) and *jobs* (weight 1, at most 48
requests at once, which it runs into) come in waves. After so many seconds a real Chromium is shown the page,
and the pictures are written. Before that, on an idle server: CPU with nobody looking, with one page open and
with ten. `docs/images` has what the last run wrote; a person has to look at it.
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
# Callers of each tenant, the rows of their requests, and how long each waits before the next one, in seconds.
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
    """A configuration with API keys for the tenants, and for *ops*, who may look at the page."""
    folder.mkdir(parents=True, exist_ok=True)
    scopes = dict.fromkeys(_CALLERS, ("infer",)) | {"ops": ("admin",)}
    minted = {tenant: api_keys.mint(tenant, scopes[tenant]) for tenant in scopes}
    (folder / "api-keys.toml").write_text("".join(table for _, table in minted.values()))
    config = folder / "cobatch.toml"
    config.write_text(f'[auth]\napi_keys_file = "api-keys.toml"\n{_RULES}')
    return config, {tenant: key for tenant, (key, _) in minted.items()}


async def _call(address: str, key: str, sizes: tuple[int, ...], think_s: float, end_s: float) -> None:
    """One caller: asks, thinks, asks again."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    messages = [wire.encode("wide", wire.rows_of("wide", size, 0), True) for size in sizes]
    while (now_s := time.monotonic()) < end_s:
        calm = 1.6 + 1.4 * math.sin(2 * math.pi * now_s / _WAVE_S)
        await asyncio.sleep(random.expovariate(1 / (think_s * (0.4 + calm))))
        message = random.choice(messages)
        fields = message.headers | {
            "Host": address,
            "X-API-Key": key,
            "Content-Length": str(len(message.body)),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"POST {_PATH} HTTP/1.1\r\n{head}\r\n".encode() + message.body)
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
    """All callers, in a thread of this process, while this lasts and no longer than so many seconds."""
    end_s = time.monotonic() + seconds
    thread = threading.Thread(target=lambda: asyncio.run(_load(server.address, keys, end_s)))
    thread.start()
    try:
        yield
    finally:
        thread.join()


@contextmanager
def looking(server: Server, key: str) -> Iterator[None]:
    """One open feed, read as a page reads it."""
    connection = http.client.HTTPConnection(server.address)
    connection.request("GET", "/dashboard/events", headers={"X-API-Key": key})
    response = connection.getresponse()

    def read() -> None:
        with suppress(OSError, http.client.HTTPException):  # the other thread ends it
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
    """Print how busy an otherwise idle server is with so many open pages."""
    for pages in (0, 1, 10):
        with ExitStack() as stack:
            for _ in range(pages):
                stack.enter_context(looking(server, key))
            time.sleep(1)
            before_us = cpu_us(server.pid)
            time.sleep(_COST_S)
            share = (cpu_us(server.pid) - before_us) / (_COST_S * 1e6)
            print(f"{pages} pages open: {share:.2%} of a core", flush=True)


def pictures(server: Server, key: str, folder: Path) -> None:
    """Write each of the pictures."""
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
    """The last batch but one, and what became of one of its requests."""
    page.click("#c-timeline button >> nth=1")
    page.focus("#c-timeline canvas")
    for pressed in ("End", "ArrowLeft", "Enter"):
        page.keyboard.press(pressed)
    page.wait_for_selector("#explained p")
    page.evaluate("() => scrollTo(0, 0)")


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dashboard")
    parser.add_argument("--seconds", type=int, default=170, help="how long to load before the pictures")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where to write the pictures")
    given = parser.parse_args(arguments)
    config, keys = configure(OUT / "dashboard")
    with cobatch(model_path("wide"), "wide", True, config, ["--keep-alive-s", "60"]) as server:
        cost(server, keys["ops"])
        with loaded(server, keys, given.seconds + 20):
            time.sleep(given.seconds)
            pictures(server, keys["ops"], given.images)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
