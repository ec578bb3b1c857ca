from pathlib import Path

from cobatch.server.settings.schema import ModelSettings
from tests.support.http.in_process import in_process
from tests.support.models import models

X = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}


async def test_items_that_cannot_be_in_time_are_refused_each(tmp_path: Path) -> None:
    """The model's own deadline is shorter than its runs have become."""
    path = models.write(tmp_path, models.negate(width=3), "negate.onnx")
    async with in_process(ModelSettings(path=path, threads=1, deadline_ms=50.0)) as running:
        for n in range(400):
            running.batcher("negate").latency.observe(1 << n % 7, 1.0, n * 0.05)
        url = "/v2/models/negate/infer"
        items = [{"id": str(n), "url": url, "method": "POST", "body": {"inputs": [X]}} for n in range(10)]
        response = await running.http.post("/batch", json={"requests": items})
        assert response.status_code == 200, response.text
        assert [each["status"] for each in response.json()["responses"]] == [504] * 10
