"""Every metric: the one place where names, labels and help stand. `docs/metrics.md` is made of it.

Names follow Prometheus' conventions: base units, and for what only grows `_total`, which the format adds.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram", "info"]
# Times and shares that histograms are cut at; all of the first are edges of `batcher.durations`.
TIME_BOUNDS = tuple(float(f"{digit}e{power}") for power in range(-5, 2) for digit in ("1", "2.5", "5"))[1:19]
SHARE_BOUNDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)


class Family(NamedTuple):
    """One metric. `help` is a sentence; `watch` says what it is good for beyond that."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    watch: str = ""


def _family(name: str, kind: Kind, labels: str, help_: str, watch: str = "") -> Family:
    return Family(f"cobatch_{name}", kind, tuple(labels.split()), help_, watch)


# fmt: off
# Requests
REQUESTS = _family(
    "requests", "counter", "model code reason",
    "Inference requests by how they were answered: status, and kind of problem (empty where there are rows).",
    "429 and 503: the server is slower than it is asked. `run-failed`, `internal`: the log says more.",
)
DURATION = _family(
    "request_duration_seconds", "histogram", "model",
    "Time of inference requests answered with rows, from complete headers until the answer was written.",
    "The callers' latency, less the network. Alert on the quantile that was promised to them.",
)
IN_FLIGHT = _family(
    "requests_in_flight", "gauge", "model",
    "Inference requests that are accepted and not answered yet.",
)
CANCELLED = _family(
    "requests_cancelled", "counter", "model", "Inference requests whose callers left before the answer.",
    "Callers with less patience than the queue is long.",
)
EXPIRED = _family(
    "requests_expired", "counter", "model",
    "Inference requests that could not be answered within their timeout.",
    "The queue is longer than callers' timeouts.",
)
HTTP_REQUESTS = _family(
    "http_requests", "counter", "route method code reason",
    "HTTP requests to all routes. The route is empty where there is none or the request did not get so far.",
    "401: somebody's credentials are wrong or have expired.",
)

# Queue
QUEUE_ROWS = _family(
    "queue_rows", "gauge", "model priority",
    "Rows that wait for the engine, by priority level (1 is the highest).",
)
QUEUE_LIMIT = _family(
    "queue_limit_rows", "gauge", "model", "Rows that may wait; more are refused.",
    "Queue rows near it: refusals are next.",
)
QUEUE_DELAY = _family(
    "queue_delay_seconds", "histogram", "model",
    "Time of requests that ran from acceptance until their batch was made up.",
    "Grows without bound when the engine cannot keep up.",
)

# Batches
BATCHES = _family(
    "batches", "counter", "model reason", "Batches that ran, by why they left when they did."
)
BATCH_ROWS = _family(
    "batch_rows", "histogram", "model", "Rows of batches that ran.",
    "Mean rows near 1 under load: batching gains nothing, see docs/scheduling.md.",
)
FULL_ROWS = _family(
    "full_batch_rows", "gauge", "model",
    "Rows past which a batch gains nothing by growing, as learned so far.",
)
COMPUTE = _family("batch_compute_seconds", "histogram", "model", "Time that the engine took for a batch.")
PACKING = _family("batch_packing_seconds", "counter", "model", "Time spent on packing rows into batches.")
DELIVERY = _family("batch_delivery_seconds", "counter", "model", "Time spent on writing batches' answers.")
PADDING_SHARE = _family(
    "batch_padding_ratio", "histogram", "model",
    "Part of a batch's elements that was padding, in steps of 5 %; only where padding is configured.",
    "Much of it: other buckets would fit better.",
)
ELEMENTS = _family(
    "batch_elements", "counter", "model", "Elements of padded inputs that ran, the padding included."
)
PADDING_ELEMENTS = _family(
    "batch_padding_elements", "counter", "model", "Elements of padded inputs that were padding."
)

# Engines
STATE = _family(
    "model_state", "gauge", "model state", "1 for the state that the model is in, 0 for the others.",
    "`dead` and `failed` do not mend themselves: restart, after a look at the log.",
)
ENGINES = _family(
    "engines", "gauge", "model", "Engines of the model that can run something.",
    "Fewer than configured: one died or hangs, and is being opened anew at best.",
)
BUSY = _family(
    "engine_busy_seconds", "counter", "model engine",
    "Time that the engine has run for, counted as runs end. Its rate is the busy share.",
    "Near 1 with a growing queue: it is the engine that limits. Low with a growing queue: it is not.",
)
RUNS = _family("engine_runs", "counter", "model engine", "Runs of the engine, failed ones included.")
FAILED_RUNS = _family(
    "failed_runs", "counter", "model",
    "Runs that ended with an error.", "Any: the log has the engine's words.",
)
HUNG_RUNS = _family("hung_runs", "counter", "model", "Runs that did not end within execution_timeout_ms.")
RETRIES = _family("retried_batches", "counter", "model", "Halves of failed batches that were run again.")
SLOTS = _family("engine_slots", "gauge", "model engine", "Batches that may be with the engine at a time.")
SLOTS_IN_USE = _family("engine_slots_in_use", "gauge", "model engine", "Batches that hold a slot now.")

# Callers
TENANT_REQUESTS = _family(
    "tenant_requests", "counter", "tenant result",
    "Inference requests of the busiest tenants, answered, failed or refused; `other` is all other tenants.",
)
TENANT_ROWS = _family("tenant_rows", "counter", "tenant", "Rows that ran for a tenant.")
TENANT_ENGINE = _family(
    "tenant_engine_seconds", "counter", "tenant", "A tenant's part of the time that engines have run for.",
    "What fair queueing shares by weight.",
)
TENANT_QUEUE = _family("tenant_queue_rows", "gauge", "tenant", "Rows of a tenant that wait.")
AUTH = _family(
    "auth_results", "counter", "result", "Credentials that were looked at, by what came of it.",
    "`forged` in numbers: somebody tries. `keys-unavailable`: the issuer cannot be reached.",
)

# The process
INFO = _family("build", "info", "version", "What runs here.")
READY = _family(
    "ready", "gauge", "", "1 if every model takes requests, as /v2/health/ready says.", "0 for minutes."
)
LAG = _family(
    "event_loop_lag_seconds", "histogram", "",
    "How late the event loop's timers are, to a millisecond. Every request waits that long somewhere.",
    "Above 50 ms: something blocks the loop, or the machine has too few processors.",
)
LOOP_CPU = _family(
    "event_loop_cpu_seconds", "counter", "", "Processor time of the event loop's thread.",
    "A rate near 1: one process can do no more, start another.",
)

# GPUs
GPU_INFO = _family("gpu", "info", "gpu name uuid", "The GPUs of the machine, as NVML numbers them.")
GPU_MEMORY_USED = _family("gpu_memory_used_bytes", "gauge", "gpu", "Memory of the GPU in use, by whomever.")
GPU_MEMORY = _family("gpu_memory_bytes", "gauge", "gpu", "Memory of the GPU.")
GPU_BUSY = _family(
    "gpu_utilization_ratio", "gauge", "gpu",
    "Part of NVML's last sampling period in which the GPU ran anything.",
)

# fmt: on
FAMILIES = tuple(value for value in list(globals().values()) if isinstance(value, Family))
