"""The V2 protocol without infer: server, health, models, and Triton's configuration, statistics and index."""

import time
from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch import __version__
from cobatch.batcher.statistics import Counters, PaddingTotals
from cobatch.engines.base import TensorSpec
from cobatch.server.api.routing import Endpoint, Needs, find, find_target, guarded, json, loaded
from cobatch.server.http.asgi import read_body
from cobatch.server.http.problem import Problem
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import Inference
from cobatch.server.v2.decode import decode_json
from cobatch.server.v2.long_json import ENVELOPE_BYTES

Json = dict[str, object]

EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics"]
# Triton's names of a batch's stages, and the fields of `BatchTotals`.
_STAGES = {"compute_input": "input_s", "compute_infer": "compute_s", "compute_output": "output_s"}
# Triton's configuration calls the other datatypes TYPE_ and their name.
_CONFIG_TYPES = {"BYTES": "TYPE_STRING"}


class IndexRequest(msgspec.Struct):
    """The body of a request for the repository index. `ready`: list only models that are ready."""

    ready: bool = False


_decode_asked = msgspec.json.Decoder(IndexRequest).decode


def v2_routes(inference: Inference) -> list[Route]:
    """Return the routes. Infer is here for its 404 and 405; `server.edge` serves it."""

    async def server(_: Request) -> Response:
        about: Json = {"name": "cobatch", "version": __version__, "extensions": EXTENSIONS}
        processes = inference.settings.server.process_count
        return json(about if processes == 1 else about | {"processes": processes})

    async def live(_: Request) -> Response:
        dead = [name for name, model in inference.models.items() if model.dead]
        return json({"live": False, "dead_models": dead}, 503) if dead else json({"live": True})

    async def ready(_: Request) -> Response:
        return json({"ready": inference.ready}, 200 if inference.ready else 503)

    async def model_ready(request: Request) -> Response:
        target = find_target(inference, request)
        is_ready = target.ready and not inference.leaving
        return json({"name": target.name, "ready": is_ready}, 200 if is_ready else 503)

    def of_model(describe: Callable[[Model], Json]) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            return json(describe(loaded(find(inference, request))))

        return endpoint

    async def all_stats(_: Request) -> Response:
        models = inference.models.values()
        return json({"model_stats": [statistics(model) for model in models if model.batcher is not None]})

    async def index(request: Request) -> Response:
        body = await read_body(dict(request.headers.raw), request.receive, ENVELOPE_BYTES, None)
        asked = decode_json(_decode_asked, body, "a request for the index") if body else IndexRequest()
        models = [model for model in inference.models.values() if model.ready or not asked.ready]
        return json([index_entry(model) for model in models])

    async def infer(request: Request) -> Response:
        find(inference, request)
        raise Problem("not-found", f"there is nothing at {request.url.path!r}")

    def route(path: str, needs: Needs, endpoint: Endpoint, method: str = "GET") -> Route:
        return Route(path, guarded(inference, needs, endpoint), methods=[method])

    routes = [
        route("/v2", "known", server),
        route("/v2/", "known", server),  # the spelling in the protocol's OpenAPI document
        route("/v2/health/live", "open", live),
        route("/v2/health/ready", "open", ready),
        route("/v2/models/stats", "admin", all_stats),
        route("/v2/repository/index", "admin", index, "POST"),
    ]
    for base in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes += [
            route(base, "read", of_model(metadata)),
            route(f"{base}/ready", "open", model_ready),
            route(f"{base}/config", "read", of_model(config)),
            route(f"{base}/stats", "admin", of_model(lambda model: {"model_stats": [statistics(model)]})),
            route(f"{base}/infer", "infer", infer, "POST"),
        ]
    return routes


def metadata(model: Model) -> Json:
    """Return the protocol's model metadata. Shapes begin with the batch axis, -1, if there is one."""
    engine = model.engine_worker.engine
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": engine.platform,
        "inputs": [_tensor(spec) for spec in engine.signature.inputs],
        "outputs": [_tensor(spec) for spec in engine.signature.outputs],
    }


def _tensor(spec: TensorSpec) -> Json:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.full_shape}


def config(model: Model) -> Json:
    """Return the part of Triton's model configuration that its clients read, and how the model is batched.

    Dims lack the batch axis. As in Triton, a `max_batch_size` of 0 says that there is none.
    """
    engine = model.engine_worker.engine
    batching = engine.signature.batching
    dynamic = {
        "preferred_batch_size": [model.loaded_batcher.queue.full_rows],
        "max_queue_delay_microseconds": round(model.settings.max_delay_ms * 1000),
        "default_queue_policy": {"max_queue_size": model.settings.max_queue_rows},
    }
    return {
        "name": model.name,
        "platform": engine.platform,
        "backend": engine.platform.partition("_")[0],
        "version_policy": {"specific": {"versions": [model.version]}},
        "max_batch_size": engine.max_batch_size if batching.on else 0,
        "input": [
            _config_tensor(spec) | ({} if spec in model.decoder.required else {"optional": True})
            for spec in engine.signature.inputs
        ],
        "output": [_config_tensor(spec) for spec in engine.signature.outputs],
        **({"dynamic_batching": dynamic} if batching.on else {}),
        "parameters": {
            "batching": {"string_value": batching.verdict},
            "batching_note": {"string_value": engine.signature.batching_note},
        },
    }


def _config_tensor(spec: TensorSpec) -> Json:
    data_type = _CONFIG_TYPES.get(spec.datatype, f"TYPE_{spec.datatype}")
    return {"name": spec.name, "data_type": data_type, "dims": list(spec.shape)}


def index_entry(model: Model) -> Json:
    """Return the model's entry in the repository index."""
    if model.ready:
        state, reason = "READY", ""
    elif model.load_error is not None:
        state, reason = "UNAVAILABLE", "loading failed"
    elif model.batcher is not None:
        state, reason = "UNAVAILABLE", str(model.batcher.admission.closed)
    else:
        state, reason = "LOADING", ""
    return {"name": model.name, "version": model.version, "state": state, "reason": reason}


def statistics(model: Model) -> Json:
    """Return Triton's statistics since the model was loaded; a duration is a `count` and the sum in `ns`."""
    counters = model.loaded_batcher.counters
    by_rows = counters.by_rows
    requests = sum(totals.requests for totals in by_rows.values())
    queue_s = sum(totals.queue_s for totals in by_rows.values())
    # Each request of a batch spends the batch's whole time in a stage.
    stages_s = {
        stage: sum((getattr(one, name) / one.batches * one.requests for one in by_rows.values()), start=0.0)
        for stage, name in _STAGES.items()
    }
    last_s = counters.last_finished_s
    return {
        "name": model.name,
        "version": model.version,
        # Milliseconds since the epoch, from the time since then on the batcher's monotonic clock.
        "last_inference": 0 if last_s is None else round((time.time() - time.monotonic() + last_s) * 1000),
        "inference_count": counters.rows,
        "execution_count": counters.batches,
        "inference_stats": {
            "success": _duration(requests, sum(stages_s.values(), start=queue_s)),
            "fail": _duration(counters.failed, counters.failed_s),
            "queue": _duration(requests, queue_s),
            **{stage: _duration(requests, seconds) for stage, seconds in stages_s.items()},
        },
        "batch_stats": [
            {
                "batch_size": rows,
                **{
                    stage: _duration(totals.batches, getattr(totals, name)) for stage, name in _STAGES.items()
                },
            }
            for rows, totals in sorted(by_rows.items())
        ],
        **_padding(counters),
    }


def _padding(counters: Counters) -> Json:
    """Return the share of padding in total and by bucket; nothing for a model without padding."""
    total = counters.padding_total
    if total is None:
        return {}

    def padded(totals: PaddingTotals) -> Json:
        return {name: getattr(totals, name) for name in ("batches", "rows", "elements", "padding")}

    buckets = [{"lengths": lengths, **padded(totals)} for lengths, totals in sorted(counters.padding.items())]
    return {"padding": {**padded(total), "waste": round(total.waste, 6), "buckets": buckets}}


def _duration(count: int, seconds: float) -> Json:
    return {"count": count, "ns": round(seconds * 1e9)}
