"""Triton through nvidia-pytriton: its C++ server and dynamic batcher, the model in this process.

The V2 protocol, JSON and binary. Needs the system's Python 3.11 with libpython3.11.
"""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

import numpy as np
import shared
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, QueuePolicy, Tensor, TimeoutAction
from pytriton.triton import Triton, TritonConfig

logging.getLogger("pytriton").setLevel(logging.WARNING)
model = shared.Model()
_QUEUE_PART = 0.5


@batch
def infer(**inputs: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    return {model.output.name: model(inputs[model.input.name])}


def policy() -> QueuePolicy | None:
    """Return a policy that refuses requests after a time in the queue.

    The time excludes the run, which needs its part of the deadline. `max_queue_size` does harm here: with a
    value that fits the deadline Triton was busy refusing, and answered a third as many in time.
    """
    if not shared.DEADLINE_MS:
        return None
    return QueuePolicy(TimeoutAction.REJECT, int(shared.DEADLINE_MS * 1000 * _QUEUE_PART))


if __name__ == "__main__":
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=shared.PORT,
        http_thread_count=2,
        allow_grpc=False,
        allow_metrics=False,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name=shared.NAME,
            infer_func=infer,
            inputs=[Tensor(name=model.input.name, dtype=model.dtype.type, shape=(model.elements,))],
            outputs=[Tensor(name=model.output.name, dtype=np.float32, shape=(int(model.output.shape[1]),))],
            config=ModelConfig(
                max_batch_size=shared.MAX_BATCH,
                batcher=DynamicBatcher(
                    max_queue_delay_microseconds=shared.MAX_WAIT_MS * 1000, default_queue_policy=policy()
                ),
            ),
            strict=False,
        )
        triton.run()
        ended = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()
