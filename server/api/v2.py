"""What the V2 protocol and its Triton extensions say of a model: metadata, configuration, statistics.

The V2 protocol's routes beside infer: server, health, models. Bodies as the protocol has them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch import __version__
from cobatch.batcher.statistics import BatchTotals, Counters, PaddingTotals
from cobatch.engines.base import TensorSpec
from cobatch.server.api.routing import Endpoint, Needs, find, guarded, json, loaded
from cobatch.server.http.problem import Problem
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import Inference

Json = dict[str, object]
# How Triton's model configuration calls the datatypes that it does not call TYPE_ and their name.
_CONFIG_TYPES = {"BYTES": "TYPE_STRING"}


def metadata(model: Model) -> Json:
    """The protocol's model metadata. The batch axis is the first, -1 where its size may vary."""
    engine = model.engine_worker.engine
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": engine.platform,
        "inputs": [_tensor(spec) for spec in engine.signature.inputs],
        "outputs": [_tensor(spec) for spec in engine.signature.outputs],
    }


def _tensor(spec: TensorSpec) -> Json:
    return {"name": spec.name, "datatype": spec.datatype, "shape": [-1, *spec.shape]}


def config(model: Model) -> Json:
    """Triton's model configuration, as far as its clients ask for it; dims are without the batch axis."""
    engine = model.engine_worker.engine
    return {
        "name": model.name,
        "platform": engine.platform,
        "backend": engine.platform.partition("_")[0],
        "version_policy": {"specific": {"versions": [model.version]}},
        "max_batch_size": engine.max_batch_size,
        "input": [
            _config_tensor(spec) | ({} if spec in model.decoder.required else {"optional": True})
            for spec in engine.signature.inputs
        ],
        "output": [_config_tensor(spec) for spec in engine.signature.outputs],
        "dynamic_batching": {
            "preferred_batch_size": [model.loaded_batcher.full_rows],
            "max_queue_delay_microseconds": round(model.settings.max_delay_ms * 1000),
            "default_queue_policy": {"max_queue_size": model.settings.max_queue_rows},
        },
    }


def _config_tensor(spec: TensorSpec) -> Json:
    data_type = _CONFIG_TYPES.get(spec.datatype, f"TYPE_{spec.datatype}")
    return {"name": spec.name, "data_type": data_type, "dims": list(spec.shape)}


def index_entry(model: Model) -> Json:
    """A line of the repository's index."""
    if model.ready:
        state, reason = "READY", ""
    elif model.load_error is not None:
        state, reason = "UNAVAILABLE", "loading failed"
    elif model.batcher is not None:
        state, reason = "UNAVAILABLE", str(model.batcher.closed)
    else:
        state, reason = "LOADING", ""
    return {"name": model.name, "version": model.version, "state": state, "reason": reason}


def statistics(model: Model) -> Json:
    """Triton's statistics, since the model was loaded; durations are `count` and summed `ns`."""
    counters = model.loaded_batcher.counters
    by_rows = counters.by_rows
    requests = sum(figures.requests for figures in by_rows.values())
    queue_s = sum(figures.queue_s for figures in by_rows.values())
    parts = {name: _weighted(by_rows.values(), name) for name in ("input_s", "compute_s", "output_s")}
    last_s = counters.last_finished_s
    return {
        "name": model.name,
        "version": model.version,
        # Milliseconds since the epoch; the batcher's clock is monotonic, so by way of how long ago.
        "last_inference": 0 if last_s is None else round((time.time() - time.monotonic() + last_s) * 1000),
        "inference_count": counters.rows,
        "execution_count": counters.batches,
        "inference_stats": {
            "success": _duration(requests, queue_s + sum(parts.values())),
            "fail": _duration(counters.failed, counters.failed_s),
            "queue": _duration(requests, queue_s),
            "compute_input": _duration(requests, parts["input_s"]),
            "compute_infer": _duration(requests, parts["compute_s"]),
            "compute_output": _duration(requests, parts["output_s"]),
        },
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": _duration(figures.batches, figures.input_s),
                "compute_infer": _duration(figures.batches, figures.compute_s),
                "compute_output": _duration(figures.batches, figures.output_s),
            }
            for rows, figures in sorted(by_rows.items())
        ],
        **_padding(counters),
    }


def _padding(counters: Counters) -> Json:
    """How much of what ran was padding, as a whole and for each bucket; nothing where nothing is padded."""
    total = counters.padding_total
    if total is None:
        return {}
    buckets = [
        {"lengths": lengths, **_padded(figures)} for lengths, figures in sorted(counters.padding.items())
    ]
    return {"padding": {**_padded(total), "waste": round(total.waste, 6), "buckets": buckets}}


def _padded(figures: PaddingTotals) -> Json:
    return {
        "batches": figures.batches,
        "rows": figures.rows,
        "elements": figures.elements,
        "padding": figures.padding,
    }


def _weighted(figures: Iterable[BatchTotals], name: str) -> float:
    """Seconds as the requests saw them: each request of a batch spent all of the batch's time there."""
    return sum((getattr(one, name) / one.batches * one.requests for one in figures), start=0.0)


def _duration(count: int, seconds: float) -> Json:
    return {"count": count, "ns": round(seconds * 1e9)}


# Only what works.
EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics"]


def v2_routes(core: Inference) -> list[Route]:
    """All of them, for Starlette. Infer stands here for its 404 and 405; `InferRoutes` serves it."""

    async def server(_: Request) -> Response:
        return json({"name": "cobatch", "version": __version__, "extensions": EXTENSIONS})

    async def live(_: Request) -> Response:
        dead = [name for name, model in core.models.items() if model.dead]
        return json({"live": not dead} | ({"dead_models": dead} if dead else {}), 503 if dead else 200)

    async def ready(_: Request) -> Response:
        return json({"ready": core.ready}, 200 if core.ready else 503)

    async def model(request: Request) -> Response:
        return json(metadata(loaded(find(core, request))))

    async def model_ready(request: Request) -> Response:
        found = find(core, request)
        is_ready = found.ready and not core.draining
        return json({"name": found.name, "ready": is_ready}, 200 if is_ready else 503)

    async def model_config(request: Request) -> Response:
        return json(config(loaded(find(core, request))))

    async def model_stats(request: Request) -> Response:
        return json({"model_stats": [statistics(loaded(find(core, request)))]})

    async def all_stats(_: Request) -> Response:
        return json({"model_stats": [statistics(m) for m in core.models.values() if m.batcher is not None]})

    async def index(_: Request) -> Response:
        return json([index_entry(model) for model in core.models.values()])

    async def infer(request: Request) -> Response:
        # `InferRoutes` serves those that exist.
        find(core, request)
        raise Problem("not-found", f"there is nothing at {request.url.path!r}")

    def of_model(path: str, needs: Needs, endpoint: Endpoint, method: str) -> list[Route]:
        bases = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
        return [Route(base + path, guarded(core, needs, endpoint), methods=[method]) for base in bases]

    return [
        Route("/v2", guarded(core, "known", server), methods=["GET"]),
        # How the protocol's OpenAPI document spells it.
        Route("/v2/", guarded(core, "known", server), methods=["GET"]),
        Route("/v2/health/live", guarded(core, "open", live), methods=["GET"]),
        Route("/v2/health/ready", guarded(core, "open", ready), methods=["GET"]),
        Route("/v2/models/stats", guarded(core, "admin", all_stats), methods=["GET"]),
        Route("/v2/repository/index", guarded(core, "admin", index), methods=["POST"]),
        *of_model("", "read", model, "GET"),
        *of_model("/ready", "open", model_ready, "GET"),
        *of_model("/config", "read", model_config, "GET"),
        *of_model("/stats", "admin", model_stats, "GET"),
        *of_model("/infer", "infer", infer, "POST"),
    ]
