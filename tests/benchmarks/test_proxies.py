"""Refused bodies through the proxies that are installed; `python -m benchmarks.proxies` repeats it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.proxies.__main__ import measure
from benchmarks.proxies.running import PROXIES
from cobatch.server.settings.schema import ModelSettings
from tests.support.http.serving import GatedEngine, Served, serve


@pytest.fixture(scope="module", params=["fast", "asgi"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    model = ModelSettings(path="tiny", max_batch_size=4)
    with serve(request.param == "fast", (model,), engines={"tiny": GatedEngine()}) as served:
        yield served


@pytest.mark.slow
@pytest.mark.parametrize("name", PROXIES)
def test_a_refusal_reaches_the_client_through_a_proxy(
    served: Served, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not PROXIES[name].installed:
        pytest.skip(f"{PROXIES[name].program} is not installed")
    assert measure(name, served.server.port, 1, tmp_path / "proxy"), capsys.readouterr().out
