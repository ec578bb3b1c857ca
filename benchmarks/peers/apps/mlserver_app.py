"""MLServer: a custom runtime with adaptive batching, in the server's process and not in a pool of workers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import shared
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Runtime(MLModel):
    """The V2 protocol in JSON."""

    async def load(self) -> bool:
        self.model = shared.Model()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = NumpyCodec.decode_input(payload.inputs[0]).astype(self.model.dtype, copy=False)
        output = NumpyCodec.encode_output(self.model.output.name, self.model(rows), use_bytes=False)
        return InferenceResponse(model_name=self.name, outputs=[output])


if __name__ == "__main__":
    folder = Path(os.environ["PEER_FOLDER"], "settings")
    folder.mkdir(exist_ok=True)
    settings = {
        "host": "127.0.0.1",
        "http_port": shared.PORT,
        "grpc_port": int(os.environ["PEER_SPARE_PORT"]),
        "metrics_port": int(os.environ["PEER_SPARE_PORT_2"]),
        "parallel_workers": 0,
        "debug": False,
        "metrics_endpoint": None,
        "gzip_enabled": False,
    }
    described = {
        "name": shared.NAME,
        "implementation": "mlserver_app.Runtime",
        "max_batch_size": shared.MAX_BATCH,
        "max_batch_time": shared.MAX_WAIT_MS / 1000,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(described))
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    program = Path(sys.executable).with_name("mlserver")
    os.execv(program, [str(program), "start", str(folder)])
