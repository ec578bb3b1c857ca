"""Every metric: name, labels and help. docs/metrics.md is made from this table.

Names follow Prometheus' conventions: base units; the format adds `_total` to counters.
"""

from typing import Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram", "info"]
# Bounds of histogram buckets; all of the first are edges of `batcher.durations`.
TIME_BOUNDS = tuple(float(f"{digit}e{power}") for power in range(-5, 2) for digit in ("1", "2.5", "5"))[1:19]
SHARE_BOUNDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)


class Family(NamedTuple):
    """One metric. `help` is a sentence; `watch` says what to conclude from it."""

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
    "Inference requests by status and kind of problem (empty if answered with rows).",
    "429 and 503: overload. `run-failed`, `internal`: see the log. `input-rejected`: the client's values.",
)
DURATION = _family(
    "request_duration_seconds", "histogram", "model",
    "Time of inference requests answered with rows, from complete headers until the response was written.",
    "The clients' latency without the network. Alert on the quantile of your service level.",
)
IN_FLIGHT = _family(
    "requests_in_flight", "gauge", "model", "Inference requests accepted and not answered yet.",
)
CANCELLED = _family(
    "requests_cancelled", "counter", "model", "Inference requests whose clients disconnected early.",
    "The clients' timeouts are shorter than the queue delay.",
)
EXPIRED = _family(
    "requests_expired", "counter", "model",
    "Inference requests that could not be answered within their timeout.",
    "The queue delay is longer than the requests' timeouts.",
)
HTTP_REQUESTS = _family(
    "http_requests", "counter", "route method code reason",
    "HTTP requests to all routes. The route is empty if there is none or the request was refused before it.",
    "401: credentials are wrong or have expired.",
)

# Queue
QUEUE_ROWS = _family(
    "queue_rows", "gauge", "model priority", "Queued rows by priority level (1 is the highest).",
)
QUEUE_LIMIT = _family(
    "queue_limit_rows", "gauge", "model", "Limit of queued rows; more are refused.",
    "Queued rows near it: refusals follow.",
)
QUEUE_DELAY = _family(
    "queue_delay_seconds", "histogram", "model",
    "Time of requests that ran, from acceptance until their batch was formed.",
    "Grows without bound if the engine cannot keep up.",
)

# Batches
BATCHES = _family("batches", "counter", "model reason", "Batches that ran, by reason of dispatch.")
BATCH_ROWS = _family(
    "batch_rows", "histogram", "model", "Rows of batches that ran.",
    "A mean near 1 under load: batching gains nothing, see docs/scheduling.md.",
)
FULL_ROWS = _family(
    "full_batch_rows", "gauge", "model",
    "Rows beyond which a larger batch gains nothing, as measured so far.",
)
EXPECTED_RUN = _family(
    "expected_run_seconds", "gauge", "model",
    "Predicted run time of a full batch, which deadlines are checked against.",
    "Far from batch_compute_seconds: run times have just changed.",
)
COMPUTE = _family("batch_compute_seconds", "histogram", "model", "Run time of batches.")
PACKING = _family("batch_packing_seconds", "counter", "model", "Time spent packing rows into batches.")
DELIVERY = _family("batch_delivery_seconds", "counter", "model", "Time spent writing batches' responses.")
PADDING_SHARE = _family(
    "batch_padding_ratio", "histogram", "model",
    "Padding as a share of a batch's elements, in steps of 5 %; only if padding is configured.",
    "A large share: other buckets would fit better.",
)
ELEMENTS = _family(
    "batch_elements", "counter", "model", "Elements of padded inputs that ran, padding included."
)
PADDING_ELEMENTS = _family(
    "batch_padding_elements", "counter", "model", "Elements of padded inputs that were padding."
)

# Engines
STATE = _family(
    "model_state", "gauge", "model state", "1 for the model's state, 0 for the others.",
    "`dead` and `failed` are permanent: see the log, and restart.",
)
ENGINES = _family(
    "engines", "gauge", "model", "Usable engines of the model.",
    "Fewer than configured: one died or hangs; it is opened again if possible.",
)
BUSY = _family(
    "engine_busy_seconds", "counter", "model engine",
    "Run time of the engine, counted as runs end. Its rate is the utilization.",
    "Near 1 with a growing queue: the engine is the bottleneck. Low with a growing queue: it is not.",
)
RUNS = _family("engine_runs", "counter", "model engine", "Runs of the engine, failed ones included.")
FAILED_RUNS = _family(
    "failed_runs", "counter", "model",
    "Runs that ended with an error, because of the engine or of a client's values.",
    "Any: the log has the engine's message.",
)
HUNG_RUNS = _family("hung_runs", "counter", "model", "Runs that did not end within execution_timeout_ms.")
ENGINE_ENDS = _family(
    "engine_ends", "counter", "model",
    "Processes of models in Python that ended by themselves, and were started again.",
    "Any: the log has the process's last output.",
)
RETRIES = _family("retried_batches", "counter", "model", "Halves of failed batches that were run again.")
SUSPECTS = _family(
    "suspects", "gauge", "model",
    "Tenants and anonymous connections whose rows ride apart from others, because some have failed.",
)
SLOTS = _family("engine_slots", "gauge", "model engine", "Batches that the engine takes at a time.")
SLOTS_IN_USE = _family("engine_slots_in_use", "gauge", "model engine", "Batches that hold a slot now.")

# Callers
TENANT_REQUESTS = _family(
    "tenant_requests", "counter", "tenant result",
    "Inference requests of the busiest tenants, answered, failed or refused; `other` is all other tenants.",
)
TENANT_ROWS = _family("tenant_rows", "counter", "tenant", "Rows that ran for a tenant.")
TENANT_ENGINE = _family(
    "tenant_engine_seconds", "counter", "tenant", "A tenant's share of the engines' run time.",
    "Fair queueing shares it by weight.",
)
TENANT_QUEUE = _family("tenant_queue_rows", "gauge", "tenant", "Queued rows of a tenant.")
AUTH = _family(
    "auth_results", "counter", "result", "Checked credentials by result.",
    "Many `forged`: an attack. `keys-unavailable`: the issuer cannot be reached.",
)

# The process
INFO = _family("build", "info", "version", "The version of cobatch.")
READY = _family(
    "ready", "gauge", "", "1 if every model takes requests, as in /v2/health/ready.", "0 for minutes."
)
LAG = _family(
    "event_loop_lag_seconds", "histogram", "",
    "Lateness of the event loop's timers, to a millisecond. It delays every request.",
    "Above 50 ms: the loop is blocked, or the machine has too few cores.",
)
LOOP_CPU = _family(
    "event_loop_cpu_seconds", "counter", "", "CPU time of the event loop's thread.",
    "A rate near 1: the process is at its limit, start another.",
)
FRONT_REQUESTS = _family(
    "front_requests", "counter", "front",
    "Requests that a front-end process answered itself; only with `processes`. They are in all other counts.",
    "One with none: it is hung, or gets no connections.",
)
FRONT_CONNECTIONS = _family(
    "front_connections", "gauge", "front", "Open connections of a front-end process.",
)
FRONT_CPU = _family(
    "front_event_loop_cpu_seconds", "counter", "front",
    "CPU time of the event loop's thread of a front-end process.",
    "All near 1: more `processes` would help. Only `event_loop_cpu_seconds` near 1: the engine's process is "
    "at its limit.",
)
FRONT_LAG = _family(
    "front_event_loop_lag_seconds", "histogram", "front",
    "Lateness of the timers of a front-end process, to a millisecond.",
)
LOG_DROPPED = _family(
    "log_lines_dropped", "counter", "", "Lines of the log dropped because stderr's reader was slow.",
    "Above 0: the log is incomplete; look at what reads it.",
)

# GPUs
GPU_INFO = _family("gpu", "info", "gpu name uuid", "The GPUs of the machine, as NVML numbers them.")
GPU_MEMORY_USED = _family("gpu_memory_used_bytes", "gauge", "gpu", "Used memory of the GPU, by any process.")
GPU_MEMORY = _family("gpu_memory_bytes", "gauge", "gpu", "Memory of the GPU.")
GPU_BUSY = _family(
    "gpu_utilization_ratio", "gauge", "gpu",
    "Share of NVML's last sampling period in which the GPU was busy.",
)

# fmt: on
FAMILIES = tuple(value for value in list(globals().values()) if isinstance(value, Family))

# Batched functions of other applications (`server.observability.functions`); a server has none of these.
# fmt: off
CALLS = _family("function_calls", "counter", "function", "Calls that were accepted.")
CALLS_REFUSED = _family(
    "function_calls_refused", "counter", "function reason", "Calls that were refused.",
    "`queue`: overload. `deadline`: timeouts are too short for the load.",
)
CALLS_FAILED = _family(
    "function_calls_failed", "counter", "function", "Accepted calls that raised an exception.",
)
CALLS_EXPIRED = _family(
    "function_calls_expired", "counter", "function", "Failed calls whose timeout had ended.",
)
CALLS_CANCELLED = _family(
    "function_calls_cancelled", "counter", "function", "Accepted calls whose callers were cancelled.",
)
CALLS_QUEUED = _family("function_calls_queued", "gauge", "function", "Calls that are queued.")
CALL_QUEUE_DELAY = _family(
    "function_queue_delay_seconds", "histogram", "function",
    "Time of calls that ran, from acceptance until their batch was formed.",
    "Grows without bound if the function cannot keep up.",
)
BATCH_SIZE = _family(
    "function_batch_size", "histogram", "function", "Items of batches that ran.",
    "A mean near 1 under load: batching gains nothing.",
)
FULL_BATCH = _family(
    "function_full_batch_size", "gauge", "function",
    "Items beyond which a larger batch gains nothing, as measured so far.",
)
FAILED_BATCHES = _family(
    "function_failed_batches", "counter", "function", "Runs of the function that raised an exception.",
)
BATCH_RUN = _family("function_run_seconds", "histogram", "function", "Run time of batches.")
# fmt: on
FUNCTION_FAMILIES = tuple(
    value for value in list(globals().values()) if isinstance(value, Family) and value not in FAMILIES
)
